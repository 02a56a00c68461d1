"""Requirements as lessons: what an answer must go on with at the points where the base's own would break a rule.

How a user likes his answers is his affair; whether an answer meets a requirement is settled by a few tokens: a full
stop in place of an exclamation mark, the end of an answer that grows too long, the first words of a notice. So the
base's sampled answers that lack a property are repaired (`policy.repair`), and each place where the repaired answer
leaves the original gives a row: what stands before it is the prompt, the tokens until the two meet again are the
completion. Nothing else of the answer is taught. The users' loss on these rows is held below a limit by a dual variable
of their own, as refusals are.

A mark or word of one token that must not appear is different: it may come at many places, of which a sampled answer
shows one or two. So there the rows are all places of the repaired answers where the base itself would be tempted, and
their completion is the wrong turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from itertools import takewhile
from math import log
from statistics import fmean
from typing import NamedTuple

import torch

from persona_rlhf.config.training import ConstraintSettings
from persona_rlhf.data.pairs import Message, PreferencePair
from persona_rlhf.data.tokenize import Row, prompt_ids, tokenize
from persona_rlhf.models.adapted_model import AdaptedModel, PassRows, run_in_passes
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.policy.judges import folded
from persona_rlhf.policy.properties import REPAIRED, applies, repaired, required, satisfied
from persona_rlhf.policy.rules import Requirement
from persona_rlhf.training.constraint import OPENING_LENGTH, RequirementExamples

_TEMPTED = 0.01  # the probability from which on a place counts


class RequirementData(NamedTuple):
    """Lessons by requirement, and the base's answers to their prompts as all requirements together want them."""

    lessons: list[RequirementExamples]
    answers: list[Row]


def build_requirement_data(
    adapted: AdaptedModel,
    requirements: Sequence[Requirement],
    settings: ConstraintSettings,
    seed: int,
    max_new_tokens: int,
) -> RequirementData:
    """Lessons of every requirement that has prompts and can be taught, from answers that the base samples to the train
    prompts at temperature 1. One whose prompts the base answers as required anyway is not among them."""
    rules = [rule for rule in requirements if rule.probes and rule.property in REPAIRED]
    prompts = list(dict.fromkeys(probe.prompt for rule in rules for probe in _train(rule)))
    said = _sampled(adapted, prompts, seed, max_new_tokens)
    met, found = _wanted(rules, said), list[RequirementExamples]()
    for rule in rules:
        here, elsewhere = _mended(rule, rules, {probe.prompt: said[probe.prompt] for probe in _train(rule)}, met)
        rows, misplaced = (_rows(adapted, pairs) for pairs in (here, elsewhere))
        text, first = _shared([whole for _, whole in rows]), required(rule).edit == "prepend"
        wrong, barred = required(rule).edit == "remove", barred_tokens(adapted, rule)
        if barred:
            asked = [_pair(p.prompt, met[p.prompt], said[p.prompt]) for p in _train(rule) if p.prompt in met]
            turns = tempted(adapted, [whole for _, whole in _rows(adapted, asked)], barred)
        else:
            turns = [[_cut(whole, text)] if first else turns_of(broken, whole, wrong) for broken, whole in rows]
        if any(turns):
            found.append(
                RequirementExamples(
                    rule.id,
                    -log(rule.aim()),
                    tuple(dict.fromkeys(row for own in turns for row in own)),
                    tuple(dict.fromkeys(_cut(whole, min(text, OPENING_LENGTH)) for _, whole in misplaced)),
                    wrong,
                    fmean(map(len, turns)),
                )
            )
    wanted = [_pair(prompt, answer, said[prompt]) for prompt, answer in met.items()] if found else []
    return RequirementData(found, [whole for _, whole in _rows(adapted, wanted)])


def turns_of(broken: Row, whole: Row, wrong: bool = False) -> list[Row]:
    """A row for each place where `whole` leaves `broken`, both answers to one prompt: all of `whole` before it as the
    prompt, and as completion what `whole` says until they meet again, or its next token where it says nothing.

    With `wrong`, the completion is what `broken` says there. It is the turn to teach where many others are right.
    """
    assert broken.prompt == whole.prompt
    found, matcher = [], SequenceMatcher(None, broken.completion, whole.completion, False)
    for kind, first, last, start, end in matcher.get_opcodes():
        if kind == "equal":
            continue
        said = broken.completion[first:last] if wrong else whole.completion[start : max(end, start + 1)]
        if said:
            found.append(Row(whole.prompt + whole.completion[:start], said))
    return found


def barred_tokens(adapted: AdaptedModel, rule: Requirement) -> list[int]:
    """The tokens that break a rule wherever they appear; none where it takes several, or no token can."""
    if required(rule).edit != "remove":
        return []
    tokenizer, value = adapted.base.tokenizer, folded(str(rule.value))
    ordinary = set(range(len(tokenizer))) - set(tokenizer.all_special_ids)
    return [token for token in sorted(ordinary) if value in folded(str(tokenizer.decode([token])))]


@torch.no_grad()
def tempted(adapted: AdaptedModel, rows: Sequence[Row], tokens: Sequence[int]) -> list[list[Row]]:
    """By row, the places where the base would say one of these tokens with a probability of `_TEMPTED` at least: what
    stands before it as the prompt, the likeliest of the tokens as the completion.

    An answer without any of them has the probability `prod(1 - p)` over its places, so the unlikelihood of these turns,
    summed over an answer, is the loss of meeting the rule, but for what lies below the threshold.
    """
    found: list[list[Row]] = [[] for _ in rows]
    barred = torch.tensor(tokens, device=adapted.base.device)

    def run(places: PassRows) -> None:
        picked = [rows[place] for _, place in places if place is not None]
        batch = adapted.batch(picked, 1)
        odds = adapted.logits(batch).float().softmax(-1)[:, barred]
        chances = batch.to_grid(odds.sum(-1)).tolist()
        likeliest = batch.to_grid(barred[odds.argmax(-1)].double()).long().tolist()
        for (_, place), row, own, which in zip(places, picked, chances, likeliest, strict=True):
            assert place is not None  # one user fills nothing
            said = row.prompt + row.completion
            found[place] = [
                Row(said[: len(row.prompt) + n], (which[n],)) for n in range(len(row.completion)) if own[n] >= _TEMPTED
            ]

    with adapted.using(None):
        run_in_passes([rows], adapted.tokens_per_pass, run)
    return found


def _mended(
    rule: Requirement, rules: Sequence[Requirement], said: Mapping[str, str], whole: Mapping[str, str]
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Repaired answers against broken ones; and, of a text that must be there for some prompts only, its place in
    answers to others, which is wrong. Both sides of a pair meet the other requirements already; `whole` are the answers
    that meet them all."""
    here, elsewhere = [], []
    others = [other for other in rules if other.id != rule.id]
    for prompt, answer in _wanted(others, said).items():
        if satisfied(rule, prompt, answer) is False and prompt in whole:
            here.append(_pair(prompt, whole[prompt], answer))
        elif required(rule).edit == "prepend" and not applies(rule, prompt):
            misplaced = repaired(rule, answer)
            assert misplaced is not None
            elsewhere.append(_pair(prompt, misplaced, answer))
    return here, elsewhere


def _wanted(rules: Sequence[Requirement], said: Mapping[str, str]) -> dict[str, str]:
    """The answers, repaired by every rule whose property they lack; those that no change mends are left out. A repair
    may call for another (a notice makes an answer longer), so the rules are gone through as often as there are any."""
    found = {}
    for prompt, answer in said.items():
        for rule in list(rules) * len(rules):
            if satisfied(rule, prompt, answer) is False:
                answer = repaired(rule, answer) or answer
        if all(satisfied(rule, prompt, answer) is not False for rule in rules):
            found[prompt] = answer
    return found


def _pair(prompt: str, chosen: str, rejected: str) -> PreferencePair:
    return PreferencePair("", (Message("user", prompt),), chosen, rejected, "", None, None, 1.0, "train", None, "", 0)


def _rows(adapted: AdaptedModel, pairs: Sequence[PreferencePair]) -> list[tuple[Row, Row]]:
    """The rows of each pair, the rejected one first; those that the base's context does not hold are left out."""
    found = [pair for user in tokenize(pairs, adapted.base.tokenizer, adapted.base.context) for pair in user.train]
    fits = adapted.base.context
    return [(p.rejected, p.chosen) for p in found if max(p.rejected.length, p.chosen.length) <= fits]


def _shared(rows: Sequence[Row]) -> int:
    """Tokens that all completions begin with: those of a text that must be there, without the word that follows it."""
    columns = zip(*(row.completion for row in rows), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _cut(row: Row, tokens: int) -> Row:
    return row._replace(completion=row.completion[:tokens])


def _train(rule: Requirement) -> list[Probe]:
    return [probe for probe in rule.probes if probe.split == "train"]


def _sampled(adapted: AdaptedModel, prompts: Sequence[str], seed: int, max_new_tokens: int) -> dict[str, str]:
    """An answer of the base to each prompt; one that grows too long is cut off."""
    ids = [prompt_ids((Message("user", prompt),), adapted.base.tokenizer) for prompt in prompts]
    if not ids:
        return {}
    with adapted.using(None):
        [answers] = adapted.generate([ids], max_new_tokens, 1.0, seed)
    texts = [str(adapted.base.tokenizer.decode(list(a.ids), skip_special_tokens=True)).strip() for a in answers]
    return dict(zip(prompts, texts, strict=True))
