"""Answers of the base to ordinary prompts, sampled once for all users of a run: the pairs that their rewards label."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.config.training import BasisSettings
from persona_rlhf.data.pairs import Message, PreferencePair
from persona_rlhf.data.screening import fit, screen
from persona_rlhf.data.tokenize import by_user, prompt_ids, tokenize_readable, unreadable_prompts
from persona_rlhf.evaluation.prompt_sets import read_ordinary, some
from persona_rlhf.evaluation.refusals import answer_text
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.pipeline.prepare import Prepared
from persona_rlhf.pipeline.run_dir import RunDir
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.training.labelled_pairs import AnswerPool, answer_pool
from persona_rlhf.training.reward_basis import RewardBasis

ANSWERS = 4
"""Answers sampled per prompt; equal ones count once."""


class SampledAnswers(NamedTuple):
    """A prompt, and different finished answers of the base."""

    prompt: str
    answers: list[str]


def sampled_answers(adapted: AdaptedModel, prompts: Sequence[str], tokens: int, seed: int) -> list[SampledAnswers]:
    """Answers of up to `tokens` tokens at temperature 1. Prompts that the base cannot read are left out."""
    base = adapted.base
    pairs = [_pair(prompt, "", "", number) for number, prompt in enumerate(prompts)]
    unreadable = {fault.pair.prompt for fault in unreadable_prompts(pairs, base.tokenizer, base.context)}
    readable = [pair.prompt for pair in pairs if pair.prompt not in unreadable]
    tries = [ids for prompt in readable for ids in [prompt_ids(prompt, base.tokenizer)] * ANSWERS]
    with adapted.using(None):
        [written] = adapted.generate([tries], tokens, 1.0, seed)
    texts = [answer_text(adapted, answer) if answer.finished else "" for answer in written]
    groups = (texts[at : at + ANSWERS] for at in range(0, len(texts), ANSWERS))
    return [
        SampledAnswers(prompt[0].content, list(dict.fromkeys(filter(None, group))))
        for prompt, group in zip(readable, groups, strict=True)
    ]


def shared_answers(ready: Prepared, run_dir: RunDir, basis: RewardBasis, settings: BasisSettings) -> AnswerPool:
    """The pairs that all users of a run label, read from its folder, or sampled, screened and written to it.

    Raises InputError where no pair is left.
    """
    if not run_dir.answers.exists():
        sampled = sampled_pairs(ready, prompts_of(settings))
        kept = [[pair.prompt[0].content, pair.chosen, pair.rejected] for pair in sampled]
        run_dir.write(run_dir.answers, "".join(json.dumps(row) + "\n" for row in kept))
    rows = map(json.loads, run_dir.answers.read_text(encoding="utf-8").splitlines())
    pairs = [_pair(prompt, first, second, number) for number, (prompt, first, second) in enumerate(rows)]
    base = ready.adapted.base
    tokenized = tokenize_readable(pairs, base.tokenizer)
    fitted = fit(by_user(tokenized.rows), base.tokenizer, base.context).rows
    if not fitted or not fitted[0].train:
        sentence = "the base gives no two answers to any of these prompts that may be compared; name others"
        raise InputError([Problem(str(settings.prompts), None, "basis.prompts", sentence)])
    return answer_pool(basis, fitted[0].train, settings.pairs)


def prompts_of(settings: BasisSettings) -> list[str]:
    """The prompts that the base answers."""
    return some(read_ordinary(settings.prompts), settings.candidates or settings.pairs)


def sampled_pairs(ready: Prepared, prompts: Sequence[str]) -> list[PreferencePair]:
    """Answers of the base to prompts, as pairs that may be trained on."""
    tokens, seed = ready.config.gate.max_new_tokens, ready.config.seed
    return screened_pairs(ready, sampled_answers(ready.adapted, prompts, tokens, seed))


def screened_pairs(ready: Prepared, answered: Iterable[SampledAnswers]) -> list[PreferencePair]:
    """Pairs of different answers to a prompt that may be trained on in either order, screened as users' pairs are.

    A user's reward decides the order, so no pair has a refusal on either side: no reward can teach against refusals.
    """
    refuses = ready.judges.text_judge()
    usable = [
        SampledAnswers(prompt, [text for text in answers if not (is_refusal(text) or refuses(text))])
        for prompt, answers in answered
    ]
    texts = [(prompt, *both) for prompt, answers in usable for both in combinations(answers, 2)]
    pairs = [_pair(*row, number) for number, row in enumerate(texts)]
    turned = [replace(pair, user_id="turned", chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]
    settings = ready.config.screening.model_copy(update={"quarantine": True})
    screens = [calibrated.screen for calibrated in ready.screens]
    screened = screen([*pairs, *turned], ready.policy, settings, screens, None, ready.near_copies, refuses)
    left_out = {dropped.pair.line for dropped in screened.dropped}
    return [pair for pair in pairs if pair.line not in left_out]


def _pair(prompt: str, first: str, second: str, number: int) -> PreferencePair:
    """Two answers to a prompt, in no order and of no user."""
    return PreferencePair(
        "", (Message("user", prompt),), first, second, f"{number}", None, "the base", 1.0, "train", None, "", number
    )
