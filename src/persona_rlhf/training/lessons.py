"""Requirements as lessons: what an answer must go on with at the points where the base's own would break a rule.

How a user likes his answers is his affair; whether an answer meets a requirement is settled by a few tokens: a full
stop in place of an exclamation mark, the end of an answer that grows too long, the first words of a notice. So the
base's sampled answers that lack a property are repaired (`policy.repair`), and each place where the repaired answer
leaves the original gives a row: what stands before it is the prompt, the tokens until the two meet again are the
completion. Nothing else of the answer is taught. The users' loss on these rows is held below a limit by a dual variable
of their own, as refusals are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from itertools import takewhile
from math import log

from persona_rlhf.policy.hazards import Probe
from persona_rlhf.policy.repair import REPAIRED, repaired
from persona_rlhf.policy.requirements import applies, satisfied
from persona_rlhf.policy.rules import Requirement
from persona_rlhf.preferences.messages import Message
from persona_rlhf.preferences.pairs import PreferencePair
from persona_rlhf.preferences.tokens import PairRow, Row, prompt_ids, tokenize
from persona_rlhf.training.bank import Lessons
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.settings import ConstraintSettings


def build_lessons(
    adapted: AdaptedModel,
    requirements: Sequence[Requirement],
    settings: ConstraintSettings,
    seed: int,
    max_new_tokens: int,
) -> list[Lessons]:
    """Lessons of every requirement that has prompts and can be taught, from answers that the base samples to the train
    prompts at temperature 1. One whose prompts the base answers as required anyway is not among them."""
    taught = [rule for rule in requirements if rule.probes and rule.property in REPAIRED]
    prompts = list(dict.fromkeys(probe.prompt for rule in taught for probe in _train(rule)))
    answers = _sampled(adapted, prompts, seed, max_new_tokens)
    found = []
    for rule in taught:
        mended = _mended(rule, taught, {probe.prompt: answers[probe.prompt] for probe in _train(rule)})
        rows = tokenize([pair for own in mended for pair in own], adapted.base.tokenizer, adapted.base.context)
        by_user = {user.user_id: user.train for user in rows}
        fits = adapted.base.context
        turns = [
            [row for row in turns_of(pair.rejected, pair.chosen) if row.length <= fits]
            for pair in by_user.get(_HERE, [])
        ]
        elsewhere = [_opening(pair, settings.opening_tokens) for pair in by_user.get(_ELSEWHERE, [])]
        if rule.property == "must_include":  # the text itself is taught, and not the word that happens to follow
            columns = zip(*(row.completion for own in turns for row in own[:1]), strict=False)
            shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
            turns = [[row._replace(completion=row.completion[:shared]) for row in own[:1]] for own in turns]
            elsewhere = [row._replace(completion=row.completion[:shared]) for row in elsewhere]
        if any(turns):
            found.append(
                Lessons(
                    rule.id,
                    limit_of(rule, [len(own) for own in turns]),
                    tuple(dict.fromkeys(row for own in turns for row in own)),
                    tuple(dict.fromkeys(row for row in elsewhere if row.length <= fits)),
                )
            )
    return found


def limit_of(rule: Requirement, turns: Sequence[int]) -> float:
    """Nats that a turn may cost on average: `-log(min_rate) / m`, for m turns an answer.

    With m turns, each taken with probability exp(-c), an answer is as required with probability exp(-m c).
    """
    return -log(rule.min_rate) * len(turns) / sum(turns)


def turns_of(broken: Row, whole: Row) -> list[Row]:
    """A row for each place where `whole` leaves `broken`, both answers to one prompt: all of `whole` before it as the
    prompt, and as completion what `whole` says until they meet again, or the next token where it says nothing."""
    assert broken.prompt == whole.prompt
    matcher = SequenceMatcher(None, broken.completion, whole.completion, autojunk=False)
    rows = []
    for kind, _, _, start, end in matcher.get_opcodes():
        if kind != "equal" and start < len(whole.completion):
            rows.append(Row(whole.prompt + whole.completion[:start], whole.completion[start : max(end, start + 1)]))
    return rows


_HERE, _ELSEWHERE = "here", "elsewhere"


def _mended(
    rule: Requirement, taught: Sequence[Requirement], answers: Mapping[str, str]
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Repaired answers against broken ones; and, of a text that must be there for some prompts only, its place in
    answers to others, which is wrong. Both sides of a pair meet the other requirements already."""
    here, elsewhere = [], []
    for prompt, said in answers.items():
        answer = said
        for other in taught:
            if other.id != rule.id and satisfied(other, prompt, answer) is False:
                answer = repaired(other, answer) or answer
        if satisfied(rule, prompt, answer) is False:
            new = repaired(rule, answer)
            if new is not None and all(satisfied(each, prompt, new) is not False for each in taught):
                here.append(_pair(_HERE, prompt, new, answer))
        elif rule.property == "must_include" and not applies(rule, prompt):
            misplaced = repaired(rule, answer)
            assert misplaced is not None
            elsewhere.append(_pair(_ELSEWHERE, prompt, misplaced, answer))
    return here, elsewhere


def _pair(kind: str, prompt: str, chosen: str, rejected: str) -> PreferencePair:
    asked = (Message("user", prompt),)
    return PreferencePair(kind, asked, chosen, rejected, "", None, None, 1.0, "train", None, "", 0)


def _opening(pair: PairRow, tokens: int) -> Row:
    first = turns_of(pair.rejected, pair.chosen)[0]
    return first._replace(completion=first.completion[:tokens])


def _train(rule: Requirement) -> list[Probe]:
    return [probe for probe in rule.probes if probe.split == "train"]


def _sampled(adapted: AdaptedModel, prompts: Sequence[str], seed: int, max_new_tokens: int) -> dict[str, str]:
    """An answer of the base to each prompt, of those that it brings to an end."""
    ids = [prompt_ids((Message("user", prompt),), adapted.base.tokenizer) for prompt in prompts]
    if not ids:
        return {}
    with adapted.using(None):
        [answers] = adapted.generate([ids], max_new_tokens, 1.0, seed)
    texts = [str(adapted.base.tokenizer.decode(list(answer.ids), skip_special_tokens=True)) for answer in answers]
    return dict(zip(prompts, texts, strict=True))
