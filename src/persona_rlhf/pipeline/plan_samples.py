"""Samples of a run's work for `plan`: users screened, constraint data, and users judged on a part of the prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import ceil
from time import perf_counter
from typing import NamedTuple

import torch

from persona_rlhf.common.errors import InputError
from persona_rlhf.data.tokenize import UserRows
from persona_rlhf.evaluation.evaluator import Evaluator
from persona_rlhf.evaluation.request_screens import measure_screen, screened_probes
from persona_rlhf.pipeline.inputs import RunInputs
from persona_rlhf.pipeline.monitoring import OnProgress, ProgressEvent, UserCounter
from persona_rlhf.pipeline.prepare import Prepared, chunks_of, evaluator_of, prepare_users
from persona_rlhf.training.constraint import ConstraintData
from persona_rlhf.training.constraint_data import policy_constraint_data

CHANGED = 3  # one probe in so many is answered anew by a trained adapter
MEASURED_USERS = 1_000
_EVERY = 16  # one prompt in so many is asked
_LEAST = 32  # prompts of a kind that are asked nevertheless
_LEAST_EXAMPLES = 8  # of a category, in the constraint data
_SCREENED = 8  # users that are screened; of others, all pairs are assumed to stay
_AT_ONCE = 32  # users tokenized together


class SampledConstraint(NamedTuple):
    """Constraint data of a part of the probes; the share of all work in it, and seconds that all of it takes."""

    data: ConstraintData | None
    share: float
    seconds: float


class ScreenedUsers(NamedTuple):
    """Users with their pairs to train on, and the seconds in which `train` screens and tokenizes all of them."""

    rows: list[UserRows]
    seconds: float


def screened(ready: Prepared, users: int, on_progress: OnProgress) -> ScreenedUsers:
    """The first `users` users: a few of them screened as `train` does, the others tokenized alone."""
    chosen = range(0, users, max(1, ceil(users / _SCREENED)))
    clock = perf_counter()
    with ready.watched(ProgressEvent("screening"), on_progress):
        chunk = prepare_users(ready, [pair for n in chosen for pair in ready.pairs.of(range(n, n + 1))])
    seconds, rows = perf_counter() - clock, chunk.rows
    counter = UserCounter("tokenizing", users, on_progress)
    unscreened = ready._replace(screens=(), near_copies=None)
    for some in chunks_of(users, _AT_ONCE):
        pairs = [pair for n in some if n not in chosen for pair in ready.pairs.of(range(n, n + 1))]
        if pairs:
            rows += prepare_users(unscreened, pairs).rows
        counter(some.stop)
    return ScreenedUsers(rows, seconds * users / max(1, len(chosen)))


def _every(count: int) -> int:
    """One in how many of so many prompts is asked."""
    return max(1, min(_EVERY, count // _LEAST))


def screens_seconds(ready: Prepared) -> float:
    """Seconds in which `train` measures its screens on probes, where it has not done so for their thresholds."""
    if ready.config.screening.base != "answer":
        return 0.0
    probes = screened_probes(ready.policy, "dev")
    few, clock = probes[:: _every(len(probes))], perf_counter()
    for calibrated in ready.screens:
        measure_screen(calibrated.screen, few, ready.policy.categories)
    return (perf_counter() - clock) * len(probes) / max(1, len(few))


def sampled_constraint(ready: Prepared) -> SampledConstraint:
    """Constraint data from some of the train probes; from all of them where the base refuses too few of those.

    Raises InputError where the base refuses no train probe of a category.
    """
    config, policy, clock = ready.config, ready.policy, perf_counter()
    if not config.constraint.enabled:
        return SampledConstraint(None, 1.0, 0.0)
    sizes = Counter(probe.category for probe in policy.probes("train"))
    few = policy.sample(max(1, min(_EVERY, min(sizes.values(), default=1) // _LEAST_EXAMPLES)))
    share = len(few.probes("train")) / max(1, len(policy.probes("train")))
    settings = (config.constraint, config.seed, config.gate.max_new_tokens)
    try:
        data = policy_constraint_data(ready.adapted, few, *settings)
    except InputError:
        data, share = policy_constraint_data(ready.adapted, policy, *settings), 1.0
    return SampledConstraint(data, share, (perf_counter() - clock) / share)


def judging_seconds(
    ready: Prepared, inputs: RunInputs, first: Sequence[UserRows], typical: Sequence[UserRows], users: int
) -> float:
    """Seconds of judging and measuring all users, from a part of the prompts; the first user includes the base's
    answers, computed once for all."""
    full, every = ready.examination, _every(len(ready.examination.probes))
    evaluator = _sampled_evaluator(ready, inputs, every)
    first, typical = ([user._replace(heldout=user.heldout[::every]) for user in cohort] for cohort in (first, typical))
    once, again = (_judged(evaluator, cohort, full.gate.enabled) for cohort in (first, typical))
    anew, device = [*evaluator.harmless, *evaluator.probes[::CHANGED]], full.base.device
    clock = perf_counter()
    with full.adapted.using(torch.zeros(len(typical), full.adapted.params_per_user, device=device)):
        full.adapted.generate([anew] * len(typical), full.gate.max_new_tokens)
    more = (perf_counter() - clock) / len(typical)
    share = (len(evaluator.probes) + len(evaluator.harmless)) / max(1, len(full.probes) + len(full.harmless))
    return (once + again / len(typical) * (users - 1) + more * users) / max(share, 1e-9)


def _sampled_evaluator(ready: Prepared, inputs: RunInputs, every: int) -> Evaluator:
    """An evaluator with one in `every` of all prompts; it tests no demand."""
    evaluation = ready.config.evaluation
    fewer = {
        name: ceil(getattr(evaluation, name) / every)
        for name in ("win_rate_prompts", "harmless_prompts", "test_probes")
    }
    gate = ready.config.gate.model_copy(update={"enabled": False})
    config = ready.config.model_copy(
        update={"gate": gate, "evaluation": evaluation.model_copy(update=fewer)},
    )
    some = inputs._replace(
        policy=inputs.policy.sample(every), ordinary=inputs.ordinary[::every], facts=inputs.facts[::every]
    )
    return evaluator_of(config, some, ready.examination.adapted, ready.judges, every)


def _judged(evaluator: Evaluator, users: Sequence[UserRows], gated: bool) -> float:
    """Seconds of judging a cohort of adapters without effect; where the run has a gate, with its side effects."""
    adapted = evaluator.adapted
    flat = torch.zeros(len(users), adapted.params_per_user, device=adapted.base.device)
    clock = perf_counter()
    evaluator.verdicts(flat, [evaluator.demands] * len(users))
    if gated:
        evaluator.side_effects(flat, torch.ones(len(users), device=flat.device))
    evaluator.measures(flat, users, [1.0] * len(users))
    return perf_counter() - clock
