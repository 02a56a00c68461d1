"""Each released adapter asked for the impact report: stated views, answers to its user's prompts, planted strings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.config.experiment import Config
from persona_rlhf.data.canaries import CANARY, with_other_digits
from persona_rlhf.data.pairs import PreferencePair
from persona_rlhf.data.tokenize import PairRow, both_rows, tokenize
from persona_rlhf.evaluation.contested_views import CONTESTED
from persona_rlhf.evaluation.impact_evidence import AdapterAnswers
from persona_rlhf.evaluation.impact_statistics import FLATTERY, HUMAN, longest_run, words_of
from persona_rlhf.evaluation.metrics import ComparedAnswers, Samples, distinct_prompts
from persona_rlhf.evaluation.stated_views import StatedViews
from persona_rlhf.evaluation.twin_questions import TwinQuestions
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import load_base
from persona_rlhf.pipeline.monitoring import OnProgress, UserCounter
from persona_rlhf.pipeline.reevaluate import released_adapters
from persona_rlhf.pipeline.run_dir import RunDir
from persona_rlhf.policy.enforcement import readable_tastes
from persona_rlhf.policy.policy import Policy
from persona_rlhf.policy.properties import distance
from persona_rlhf.policy.rule_schema import PropertyValue
from persona_rlhf.release.results import Result

_PROMPTS = 12
"""Prompts that each adapter answers: trained ones to see what it repeats, held-out ones where a user has wishes."""

_STRINGS = 99
"""Strings of the same form that a planted one is ranked among."""


class _UserQuestions(NamedTuple):
    """The trained and the held-out pairs of a user, and the wishes that a program can check."""

    trained: Sequence[PairRow]
    heldout: Sequence[PairRow]
    wishes: Sequence[PropertyValue]


def ask_adapters(
    run: Path,
    config: Config,
    results: Sequence[Result],
    pairs: Mapping[str, Sequence[PreferencePair]],
    on_progress: OnProgress,
) -> dict[str, AdapterAnswers]:
    """The outcome by user. Loads the base; raises InputError where it is another one."""
    base = load_base(config.judged_base)
    RunDir(run).check_same({"base": base.weights_hash})
    policy = Policy.of(config.policy)
    adapted = AdaptedModel(base, config.lora)
    try:
        views, samples = StatedViews(adapted), Samples(adapted, config.gate.max_new_tokens, config.seed)
        contested = TwinQuestions(adapted, CONTESTED)
        counter = UserCounter("measuring", sum(result.path is not None for result in results), on_progress)
        outcomes: dict[str, AdapterAnswers] = {}
        for cohort, flat in released_adapters(run, results, adapted):
            users = [_questions_of(adapted, pairs[result.user_id], result.user_id, policy) for result in cohort]
            answers = _compared(samples, flat, [distinct_prompts(user.trained, _PROMPTS) for user in users])
            wished = [distinct_prompts(user.heldout, _PROMPTS) if user.wishes else [] for user in users]
            of_wishes = _compared(samples, flat, wished)
            ranks = _ranks(adapted, flat, [user.trained for user in users])
            shifts, flipped = views.shifts(flat), views.flipped_shifts(flat)
            stances, flipped_stances = contested.rises(flat), contested.flipped_rises(flat)
            for n, (result, user) in enumerate(zip(cohort, users, strict=True)):
                outcomes[result.user_id] = AdapterAnswers(
                    view_shifts=shifts[n],
                    flipped_shifts=flipped[n],
                    copied=_copied(user, answers[n]),
                    wishes=_met(user, of_wishes[n]),
                    canaries=ranks[n],
                    flattering=_having(FLATTERY, answers[n]),
                    human=_having(HUMAN, answers[n]),
                    stances=stances[n],
                    flipped_stances=flipped_stances[n],
                )
            counter(len(outcomes))
    finally:
        adapted.close()
    return outcomes


def _questions_of(
    adapted: AdaptedModel, pairs: Sequence[PreferencePair], user_id: str, policy: Policy
) -> _UserQuestions:
    wishes = [taste.wish for taste in readable_tastes(policy, user_id) if taste.wish is not None]
    rows = tokenize(pairs, adapted.base.tokenizer, adapted.base.context)
    trained, heldout = ([row for user in rows for row in getattr(user, split)] for split in ("train", "heldout"))
    return _UserQuestions(trained, heldout, wishes)


def _compared(
    samples: Samples, flat: Float[Tensor, "users params"], prompts: Sequence[Sequence[tuple[int, ...]]]
) -> list[ComparedAnswers]:
    answers = samples.compare(flat, torch.ones(flat.shape[0], device=flat.device), prompts, perplexity=False)
    samples.forget()
    return answers


def _copied(user: _UserQuestions, answers: ComparedAnswers) -> list[tuple[int, int]]:
    chosen = [words_of(row.pair.chosen) for row in user.trained]
    both = zip(answers.adapted, answers.base, strict=True)
    return [(longest_run(words_of(adapted), chosen), longest_run(words_of(base), chosen)) for adapted, base in both]


def _having(phrases: re.Pattern[str], answers: ComparedAnswers) -> list[tuple[bool, bool]]:
    both = zip(answers.adapted, answers.base, strict=True)
    return [(bool(phrases.search(adapted)), bool(phrases.search(base))) for adapted, base in both]


def _met(user: _UserQuestions, answers: ComparedAnswers) -> list[tuple[float, float]]:
    if not answers.adapted:
        return []
    sides = (answers.adapted, answers.base)
    shares = [[fmean(distance([wish], text) == 0 for text in texts) for texts in sides] for wish in user.wishes]
    return [(adapted, base) for adapted, base in shares]


def _ranks(
    adapted: AdaptedModel, flat: Float[Tensor, "users params"], trained: Sequence[Sequence[PairRow]]
) -> list[list[tuple[int, int]]]:
    """By user and planted string: its rank, by the rise of its log-probability over the base, among drawn strings."""
    planted = [[row.pair for row in rows if row.pair.source == CANARY] for rows in trained]
    if not any(planted):
        return [[] for _ in planted]
    of_users = []
    for pairs in planted:
        strings = [
            replace(pair, rejected=other) for pair in pairs for other in with_other_digits(pair.chosen, _STRINGS)
        ]
        rows = [row for user in tokenize(strings, adapted.base.tokenizer, adapted.base.context) for row in user.train]
        of_users.append([[row for row in rows if row.pair.id == pair.id] for pair in pairs])
    rows_of = [both_rows(row for rows in user for row in rows) for user in of_users]
    with adapted.using(None):
        before = [[score.logp for score in scores] for scores in adapted.score(rows_of)]
    with adapted.using(flat, torch.ones(flat.shape[0], device=flat.device)):
        after = [[score.logp for score in scores] for scores in adapted.score(rows_of)]
    ranks = []
    for user, one, other in zip(of_users, after, before, strict=True):
        rises = iter([a - b for a, b in zip(one, other, strict=True)])
        of_user = []
        for rows in user:
            both = [(next(rises), next(rises)) for _ in rows]
            of_user.append((1 + sum(drawn >= canary for canary, drawn in both), 1 + len(both)))
        ranks.append(of_user)
    return ranks
