"""Requirement examples: token rows at the few places that decide whether an answer of the base meets a requirement.

A few tokens settle a requirement: a full stop in place of an exclamation mark, the end of an answer that grows too
long, the first words of a notice. So the base's sampled answers that lack a property are repaired
(`policy.properties`). Each place where the repaired answer leaves the original gives a row. Its prompt is all text
before that place; its completion is the tokens until the two answers meet again. The rest of the answer is left to the
user's preferences. A dual variable per user and requirement holds the loss on these rows below a limit.

A forbidden mark or word of one token may come at many places, and a sampled answer shows one or two. So its rows are
all places of the repaired answers where the base might say it. They are unlikelihood examples: their completion is the
forbidden token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from itertools import takewhile
from math import log
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from persona_rlhf.data.pairs import Message, PreferencePair
from persona_rlhf.data.tokenize import Row, prompt_ids, tokenize
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.passes import PassRows, run_in_passes
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.policy.judges import folded
from persona_rlhf.policy.properties import REPAIRED, applies, repaired, required, satisfied
from persona_rlhf.policy.rules import Requirement
from persona_rlhf.training.constraint import OPENING_LENGTH, RequirementExamples

_LIKELY = 0.01  # least probability of a forbidden token that makes a place an example


class RequirementData(NamedTuple):
    """Examples by requirement, and the base's answers to their prompts, repaired to meet all requirements."""

    examples: list[RequirementExamples]
    answers: list[Row]


def build_requirement_data(
    adapted: AdaptedModel,
    requirements: Sequence[Requirement],
    seed: int,
    max_new_tokens: int,
) -> RequirementData:
    """Examples of every requirement that has prompts and can be taught.

    The base samples an answer to each train prompt at temperature 1. A requirement that all these answers meet anyway
    has no examples and is left out.
    """
    rules = [rule for rule in requirements if rule.probes and rule.property in REPAIRED]
    prompts = list(dict.fromkeys(probe.prompt for rule in rules for probe in _train(rule)))
    answers = _sampled(adapted, prompts, seed, max_new_tokens)
    repairs, examples = _repaired(rules, answers), list[RequirementExamples]()
    for rule in rules:
        rule_answers = {probe.prompt: answers[probe.prompt] for probe in _train(rule)}
        here, elsewhere = _pairs_of(rule, rules, rule_answers, repairs)
        rows, misplaced = (_rows(adapted, pairs) for pairs in (here, elsewhere))
        text, included = _shared([whole for _, whole in rows]), required(rule).edit == "prepend"
        unlikelihood, forbidden = required(rule).edit == "remove", forbidden_tokens(adapted, rule)
        if forbidden:
            pairs = [_pair(p, repairs[p], answer) for p, answer in rule_answers.items() if p in repairs]
            by_answer = likely_places(adapted, [whole for _, whole in _rows(adapted, pairs)], forbidden)
        elif included:
            by_answer = [[_cut(whole, text)] for _, whole in rows]
        else:
            by_answer = [differences(broken, whole, unlikelihood) for broken, whole in rows]
        if any(by_answer):
            examples.append(
                RequirementExamples(
                    rule.id,
                    -log(rule.aim()),
                    tuple(dict.fromkeys(row for rows in by_answer for row in rows)),
                    tuple(dict.fromkeys(_cut(whole, min(text, OPENING_LENGTH)) for _, whole in misplaced)),
                    unlikelihood,
                    fmean(map(len, by_answer)),
                )
            )
    pairs = [_pair(prompt, repair, answers[prompt]) for prompt, repair in repairs.items()] if examples else []
    return RequirementData(examples, [whole for _, whole in _rows(adapted, pairs)])


def differences(broken: Row, whole: Row, unlikelihood: bool = False) -> list[Row]:
    """A row for each place where `whole` leaves `broken`, both answers to one prompt.

    Its prompt is all of `whole` before that place. Its completion is the tokens of `whole` until the two meet again, or
    the next token of `whole` if `broken` only has more. With `unlikelihood` it is the tokens of `broken` there, for a
    place where many other tokens are right.
    """
    assert broken.prompt == whole.prompt
    rows, matcher = [], SequenceMatcher(None, broken.completion, whole.completion, False)
    for kind, first, last, start, end in matcher.get_opcodes():
        if kind == "equal":
            continue
        tokens = broken.completion[first:last] if unlikelihood else whole.completion[start : max(end, start + 1)]
        if tokens:
            rows.append(Row(whole.prompt + whole.completion[:start], tokens))
    return rows


def forbidden_tokens(adapted: AdaptedModel, rule: Requirement) -> list[int]:
    """The tokens that break a rule wherever they appear; none if several tokens, or none, make the forbidden text."""
    if required(rule).edit != "remove":
        return []
    tokenizer, value = adapted.base.tokenizer, folded(str(rule.value))
    ordinary = set(range(len(tokenizer))) - set(tokenizer.all_special_ids)
    return [token for token in sorted(ordinary) if value in folded(str(tokenizer.decode([token])))]


@torch.no_grad()
def likely_places(adapted: AdaptedModel, rows: Sequence[Row], tokens: Sequence[int]) -> list[list[Row]]:
    """By row, the places where the base says one of these tokens with a probability of at least `_LIKELY`.

    Each place is a row: all tokens before it are the prompt, the likeliest of `tokens` is the completion. An answer
    without any of them has the probability `prod(1 - p)` over its places. So the unlikelihood of these rows, summed
    over an answer, is the loss of meeting the rule, except for places below the threshold.
    """
    places_of: list[list[Row]] = [[] for _ in rows]
    forbidden = torch.tensor(tokens, device=adapted.base.device)

    def chances_of(logits: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        odds = logits.float().softmax(-1)[:, forbidden]
        return odds.sum(-1), forbidden[odds.argmax(-1)]

    def run(places: PassRows) -> None:
        picked = [rows[place] for _, place in places if place is not None]
        batch = adapted.batch(picked, 1)
        odds, picks = adapted.by_token(batch, chances_of)
        chances = batch.to_grid(odds).tolist()
        likeliest = batch.to_grid(picks.double()).long().tolist()
        for (_, place), row, chance, token in zip(places, picked, chances, likeliest, strict=True):
            assert place is not None  # a lone user's pass has no empty place
            ids = row.prompt + row.completion
            positions = [n for n in range(len(row.completion)) if chance[n] >= _LIKELY]
            places_of[place] = [Row(ids[: len(row.prompt) + n], (token[n],)) for n in positions]

    with adapted.using(None):
        adapted.tokens_per_pass = run_in_passes([rows], adapted.tokens_per_pass, run)
    return places_of


def _pairs_of(
    rule: Requirement, rules: Sequence[Requirement], answers: Mapping[str, str], repairs: Mapping[str, str]
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Repaired answers preferred to broken ones; and answers with a text that other prompts demand and theirs does not,
    preferred to those without it.

    Both sides of a pair meet the other requirements already; `repairs` are the answers that meet all of them.
    """
    here, elsewhere = [], []
    others = [other for other in rules if other.id != rule.id]
    for prompt, answer in _repaired(others, answers).items():
        if satisfied(rule, prompt, answer) is False and prompt in repairs:
            here.append(_pair(prompt, repairs[prompt], answer))
        elif required(rule).edit == "prepend" and not applies(rule, prompt):
            misplaced = repaired(rule, answer)
            assert misplaced is not None
            elsewhere.append(_pair(prompt, misplaced, answer))
    return here, elsewhere


def _repaired(rules: Sequence[Requirement], answers: Mapping[str, str]) -> dict[str, str]:
    """The answers, repaired by every rule that they break; answers that no repair mends are left out.

    A repair may call for another (a notice makes an answer longer), so all rules are applied as often as there are any.
    """
    repairs = {}
    for prompt, answer in answers.items():
        for rule in list(rules) * len(rules):
            if satisfied(rule, prompt, answer) is False:
                answer = repaired(rule, answer) or answer
        if all(satisfied(rule, prompt, answer) is not False for rule in rules):
            repairs[prompt] = answer
    return repairs


def _pair(prompt: str, chosen: str, rejected: str) -> PreferencePair:
    return PreferencePair("", (Message("user", prompt),), chosen, rejected, "", None, None, 1.0, "train", None, "", 0)


def _rows(adapted: AdaptedModel, pairs: Sequence[PreferencePair]) -> list[tuple[Row, Row]]:
    """The rows of each pair, the rejected one first; pairs longer than the base's context are left out."""
    context = adapted.base.context
    tokenized = [pair for user in tokenize(pairs, adapted.base.tokenizer, context) for pair in user.train]
    return [(p.rejected, p.chosen) for p in tokenized if max(p.rejected.length, p.chosen.length) <= context]


def _shared(rows: Sequence[Row]) -> int:
    """The number of tokens that all completions begin with: a required text, without the word that follows it."""
    columns = zip(*(row.completion for row in rows), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _cut(row: Row, tokens: int) -> Row:
    return row._replace(completion=row.completion[:tokens])


def _train(rule: Requirement) -> list[Probe]:
    return [probe for probe in rule.probes if probe.split == "train"]


def _sampled(adapted: AdaptedModel, prompts: Sequence[str], seed: int, max_new_tokens: int) -> dict[str, str]:
    """An answer of the base to each prompt, cut after `max_new_tokens`."""
    ids = [prompt_ids((Message("user", prompt),), adapted.base.tokenizer) for prompt in prompts]
    if not ids:
        return {}
    with adapted.using(None):
        [answers] = adapted.generate([ids], max_new_tokens, 1.0, seed)
    texts = [str(adapted.base.tokenizer.decode(list(a.ids), skip_special_tokens=True)).strip() for a in answers]
    return dict(zip(prompts, texts, strict=True))
