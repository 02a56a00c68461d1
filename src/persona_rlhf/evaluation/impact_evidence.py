"""The evidence of a run that the impact measures are made of, and a measured value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from persona_rlhf.evaluation.impact_statistics import LEVEL, Tested, mean_interval
from persona_rlhf.evaluation.prior_gain import PriorGain
from persona_rlhf.evaluation.records import Measures

FEWEST = 5
"""Users below which a figure over users is not shown, nor that of a group: it would tell of single persons."""

FEWEST_DRAWN = 8
"""Users below which a percentile bootstrap or a jackknife is too narrow."""


class AdapterAnswers(NamedTuple):
    """Answers and scores of one adapter (`report --impact --ask`), each beside the base's.

    view_shifts: by question, nats of more agreement with a view of the user than with one of somebody.
    flipped_shifts: the same by round, under drawn signs of the adapter's layers.
    copied: by answer, words in the longest run that is also in a trained answer of the user: adapted, base.
    wishes: by checkable wish of the user, the share of answers that meet it: adapted, base.
    canaries: by planted string, its rank among strings of the same form, and their number with it.
    flattering, human: by answer to a trained prompt, whether it has such a phrase: adapted, base.
    stances: by contested statement, nats of more agreement than the base with it, and with its reverse.
    flipped_stances: the same by round, under drawn signs of the adapter's layers.
    """

    view_shifts: Sequence[float] = ()
    flipped_shifts: Sequence[Sequence[float]] = ()
    copied: Sequence[tuple[int, int]] = ()
    wishes: Sequence[tuple[float, float]] = ()
    canaries: Sequence[tuple[int, int]] = ()
    flattering: Sequence[tuple[bool, bool]] = ()
    human: Sequence[tuple[bool, bool]] = ()
    stances: Sequence[tuple[float, float]] = ()
    flipped_stances: Sequence[Sequence[tuple[float, float]]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class UserEvidence:
    """The traces of one user in a finished run.

    pairs: chosen and rejected texts. trained: pairs trained on. curve: accuracy on the pairs of every step.
    factors_at: the row of the user's adapter in the Gram matrix; None without an adapter of the user's pairs.
    answers: the outcome of asking the user's adapter; None if nobody asked.
    """

    measures: Measures = field(default_factory=Measures)
    pairs: Sequence[tuple[str, str]] = ()
    trained: int = 0
    steps: int = 0
    seconds: float = 0.0
    curve: Sequence[float] = ()
    gain_over_prior: PriorGain | None = None
    group: str | None = None
    factors_at: int | None = None
    answers: AdapterAnswers | None = None

    @property
    def gain(self) -> float | None:
        """Accuracy above chance on the user's held-out labels."""
        accuracy = self.measures.heldout_accuracy
        return None if accuracy is None else accuracy.adapted - 0.5

    @property
    def tone(self) -> dict[str, float]:
        """The adapter's change of every property of tone from the base; empty where it was not measured."""
        tax = self.measures.tax
        return {} if tax is None else {name: drift.adapted - drift.base for name, drift in tax.tone.items()}


class RunEvidence(NamedTuple):
    """All users, the Gram matrix of the adapters, pairs of a step, epochs, and the red team's figures by attack.

    max_changed: `aspects.max_changed` of the policy, if it has one. labelled: users also train on pairs that a reward
    labels. step_flops: operations of one step of one user, counted from the base's shape.
    """

    users: Sequence[UserEvidence]
    gram: Float[NDArray[np.float64], "users users"]
    pairs_per_step: int = 1
    epochs: int = 1
    attacks: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    max_changed: float | None = None
    labelled: bool = False
    step_flops: float | None = None


class ImpactValue(NamedTuple):
    """A measured value. `low` and `high` are its 95% interval; a test has a p-value, and an alarm if it rejects.

    `limit` is the policy's, where it has one: the gate tests it for each user.
    """

    value: float
    n: int
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    alarm: bool = False
    limit: float | None = None


Outcome = ImpactValue | str
"""A value, or the reason why there is none."""


def mean_of_users(values: Sequence[float], alarm: Callable[[float, float], bool] = lambda low, high: False) -> Outcome:
    """The mean of a figure over users with its t interval; `alarm` decides by the interval. A reason for few users."""
    if len(values) < FEWEST:
        return f"{len(values)} users have it, and {FEWEST} are needed"
    low, high = mean_interval(values)
    return ImpactValue(fmean(values), len(values), low, high, alarm=alarm(low, high))


def users_beyond(tests: Sequence[Tested | None], what: str) -> Outcome:
    """Users whose test rejects at the level shared by all tests; the p-value is the smallest, times their number."""
    made = [test.p_value for test in tests if test is not None]
    if not made:
        return f"no pair of answers differs in {what}"
    beyond = sum(p <= LEVEL / len(made) for p in made)
    return ImpactValue(beyond, len(made), p_value=min(1.0, min(made) * len(made)), alarm=beyond > 0)
