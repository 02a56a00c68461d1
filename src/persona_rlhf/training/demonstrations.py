"""What a base is aligned with: for every prompt the answer to learn, and the one to prefer it to. All is made here:
refusals are the model's own or a file's, harmless answers are the model's own. Nobody's preferences are in it."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.policy.refusal_texts import RefusalText, draw_refusal
from persona_rlhf.preferences.messages import Message
from persona_rlhf.preferences.tokens import Row, prompt_ids, text_row
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.generation import Generated


class Demonstration(NamedTuple):
    """Two answers to one prompt; `rejected` is None where the model has nothing to unlearn."""

    chosen: Row
    rejected: Row | None


class Demonstrations(NamedTuple):
    """`own`: hazardous ones with the model's own refusal. `left_out`: its refusals of harmless prompts."""

    hazardous: list[Demonstration]
    harmless: list[Demonstration]
    own: int
    left_out: int

    @property
    def every(self) -> list[Demonstration]:
        return [*self.hazardous, *self.harmless]


def make_demonstrations(
    adapted: AdaptedModel,
    probes: Sequence[Probe],
    ordinary: Sequence[str],
    refusals: Sequence[RefusalText],
    tries: int,
    max_new_tokens: int,
    seed: int,
) -> Demonstrations:
    """Demonstrations from probes of `train`, their benign twins and ordinary prompts.

    Answers are sampled at temperature 1, not greedy: what a model learns from fair samples of itself leaves it as it
    is, and greedy ones would sharpen it. Every prompt is asked and shown `tries` times. To a probe, a refusal of the
    model's own is chosen (else a written one, each time another) and a compliance rejected (else an answer to the twin,
    whose words are near). To a harmless prompt the model's own answer is chosen, cut where it was cut, and a written
    refusal rejected. Raises InputError where there are no train probes.
    """
    train = [probe for probe in probes if probe.split == "train"]
    if not train:
        raise InputError([Problem("policy", None, "documents", "no probe of the policy is of `train`; add some")])
    tokenizer, end = adapted.base.tokenizer, adapted.base.eos_ids[:1]
    rng = Random(f"demonstrations {seed}")
    harmless = list(dict.fromkeys([*(probe.twin for probe in train if probe.twin), *ordinary]))

    def ids(text: str) -> tuple[int, ...]:
        return prompt_ids((Message("user", text),), tokenizer)

    def refuses(answer: Generated) -> bool:
        return is_refusal(str(tokenizer.decode(list(answer.ids), skip_special_tokens=True)))

    def row(prompt: str, answer: Generated) -> Row:
        return Row(ids(prompt), answer.ids + (end if answer.finished else ()))

    def written(prompt: str, category: str | None) -> Row:
        return text_row(prompt, draw_refusal(refusals, category, rng), tokenizer)

    with adapted.using(None):
        asked = [ids(probe.prompt) for probe in train for _ in range(tries)]
        [to_probes] = adapted.generate([asked], max_new_tokens, 1.0, seed)
        asked = [ids(prompt) for prompt in harmless for _ in range(tries)]
        [to_harmless] = adapted.generate([asked], max_new_tokens, 1.0, seed + 1)
    answers: dict[str, list[Row]] = {}
    for n, prompt in enumerate(harmless):
        tried = to_harmless[n * tries : (n + 1) * tries]
        answers[prompt] = [row(prompt, answer) for answer in tried if answer.ids and not refuses(answer)]
    hazardous, own = [], 0
    for n, probe in enumerate(train):
        tried = to_probes[n * tries : (n + 1) * tries]
        refused = [row(probe.prompt, answer) for answer in tried if answer.finished and refuses(answer)]
        complied = [row(probe.prompt, answer) for answer in tried if answer.ids and not refuses(answer)]
        stand_ins = [Row(ids(probe.prompt), twin.completion) for twin in answers.get(probe.twin or "", [])]
        rejected = complied or stand_ins
        for turn in range(tries):
            chosen = refused[turn % len(refused)] if refused else written(probe.prompt, probe.category)
            hazardous.append(Demonstration(chosen, rejected[turn % len(rejected)] if rejected else None))
        own += tries * bool(refused)
    kept = [Demonstration(one, written(prompt, None)) for prompt, several in answers.items() for one in several]
    context, left_out = adapted.base.context, len(harmless) * tries - len(kept)
    return Demonstrations(_fitting(hazardous, context), _fitting(kept, context), own, left_out)


def _fitting(demonstrations: Sequence[Demonstration], context: int) -> list[Demonstration]:
    """Without what is longer than the base's context."""
    return [
        Demonstration(chosen, rejected if rejected and rejected.length <= context else None)
        for chosen, rejected in demonstrations
        if chosen.length <= context
    ]
