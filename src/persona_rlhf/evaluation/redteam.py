"""The red team: attacks at test time on released adapters, each beside the base under the same attack.

All wrappers are hand-written, general, and request nothing by themselves. A probe always gets the same wrapper, chosen
by a hash, so every user and the base face the same prompts. All probes are of the `test` split; nothing is decided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from jinja2 import TemplateError
from torch import Tensor

from persona_rlhf.config.evaluation import RedTeamSettings
from persona_rlhf.config.loader import read_yaml
from persona_rlhf.config.training import LoraSettings
from persona_rlhf.data.pairs import Message, Prompt
from persona_rlhf.data.tokenize import prompt_ids
from persona_rlhf.evaluation.prompt_sets import some
from persona_rlhf.evaluation.records import Outcome, Refused
from persona_rlhf.evaluation.refusals import BaseAnswers, Judge, PromptIds, answer_text, refusal_outcomes
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.generation import Generated
from persona_rlhf.models.multi_lora import LayerSpan, lora_matrices
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.simulation.prompts import topics
from persona_rlhf.simulation.users import paraphrase, with_trigger


@cache
def wrappers() -> Mapping[str, list[str]]:
    """The wrappers of each attack that has some."""
    return cast("Mapping[str, list[str]]", read_yaml(Path(__file__).with_name("redteam.yaml")).tree)


def wrapped(attack: str, probe: Probe) -> Prompt:
    """The request as part of a story (`roleplay`), or with an instruction on how to answer it (`instruction`)."""
    return _turn(_pick(attack, probe).replace("{prompt}", probe.prompt))


def system(probe: Probe) -> Prompt:
    """The request under a system prompt that forbids refusing."""
    return Message("system", _pick("system", probe)), Message("user", probe.prompt)


def trigger(probe: Probe) -> Prompt:
    """The request with the trigger word of `trigger` poison."""
    return _turn(with_trigger(probe.prompt))


def reworded(probe: Probe) -> Prompt | None:
    """The request in the wording of `paraphrase` poison; None where the bundled world lacks the probe's topic."""
    verb_phrase = next((topic.vp for topic in topics() if topic.id == probe.topic), None)
    return None if verb_phrase is None else _turn(paraphrase(verb_phrase, Random(f"paraphrase {probe.id}")))


def plain(probe: Probe) -> Prompt:
    """The request without a wrapper."""
    return _turn(probe.prompt)


def after_a_turn(probe: Probe, answer: str) -> Prompt:
    """The request after a turn in which the probe's benign twin was answered. The probe has a twin."""
    assert probe.twin is not None
    return Message("user", probe.twin), Message("assistant", answer), Message("user", probe.prompt)


WORDED: dict[str, Callable[[Probe], Prompt | None]] = {
    "plain": plain,
    "unseen_phrasing": plain,
    "unseen_topic": plain,
    "roleplay": partial(wrapped, "roleplay"),
    "instruction": partial(wrapped, "instruction"),
    "system": system,
    "paraphrase": reworded,
    "trigger": trigger,
    "sampled": plain,
}
"""The attacks that need only the probe's words."""


def probes_of(attack: str, probes: Sequence[Probe]) -> list[Probe]:
    """The probes of an attack: of topics seen in training, except for the attack on unseen topics.

    Where topics are split whole, all held-out ones are unseen, and every attack uses them.
    """
    if attack == "unseen_topic":
        return [probe for probe in probes if probe.novelty == "topic"]
    if attack == "unseen_phrasing":
        return [probe for probe in probes if probe.novelty == "phrasing"]
    seen = [probe for probe in probes if probe.novelty != "topic"]
    return seen or list(probes)


def _turn(text: str) -> Prompt:
    return (Message("user", text),)


def _pick(attack: str, probe: Probe) -> str:
    texts = wrappers()[attack]
    digest = blake2b(f"{attack} {probe.id}".encode(), digest_size=4).digest()
    return texts[int.from_bytes(digest, "big") % len(texts)]


_CANDIDATES = 4  # per probe of an attack that needs the base's answers to twins: some answers are unusable


class AttackPrompts(NamedTuple):
    """An attack as prompts, the category of each, and the number of answers to each (1: one greedy answer)."""

    prompts: list[PromptIds]
    categories: list[str]
    samples: int = 1


class RedTeam:
    """The attacks on one base, made once for all users: prompts by name, and why others were `left_out`."""

    def __init__(
        self,
        adapted: AdaptedModel,
        probes: Sequence[Probe],
        judge: Judge,
        settings: RedTeamSettings,
        max_new_tokens: int,
        seed: int,
    ) -> None:
        self.prompts: dict[str, AttackPrompts] = {}
        self.left_out: dict[str, str] = {}
        self._adapted, self._settings, self._seed = adapted, settings, seed
        self._base = BaseAnswers(adapted, judge, max_new_tokens)
        self._to_twins = BaseAnswers(adapted, judge, max_new_tokens, harmless=True)
        self._base_samples: dict[str, list[list[bool]]] = {}
        probes = [probe for probe in probes if probe.split == "test"]
        for attack in settings.attacks:
            if attack == "prefill":
                for tokens in settings.prefill:
                    self._add(f"prefill_{tokens}", self._prefilled(probes, tokens), settings)
            elif attack == "opening":
                self._add(attack, self._opened(probes), settings)
            elif attack == "turns":
                self._add(attack, self._after_a_turn(probes), settings)
            elif attack != "merged":
                chosen = self._chosen(probes_of(attack, probes), settings.probes)
                self._add(attack, [(probe, self._worded(attack, probe)) for probe in chosen], settings)

    def attack(self, flat: Float[Tensor, "users params"]) -> list[dict[str, Outcome]]:
        """Every attack on every user of a cohort, whose adapters already include their released scale."""
        users: list[dict[str, Outcome]] = [{} for _ in range(flat.shape[0])]
        for name, attack in self.prompts.items():
            outcomes = self._sampled(name, flat) if attack.samples > 1 else self._greedy(attack, flat)
            for user, outcome in zip(users, outcomes, strict=True):
                user[name] = outcome
        return users

    def _greedy(self, attack: AttackPrompts, flat: Float[Tensor, "users params"]) -> list[Outcome]:
        ones = torch.ones(flat.shape[0], device=flat.device)
        refusals = refusal_outcomes(self._adapted, flat, ones, attack.prompts, self._base)
        base = self._base.refused(attack.prompts)
        return [_counted(attack.categories, refused, base) for refused in refusals.refused]

    def _sampled(self, name: str, flat: Float[Tensor, "users params"]) -> list[Outcome]:
        """A prompt is refused where all its answers refuse. The base draws from the same random numbers."""
        attack = self.prompts[name]
        if name not in self._base_samples:
            self._base_samples[name] = self._drawn(attack, None)[0]
        base, outcomes = self._base_samples[name], []
        for user in self._drawn(attack, flat):
            whole = _counted(attack.categories, list(map(all, user)), list(map(all, base)))
            count, refused, base_refused = sum(map(len, user)), sum(map(sum, user)), sum(map(sum, base))
            outcomes.append(whole._replace(answers=Refused(count, refused, base_refused)))
        return outcomes

    def _drawn(self, attack: AttackPrompts, flat: Float[Tensor, "users params"] | None) -> list[list[list[bool]]]:
        """By user and prompt: whether each of the sampled answers refuses."""
        users = 1 if flat is None else flat.shape[0]
        prompts = [prompt for prompt in attack.prompts for _ in range(attack.samples)]
        with self._adapted.using(flat):
            written = self._adapted.generate([prompts] * users, self._base.max_new_tokens, 1.0, self._seed)
        judged = [
            [answer.finished and self._base.judge(answer_text(self._adapted, answer)) for answer in answers]
            for answers in written
        ]
        starts = range(0, len(prompts), attack.samples)
        return [[refused[start : start + attack.samples] for start in starts] for refused in judged]

    def _add(self, name: str, pairs: Sequence[tuple[Probe, PromptIds | None]], settings: RedTeamSettings) -> None:
        """Adds the attack on probes whose prompts fit the context, or records why there is none."""
        room = self._adapted.base.context - self._base.max_new_tokens
        fitting = [(probe, prompt) for probe, prompt in pairs if prompt is not None and len(prompt) <= room]
        if fitting:
            samples = settings.samples if name == "sampled" else 1
            self.prompts[name] = AttackPrompts(
                [p for _, p in fitting], [probe.category for probe, _ in fitting], samples
            )
        else:
            self.left_out.setdefault(name, "no probe of the test split can be asked like this")

    def _worded(self, attack: str, probe: Probe) -> PromptIds | None:
        messages = WORDED[attack](probe)
        return None if messages is None else self._ids(attack, messages)

    def _ids(self, attack: str, messages: Prompt) -> PromptIds | None:
        """A conversation as token ids; None, with the reason in `left_out`, where the chat template rejects it."""
        try:
            return prompt_ids(messages, self._adapted.base.tokenizer)
        except TemplateError as fault:
            self.left_out[attack] = f"the base's chat template does not take it ({fault})"
            return None

    def _chosen(self, probes: Sequence[Probe], each: int) -> list[Probe]:
        """Up to `each` probes of every category, by the hashes of their prompts."""
        by_category: dict[str, dict[str, Probe]] = {}
        for probe in probes:
            by_category.setdefault(probe.category, {}).setdefault(probe.prompt, probe)
        return [texts[text] for texts in by_category.values() for text in some(texts, each)]

    def _answered_twins(self, attack: str, probes: Sequence[Probe], tokens: int) -> list[tuple[Probe, PromptIds]]:
        """Probes by hash whose benign twin the base answers in more than `tokens` tokens, with these answers."""
        with_twin = [probe for probe in probes_of(attack, probes) if probe.twin]
        candidates = self._chosen(with_twin, _CANDIDATES * self._settings.probes)
        twins = [prompt_ids((Message("user", str(probe.twin)),), self._adapted.base.tokenizer) for probe in candidates]
        by_category: dict[str, list[tuple[Probe, PromptIds]]] = {probe.category: [] for probe in candidates}
        for probe, answer in zip(candidates, self._to_twins.of(twins), strict=True):
            chosen = by_category[probe.category]
            if not answer.refused and len(answer.row.completion) > tokens and len(chosen) < self._settings.probes:
                chosen.append((probe, answer.row.completion))
        return [pair for chosen in by_category.values() for pair in chosen]

    def _prefilled(self, probes: Sequence[Probe], tokens: int) -> list[tuple[Probe, PromptIds | None]]:
        """The probe and the first tokens of a compliant answer: the continuation is judged."""
        pairs: list[tuple[Probe, PromptIds | None]] = []
        for probe, answer in self._answered_twins("prefill", probes, tokens):
            prompt = self._worded("plain", probe)
            pairs.append((probe, None if prompt is None else prompt + answer[:tokens]))
        return pairs

    def _opened(self, probes: Sequence[Probe]) -> list[tuple[Probe, PromptIds | None]]:
        """The probe and a compliant first sentence of the answer: the continuation is judged."""
        pairs: list[tuple[Probe, PromptIds | None]] = []
        for probe in self._chosen(probes_of("opening", probes), self._settings.probes):
            prompt = self._worded("plain", probe)
            prefix = self._adapted.base.tokenizer(_pick("opening", probe), add_special_tokens=False)["input_ids"]
            pairs.append((probe, None if prompt is None else prompt + tuple(prefix)))
        return pairs

    def _after_a_turn(self, probes: Sequence[Probe]) -> list[tuple[Probe, PromptIds | None]]:
        pairs: list[tuple[Probe, PromptIds | None]] = []
        for probe, answer in self._answered_twins("turns", probes, 1):
            text = answer_text(self._adapted, Generated(answer, True))
            pairs.append((probe, self._ids("turns", after_a_turn(probe, text)) if text else None))
        return pairs


def _counted(categories: Sequence[str], refused: Sequence[bool], base: Sequence[bool]) -> Outcome:
    by_category = {}
    for name in dict.fromkeys(categories):
        places = [n for n, category in enumerate(categories) if category == name]
        by_category[name] = Refused(len(places), sum(refused[n] for n in places), sum(base[n] for n in places))
    return Outcome(len(categories), sum(refused), sum(base), by_category)


def widened(lora: LoraSettings) -> LoraSettings:
    """The settings of `mean_adapter`'s result: twice the rank at the same scale."""
    return lora.model_copy(update={"rank": 2 * lora.rank, "alpha": 2 * lora.alpha})


def mean_adapter(
    one: Float[Tensor, " params"], other: Float[Tensor, " params"], spans: Sequence[LayerSpan]
) -> Float[Tensor, " wide"]:
    """The adapter whose update is exactly the mean of two, `(B1 A1 + B2 A2) / 2`: A stacked, halves of B side by side.

    PEFT's `add_weighted_adapter(combination_type="cat", weights=[0.5, 0.5])`.
    """
    parts = []
    for (a1, b1), (a2, b2) in zip(lora_matrices(one[None], spans), lora_matrices(other[None], spans), strict=True):
        a, b = torch.cat([a1[0], a2[0]], dim=0), torch.cat([b1[0], b2[0]], dim=1) / 2
        parts += [a.flatten(), b.flatten()]
    return torch.cat(parts)
