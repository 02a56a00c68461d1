"""Samples of a run's work for `plan`: users screened, constraint data, and users judged on a part of the prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import cycle, islice
from math import ceil
from time import perf_counter
from typing import NamedTuple

import torch

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.training import BasisSettings
from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import Row, UserRows, prompt_ids
from persona_rlhf.evaluation.evaluator import Evaluator
from persona_rlhf.evaluation.request_screens import measure_screen, screened_probes
from persona_rlhf.pipeline.base_answers import ANSWERS, prompts_of, sampled_pairs
from persona_rlhf.pipeline.inputs import RunInputs
from persona_rlhf.pipeline.monitoring import OnProgress, ProgressEvent, UserCounter
from persona_rlhf.pipeline.plan_steps import SampledTime, timed
from persona_rlhf.pipeline.prepare import Prepared, chunks_of, evaluator_of, prepare_users
from persona_rlhf.policy.policy import Policy
from persona_rlhf.training.constraint import OPENING_LENGTH, ConstraintData, ConstraintExample
from persona_rlhf.training.constraint_data import constraint_probes, policy_constraint_data

CHANGED = 3  # one probe in so many is answered anew by a trained adapter
MEASURED_USERS = 1_000
EVERY = 16  # one prompt in so many is asked
_RAREST = 64  # the same, of a slow base
_QUICK = 0.02  # seconds of a decoding step of one row, up to which a base is not slow
_ASKED = 512  # prompts of a kind, of which one in sixteen is asked; of fewer, more
_LEAST_EXAMPLES = 8  # of a category, in the constraint data
_AT_ONCE = 32  # users tokenized together
_OPENING = 8  # tokens of the prompt that tells how slow a base is


class SampledConstraint(NamedTuple):
    """Constraint data of a part of the probes; the share of all work in it, and seconds that all of it takes.

    `notice`: a sentence on a base that refuses too few of the sampled probes.
    """

    data: ConstraintData | None
    share: float
    seconds: float
    notice: str | None = None


class ScreenedUsers(NamedTuple):
    """Users with their pairs to train on, and the seconds in which `train` screens and tokenizes all of them."""

    rows: list[UserRows]
    seconds: float


def sampled_every(ready: Prepared) -> int:
    """One in how many prompts is asked of many: fewer where a decoding step of a single row is slow.

    Only a slow base needs them: its steps cost so much that the fixed costs of a small sample do not matter.
    """
    adapted, prompt = ready.adapted, (0,) * _OPENING
    with adapted.using(None):
        adapted.generate([[prompt]], 2)  # warms up
        clock = perf_counter()
        adapted.generate([[prompt]], 2)  # one pass over the prompt, and one step
    step = (perf_counter() - clock) / 2
    return min(_RAREST, max(EVERY, round(EVERY * step / _QUICK)))


def screened(ready: Prepared, users: int, on_progress: OnProgress) -> ScreenedUsers:
    """The first `users` users: one of them screened as `train` does, the others tokenized alone."""
    chosen = range(min(1, users))
    rows = list[UserRows]()

    def screen() -> None:
        pairs = [pair for n in chosen for pair in ready.pairs.of(range(n, n + 1))]
        rows.extend(prepare_users(ready, pairs).rows)

    with ready.watched(ProgressEvent("screening"), on_progress):
        time = timed(ready.examination.adapted, screen)
    counter = UserCounter("tokenizing", users, on_progress)
    unscreened = ready._replace(screens=(), near_copies=None)
    for some in chunks_of(users, _AT_ONCE):
        pairs = [pair for n in some if n not in chosen for pair in ready.pairs.of(range(n, n + 1))]
        if pairs:
            rows += prepare_users(unscreened, pairs).rows
        counter(some.stop)
    return ScreenedUsers(rows, time.of_all(len(chosen) / users, most_rows(ready)))


def _every(count: int, every: int) -> int:
    """One in how many of so many prompts is asked."""
    return max(1, min(every, count * every // _ASKED))


def most_rows(ready: Prepared) -> int:
    """Rows of a full decoding step."""
    adapted, longest = ready.examination.adapted, max(map(len, ready.examination.probes), default=1)
    return max(1, adapted.tokens_per_generation // (longest + ready.config.gate.max_new_tokens))


def screens_seconds(ready: Prepared, every: int) -> float:
    """Seconds in which `train` measures its screens on probes, where it has not done so for their thresholds."""
    if ready.config.screening.base != "answer":
        return 0.0
    probes = screened_probes(ready.policy, "dev")
    few = probes[:: _every(len(probes), every)]

    def measured() -> None:
        for calibrated in ready.screens:
            measure_screen(calibrated.screen, few, ready.policy.categories)

    return timed(ready.examination.adapted, measured).of_all(len(few) / max(1, len(probes)) or 1.0, most_rows(ready))


def base_answers_seconds(ready: Prepared, every: int) -> float:
    """Seconds in which the base answers the prompts of `basis`, and its pairs of answers are screened."""
    if ready.config.basis is None:
        return 0.0
    prompts = prompts_of(ready.config.basis)
    few = prompts[:: _every(len(prompts) * ANSWERS, every)]
    sampled = timed(ready.adapted, lambda: sampled_pairs(ready, few))
    return sampled.of_all(len(few) / len(prompts), most_rows(ready))


def with_stand_ins(basis: BasisSettings | None, users: Sequence[UserRows]) -> list[UserRows]:
    """The users with their own pairs in place of labelled ones, which are about as long."""
    count = 0 if basis is None else min(basis.pairs, len(prompts_of(basis)))
    return [user._replace(labelled=list(islice(cycle(user.train), count))) for user in users]


def sampled_constraint(ready: Prepared, every: int) -> SampledConstraint:
    """Constraint data from some of the train probes.

    Where the base refuses no sampled probe of a category, the longest answers stand in for its refusals.
    """
    config, policy = ready.config, ready.policy
    if not config.constraint.enabled:
        return SampledConstraint(None, 1.0, 0.0)
    probes = constraint_probes(policy, config.constraint)
    sizes = Counter(probe.category for probe in probes)
    least = max(1, _LEAST_EXAMPLES * EVERY // every)
    few = policy.sample(max(1, min(every, min(sizes.values(), default=1) // least)))
    few_probes = constraint_probes(few, config.constraint)
    share = len(few_probes) / max(1, len(probes)) or 1.0
    made = list[ConstraintData]()
    notice = None

    def make() -> None:
        nonlocal notice
        try:
            made.append(
                policy_constraint_data(ready.adapted, few, config.constraint, config.seed, config.gate.max_new_tokens)
            )
        except InputError as fault:
            if set(sizes) < {rule.category for rule in policy.restrictions}:
                raise
            made.append(_stand_in(ready, few))
            notice = f"Of {len(few_probes)} train probes: {fault.problems[0].sentence}"

    time = timed(ready.adapted, make)
    return SampledConstraint(made[0], share, time.of_all(share, most_rows(ready)), notice)


def _stand_in(ready: Prepared, policy: Policy) -> ConstraintData:
    """Constraint data as of a base that refuses every train probe, at the longest length."""
    tokenizer, token = ready.adapted.base.tokenizer, ready.adapted.base.eos_ids[0]
    limits = {rule.category: rule.limit for rule in policy.restrictions}
    refusal, opening = (token,) * ready.config.gate.max_new_tokens, (token,) * OPENING_LENGTH
    examples: dict[str, list[ConstraintExample]] = {category: [] for category in limits}
    for probe in (probe for probe in policy.probes("train") if probe.category in limits):
        prompt, twin = (
            None if text is None else prompt_ids((Message("user", text),), tokenizer)
            for text in (probe.prompt, probe.twin)
        )
        assert prompt is not None
        compliance, of_twin = (Row(prompt, opening), Row(twin, opening)) if twin else (None, None)
        examples[probe.category].append(ConstraintExample((Row(prompt, refusal),), compliance, of_twin))
    return ConstraintData(list(limits), list(limits.values()), list(examples.values()), [], [])


def judging_seconds(
    ready: Prepared,
    inputs: RunInputs,
    first: Sequence[UserRows],
    typical: Sequence[UserRows],
    users: int,
    every: int,
) -> float:
    """Seconds of judging and measuring all users, from a part of the prompts; the first user includes the base's
    answers, computed once for all. Answers that change are decoded beside that; see `row_answers.greedy_answers`."""
    full, every, rows = ready.examination, _every(len(ready.examination.probes), every), most_rows(ready)
    evaluator = _sampled_evaluator(ready, inputs, every)
    first, typical = ([user._replace(heldout=user.heldout[::every]) for user in cohort] for cohort in (first, typical))
    share = (len(evaluator.probes) + len(evaluator.harmless)) / max(1, len(full.probes) + len(full.harmless)) or 1.0
    once, again = (_judged(evaluator, cohort, full.gate.enabled).of_all(share, rows) for cohort in (first, typical))
    anew, device = [*evaluator.harmless, *evaluator.probes[::CHANGED]], full.base.device
    with full.adapted.using(torch.zeros(len(typical), full.adapted.params_per_user, device=device)):
        written = timed(full.adapted, partial(full.adapted.generate, [anew] * len(typical), full.gate.max_new_tokens))
    # with padding there are no timed steps, and no check has begun the answers
    more = written.decoding(share, rows) if written.rows else written.of_all(share, rows)
    return once + again / len(typical) * (users - 1) + more / len(typical) * users


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


def _judged(evaluator: Evaluator, users: Sequence[UserRows], gated: bool) -> SampledTime:
    """The time of judging a cohort of adapters without effect; where the run has a gate, with its side effects."""
    adapted = evaluator.adapted
    flat = torch.zeros(len(users), adapted.params_per_user, device=adapted.base.device)
    evaluator.forget_users()  # answers of other users with such an adapter would cost nothing

    def judge() -> None:
        evaluator.verdicts(flat, [evaluator.demands] * len(users))
        if gated:
            evaluator.side_effects(flat, torch.ones(len(users), device=flat.device))
        evaluator.measures(flat, users, [1.0] * len(users))

    return timed(adapted, judge)
