"""The bank of rows that hold every user to the policy, and each user's own walk through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from persona_rlhf.preferences.tokens import Row
from persona_rlhf.training.constraint import Draw, Excess, Watched, measure
from persona_rlhf.training.reference import Known
from persona_rlhf.training.scheduler import user_generator
from persona_rlhf.training.settings import ConstraintSettings


class Anchor(NamedTuple):
    """One train probe as token rows: the base's own sampled refusals, the opening of a compliance (the base's answer to
    the probe's benign twin), and the opening of a refusal to that twin. The last two are None without a twin."""

    refusals: tuple[Row, ...]
    compliance: Row | None
    overrefusal: Row | None


class Lessons(NamedTuple):
    """What teaches one requirement (see `lessons.py`). `turns` are rows whose completion is what an answer must go on
    with at that point, or must not where they are `wrong`; an answer has `each` of them on average, and `limit` is the
    nats that they may cost together; `elsewhere` are rows whose completion should not begin to appear where the
    requirement does not apply."""

    requirement: str
    limit: float
    turns: tuple[Row, ...]
    elsewhere: tuple[Row, ...]
    wrong: bool = False
    each: float = 1.0


class ConstraintBank:
    """Anchors by category, and lessons by requirement. `limits` are nats of excess refusal loss that the policy
    tolerates, one a category. `answers`: whole answers of the base to ordinary prompts, as the requirements ask."""

    def __init__(
        self,
        categories: Sequence[str],
        limits: Sequence[float],
        anchors: Sequence[Sequence[Anchor]],
        lessons: Sequence[Lessons] = (),
        answers: Sequence[Row] = (),
    ) -> None:
        self.categories, self.limits, self.anchors = tuple(categories), tuple(limits), anchors
        self.lessons, self.answers = tuple(lessons), tuple(answers)
        assert len(categories) == len(limits) == len(anchors)
        assert all(anchors)
        assert all(own.turns for own in self.lessons)

    @property
    def names(self) -> tuple[str, ...]:
        """What each dual variable is about: the categories, then the requirements that are taught."""
        return (*self.categories, *(own.requirement for own in self.lessons))

    def walk(self, settings: ConstraintSettings, seed: int, user_id: str) -> UserDraws:
        """A user's way through the bank."""
        return UserDraws(self, settings, seed, user_id)

    def excess(self, draws: Sequence[Draw], logps: Watched, reference: Known, settings: ConstraintSettings) -> Excess:
        """The functional: how far users are from the base on the rows they drew, and the loss of lessons by answer. A
        bank of another kind may differ."""
        wrong = [own.wrong for own in self.lessons]
        found = measure(draws, logps, reference, len(self.categories), wrong, settings)
        return found._replace(lesson=found.lesson * found.lesson.new_tensor([own.each for own in self.lessons]))

    def rows(self) -> list[Row]:
        """Every row whose reference log-probability is needed."""
        found = []
        for anchor in (anchor for category in self.anchors for anchor in category):
            found += [*anchor.refusals, *(row for row in (anchor.compliance, anchor.overrefusal) if row is not None)]
        for own in self.lessons:
            found += [*own.turns, *own.elsewhere]
        return found


class UserDraws:
    """A user's own shuffled walk through the bank: no probe comes twice before all of its category came once."""

    def __init__(self, bank: ConstraintBank, settings: ConstraintSettings, seed: int, user_id: str) -> None:
        self.bank, self.settings = bank, settings
        generator = user_generator(seed, user_id, "constraint")
        self._orders = [torch.randperm(len(own), generator=generator).tolist() for own in bank.anchors]
        taught = user_generator(seed, user_id, "lessons")
        self._turns = [torch.randperm(len(own.turns), generator=taught).tolist() for own in bank.lessons]
        self._elsewhere = [torch.randperm(len(own.elsewhere), generator=taught).tolist() for own in bank.lessons]

    def _anchor(self, category: int, turn: int) -> Anchor:
        order = self._orders[category]
        anchor: Anchor = self.bank.anchors[category][order[turn % len(order)]]
        return anchor

    def at(self, step: int) -> Draw:
        """The rows of optimizer step `step`: categories take turns, and so do a probe's refusals.

        A compliance is watched on a probe of the same step, so that its prompt is computed once.
        """
        draw = Draw([], [], [], [])
        count, size = len(self.bank.categories), self.settings.rows_per_step
        first = step * size
        for n in range(first, first + size):
            turn, category = divmod(n, count)
            anchor, visit = self._anchor(category, turn), turn // len(self._orders[category])
            draw.refusals.append(anchor.refusals[visit % len(anchor.refusals)])
            draw.categories.append(category)
        for k in range(self.settings.compliance_rows_per_step):
            turn, category = divmod(first + (step + step // size + k) % size, count)
            compliance = self._anchor(category, turn).compliance
            if compliance is not None:
                draw.compliances.append(compliance)
        twins = self.settings.twin_rows_per_step
        for n in range(step * twins, (step + 1) * twins):
            turn, category = divmod(n, count)
            overrefusal = self._anchor(category, turn).overrefusal
            if overrefusal is not None:
                draw.overrefusals.append(overrefusal)
        return self._with_lessons(draw, step)

    def _with_lessons(self, draw: Draw, step: int) -> Draw:
        """The draw with lessons: requirements take turns, and each lesson brings one on where it is out of place."""
        lessons, kinds, size = self.bank.lessons, list[int](), self.settings.lesson_rows_per_step
        if not lessons:
            return draw
        rows: list[Row] = []
        for n in range(step * size, (step + 1) * size):
            turn, kind = divmod(n, len(lessons))
            kinds.append(kind)
            rows.append(lessons[kind].turns[self._turns[kind][turn % len(self._turns[kind])]])
            if other := self._elsewhere[kind]:
                draw.overrefusals.append(lessons[kind].elsewhere[other[turn % len(other)]])
        return draw._replace(lessons=rows, requirements=kinds)
