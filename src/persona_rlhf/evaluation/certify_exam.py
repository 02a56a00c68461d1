"""The certify probes as prompts behind one system message, and the refusals of the base and of adapters there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from typing import NamedTuple, TypeVar

from jaxtyping import Float
from jinja2 import TemplateError
from torch import Tensor

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import prompt_ids
from persona_rlhf.evaluation.refusals import BaseAnswers, PromptIds, refusal_outcomes
from persona_rlhf.evaluation.statistics import Clustered, by_cluster
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import Base
from persona_rlhf.policy.clusters import Outcomes, Unit
from persona_rlhf.policy.composition import Composition
from persona_rlhf.policy.hazards import Probe

T = TypeVar("T")


class ProbeSplit(NamedTuple):
    """The probes of one split, as prompts, and the places of each category among them."""

    probes: list[Probe]
    prompts: list[PromptIds]
    places: dict[str, list[int]]

    def by_category(self, refused: Sequence[bool]) -> dict[str, list[bool]]:
        """Outcomes in the order of `prompts`, by category."""
        return {name: [refused[n] for n in places] for name, places in self.places.items()}

    def clustered(self, outcomes: Outcomes, names: Sequence[str], level: float) -> Clustered:
        """The refusals of these categories, by topic and by phrasing."""
        probes = [self.probes[n] for name in names for n in self.places[name]]
        refused = [outcome for name in names for outcome in outcomes[name]]
        topics, phrasings = ([getattr(probe, of) for probe in probes] for of in ("topic", "phrasing"))
        return Clustered(by_cluster(refused, topics, level), by_cluster(refused, phrasings, level))

    def behind(self, system: str, composition: Composition, base: Base) -> ProbeSplit:
        """The same probes behind a system prompt and the memories of each; unchanged where neither is asked for.

        Raises InputError where the base cannot read them.
        """
        if not composition.parts:
            return self
        prompts = []
        for probe in self.probes:
            message = composition.message(system, probe)
            before = (Message("system", message),) if message else ()
            try:
                prompts.append(prompt_ids((*before, Message("user", probe.prompt)), base.tokenizer))
            except TemplateError as fault:
                sentence = f"the base's chat template rejects a system message ({fault}); take `certify.with` out"
                raise InputError([Problem(base.name, None, "certify.with", sentence)]) from fault
        if (longest := max(map(len, prompts), default=0)) >= base.context:
            sentence = f"a probe with the text before it has {longest} tokens, and the base reads {base.context}"
            raise InputError([Problem(base.name, None, "certify.with", sentence)])
        return self._replace(prompts=prompts)


class CertifyExam:
    """The gate's questions to adapters whose users share these prompts.

    `samples` answers at temperature 1 to each prompt must refuse beside the greedy one. `answers` are the base's.
    """

    def __init__(
        self, adapted: AdaptedModel, split: ProbeSplit, answers: BaseAnswers, samples: int = 0, seed: int = 0
    ) -> None:
        self.split, self._adapted, self._answers = split, adapted, answers
        self._samples, self._seed = samples, seed

    @cached_property
    def base_outcomes(self) -> Outcomes:
        """The base's refusals."""
        [sampled] = self._sampled(None, None, self.split.prompts)
        return self.split.by_category(both(self._answers.refused(self.split.prompts), sampled))

    def outcomes(self, flat: Float[Tensor, "users params"], alphas: Float[Tensor, " users"]) -> list[Outcomes]:
        """The refusals of every user's adapter."""
        refused = refusal_outcomes(self._adapted, flat, alphas, self.split.prompts, self._answers).refused
        sampled = self._sampled(flat, alphas, self.split.prompts)
        return [self.split.by_category(both(*user)) for user in zip(refused, sampled, strict=True)]

    def refused_units(
        self, flat: Float[Tensor, "one params"], alphas: Float[Tensor, " one"], units: Sequence[Unit]
    ) -> list[bool]:
        """Whether one user's adapter refuses all probes of each unit."""
        places = [self.split.places[unit.category][place] for unit in units for place in unit.places]
        prompts = [self.split.prompts[place] for place in places]
        [outcomes] = refusal_outcomes(self._adapted, flat, alphas, prompts, self._answers).refused
        [sampled] = self._sampled(flat, alphas, prompts)
        answers = iter(both(outcomes, sampled))
        return [all(list(islice(answers, len(unit.places)))) for unit in units]

    def _sampled(
        self,
        flat: Float[Tensor, "users params"] | None,
        alphas: Float[Tensor, " users"] | None,
        prompts: Sequence[PromptIds],
    ) -> list[list[bool]]:
        """By user, or of the base alone: whether all sampled answers to each prompt refuse."""
        users = 1 if flat is None else flat.shape[0]
        refused = [[True] * len(prompts) for _ in range(users)]
        for number in range(self._samples):
            with self._adapted.using(flat, alphas):
                seed = self._seed + number
                answers = self._adapted.generate([prompts] * users, self._answers.max_new_tokens, 1.0, seed)
                whole = self._answers.as_written([prompts] * users, answers)
            refused = [both(*user) for user in zip(refused, whole, strict=True)]
        return refused


def both(one: Sequence[bool], other: Sequence[bool]) -> list[bool]:
    """Where both are true."""
    return [first and second for first, second in zip(one, other, strict=True)]


def entries_at(column: Sequence[T], places: Sequence[int]) -> list[T]:
    """The entries of these users; none of a column that is not given."""
    return [column[place] for place in places] if column else []
