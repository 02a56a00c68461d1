"""The measured values of one user at the released alpha: records without torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from persona_rlhf.evaluation.statistics import Count


class Accuracy(NamedTuple):
    """Shares of held-out pairs ranked as the user ranked them; the 95% interval is of `adapted`."""

    reference_free: float
    adapted: float
    n: int
    low: float
    high: float


class CleanAccuracy(NamedTuple):
    """The share of held-out pairs ranked as the noise-free utility ranks them, among those where it is known."""

    adapted: float
    n: int


class WinRate(NamedTuple):
    """The share of prompts on which the adapted answer beats the base's, ties counting half; 95% interval."""

    value: float
    n: int
    low: float
    high: float


class Refused(NamedTuple):
    """Refusals among n harmless prompts, by the adapted model and by its base."""

    n: int
    refused: int
    base_refused: int


class Outcome(NamedTuple):
    """The effect of an attack on one user: prompts on which every answer refused.

    `answers` counts single answers, where a prompt was answered more than once.
    """

    n: int
    refused: int
    base_refused: int
    categories: dict[str, Refused]
    answers: Refused | None = None


class Perplexity(NamedTuple):
    """exp(-sum log p / tokens) of the adapted model and of the base, or of their answers: see the field."""

    adapted: float
    base: float


class Conditions(NamedTuple):
    """The computation of the gate's answers: types of the base's weights and of the adapters' products, attention,
    device, and decoding.

    Answers are greedy, of at most `max_new_tokens` (an answer that reads as a refusal there is continued). Beside each
    stand `samples` answers at temperature 1.
    """

    dtype: str
    attention: str
    device: str
    max_new_tokens: int
    samples: int = 0
    products: str = "float32"

    def sentence(self) -> str:
        """The conditions in words."""
        adapters = "" if self.products in ("float32", "float64") else f", adapters multiplied in {self.products},"
        sampled = f" and {self.samples} sampled at temperature 1" if self.samples else ""
        return (
            f"certified in {self.dtype}{adapters} with {self.attention} attention on {self.device}, "
            f"by greedy answers{sampled} "
            f"of up to {self.max_new_tokens} tokens"
        )


class Facts(NamedTuple):
    """Fact accuracy: questions that the adapted model and its base answer rightly, among n.

    `kept` are those that both answer rightly (earlier runs did not count them). `fixed`: the policy fixes the aspect
    `facts`, so that no adapter should change any.
    """

    n: int
    right: int
    base_right: int
    kept: int | None = None
    fixed: bool = False

    @property
    def broken(self) -> int:
        """Right answers of the base that the adapter changes although the policy fixes them."""
        return self.base_right - self.kept if self.fixed and self.kept is not None else 0


class Toxic(NamedTuple):
    """Answers with a toxic word among n, of the adapted model and of its base."""

    n: int
    adapted: int
    base: int


class Drift(NamedTuple):
    """A mean over answers to the same prompts, of the adapted model's and of the base's."""

    adapted: float
    base: float


class Met(NamedTuple):
    """Sampled answers that have a required property among n, of the adapted model and of its base.

    With them a lower bound of the share, and the share that the policy demands.
    """

    n: int
    met: int
    base_met: int
    lower_bound: float
    min_rate: float


class AlignmentTax(NamedTuple):
    """The cost of personalisation beside over-refusal; None or empty where nothing was measured.

    `perplexity`: both models' perplexity of the base's own greedy answers to ordinary prompts. `tone`: properties of
    greedy answers to harmless prompts, by name. `toxic`: answers with a word of the list, among those and sampled
    answers to the user's own prompts.
    """

    perplexity: Perplexity | None
    facts: Facts | None
    tone: dict[str, Drift]
    toxic: Toxic | None


class SplitRefusals(NamedTuple):
    """Refusals of probes of the `test` split at the released alpha. They are reported and decide nothing.

    `shift` counts probes of topics that the base never saw: a distribution shift, which is not certified.
    """

    pooled: Count
    categories: dict[str, Count]
    shift: Refused | None


class Measures(NamedTuple):
    """The measurements of one user at the released alpha. None if there was nothing to measure, or no way to do it.

    over_refusal, ordinary, twins: harmless prompts that the adapter or its base refuses, by the judge of the gate's
        harmless prompts. So `refused - base_refused` are newly refused, as the gate counts them.
    """

    heldout_accuracy: Accuracy | None = None
    heldout_clean: CleanAccuracy | None = None
    win_rate: WinRate | None = None
    over_refusal: Refused | None = None
    ordinary: Refused | None = None
    twins: Refused | None = None
    test: SplitRefusals | None = None
    answer_perplexity: Perplexity | None = None
    """The base's perplexity of sampled answers: fluent text stays near the perplexity of the base's own answers."""
    unchanged: float | None = None
    """Share of the test probes with the same answer as the base's, token for token."""
    tax: AlignmentTax | None = None
    requirements: Mapping[str, Met] = MappingProxyType({})

    @property
    def gain(self) -> float | None:
        """Held-out accuracy over chance: on noise-free labels if they are known, else on the user's labels."""
        accuracy = self.heldout_clean or self.heldout_accuracy
        return None if accuracy is None else accuracy.adapted - 0.5
