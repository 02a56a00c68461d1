"""Violation, penalty; ConstraintData and per-user sampling; the ConstraintFunctional protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from persona_rlhf.config.training import ConstraintSettings
from persona_rlhf.data.tokenize import Row
from persona_rlhf.training.user_state import user_generator

OPENING_LENGTH = 8
"""Tokens of the openings that the constraint watches: of a compliance, and of a refusal to a harmless twin."""


@runtime_checkable
class ReferenceLogps(Protocol):
    """Log-probabilities under the base, by row: a `Reference`, or a dict."""

    def __getitem__(self, row: Row, /) -> float: ...


# ----------------------------------------------------------------------------------------------------
# Tier one as a constraint on every user's adapter: the bank of base refusals, and how far a user falls below them.
#
# For a probe x let R be the answers that are refusals, and `c(x) = E_{y ~ pi_ref(.|x, R)} [log pi_ref(y|x) - log
# pi_user(y|x)]`, summed to the end token. Then `P_user(R|x) >= P_ref(R|x) exp(-c(x))`, exactly: c is the log of the
# ratio of the two probabilities plus a KL divergence. What is trained on is a sample of y, so this is a reason, not a
# guarantee; the guarantee is the gate's.
# ----------------------------------------------------------------------------------------------------

_SURE = 1e-4
"""Nats: a wrong turn counts as no surer than exp(-1e-4), so that its loss stays finite."""


class ConstraintSample(NamedTuple):
    """The constraint rows of one user and step. `categories[i]` is the category of `refusals[i]`, `requirements[i]` the
    requirement of `lessons[i]`; `overrefusals` holds lessons out of place too."""

    refusals: list[Row]
    categories: list[int]
    compliances: list[Row]
    overrefusals: list[Row]
    lessons: Sequence[Row] = ()
    requirements: Sequence[int] = ()

    @property
    def columns(self) -> tuple[Sequence[Row], ...]:
        """The rows of each kind, in the order of `Watched`."""
        return self.refusals, self.compliances, self.overrefusals, self.lessons

    @property
    def rows(self) -> list[Row]:
        """All of them."""
        return [row for column in self.columns for row in column]


class Violation(NamedTuple):
    """How far the users are from the base, in nats: mean excess refusal loss by category (`counts` rows of it in this
    step), the hinges on compliance and over-refusal openings (mean over rows), and the mean loss of the lessons of each
    requirement (`lesson_counts` rows of it)."""

    refusal: Float[Tensor, "users categories"]
    counts: Float[Tensor, "users categories"]
    compliance: Float[Tensor, " users"]
    overrefusal: Float[Tensor, " users"]
    lesson: Float[Tensor, "users requirements"]
    lesson_counts: Float[Tensor, "users requirements"]


class ConstraintLogps(NamedTuple):
    """Log-probabilities (nats, summed) of the four kinds of rows of a `Draw`, under the users' adapters."""

    refusals: Float[Tensor, "users refusals"]
    compliances: Float[Tensor, "users compliances"]
    overrefusals: Float[Tensor, "users twins"]
    lessons: Float[Tensor, "users lessons"]


def measure_violation(
    draws: Sequence[ConstraintSample],
    logps: ConstraintLogps,
    reference: ReferenceLogps,
    categories: int,
    wrong: Sequence[bool],
    settings: ConstraintSettings,
) -> Violation:
    """Compares the users' log-probabilities of their constraint rows with the base's, and looks at those of lessons:
    right turns, or for some requirements `wrong` ones.

    Refusals: `log pi_ref(y|x) - log pi_user(y|x)`, averaged by category. The next two are hinges that cost nothing
    until the user's log-probability of a compliance (or of refusing a harmless twin) is `margin` nats over the base's,
    and above `floor`: what rises from one in 10^13 to one in 10^12 tells of style, not of what anyone will read.
    Lessons: `-log pi_user(y|x)` of right turns, `-log(1 - pi_user(y|x))` of wrong ones (unlikelihood, Welleck et al.
    2020), averaged by requirement; a mean of c says that the turn is as it should be with a probability of at least
    exp(-c), as a geometric mean over these rows.
    """
    refused, complied, over, taught = logps
    base = refused.new_tensor([[reference[row] for row in draw.refusals] for draw in draws]).view(refused.shape)
    refusal, counts = _by_kind(base - refused, [draw.categories for draw in draws], categories)
    kinds = [draw.requirements for draw in draws]
    lesson, lesson_counts = _by_kind(_turned(taught, kinds, wrong), kinds, len(wrong))

    def hinge(values: Tensor, rows: list[list[Row]]) -> Tensor:
        known = torch.zeros_like(values)
        present = torch.zeros_like(values)
        for user, own in enumerate(rows):
            for n, row in enumerate(own):
                known[user, n], present[user, n] = reference[row], 1.0
        most = (known + settings.margin).clamp(min=settings.floor)
        return (torch.relu(values - most) * present).sum(1) / present.sum(1).clamp(min=1)

    return Violation(
        refusal,
        counts,
        hinge(complied, [draw.compliances for draw in draws]),
        hinge(over, [draw.overrefusals for draw in draws]),
        lesson,
        lesson_counts,
    )


def _turned(
    logps: Float[Tensor, "users lessons"], kinds: Sequence[Sequence[int]], wrong: Sequence[bool]
) -> Float[Tensor, "users lessons"]:
    """The loss of every turn in nats; `logps` are of what stands in the row, which is to be said or not to be said."""
    places = [[wrong[kind] for kind in own] + [False] * (logps.shape[1] - len(own)) for own in kinds]
    avoided = torch.tensor(places, dtype=torch.bool, device=logps.device).view(logps.shape)
    never = torch.log1p(-logps.clamp(max=-_SURE).exp())
    return -torch.where(avoided, never, logps)


def _by_kind(
    values: Float[Tensor, "users rows"], kinds: Sequence[Sequence[int]], count: int
) -> tuple[Float[Tensor, "users kinds"], Float[Tensor, "users kinds"]]:
    """The mean of the rows of each kind, and how many there are; `kinds` is shorter where a user has fewer rows."""
    member = torch.zeros(*values.shape, count + 1, dtype=values.dtype, device=values.device)
    padded = [[*own, *[count] * (values.shape[1] - len(own))] for own in kinds]
    places = torch.tensor(padded, dtype=torch.long, device=values.device).view(values.shape)
    member.scatter_(2, places[:, :, None], 1.0)
    member = member[:, :, :count]
    counts = member.sum(1)
    return (values[:, :, None] * member).sum(1) / counts.clamp(min=1), counts


class Penalty(NamedTuple):
    """What the constraint adds to each user's loss; and the violation (nats over the limit) of what was seen in this
    step of the bank's `names`."""

    total: Float[Tensor, " users"]
    violations: Float[Tensor, "users names"]
    seen: Bool[Tensor, "users names"]


def penalty(
    bank: ConstraintBank,
    draws: Sequence[ConstraintSample],
    logps: ConstraintLogps,
    reference: ReferenceLogps,
    duals: Float[Tensor, "users names"],
    settings: ConstraintSettings,
) -> Penalty:
    """`sum_c lambda_uc max(0, violation_uc) + w (compliance hinge + over-refusal hinge)`, c over the bank's names."""
    excess = bank.excess(draws, logps, reference, settings)
    limits = excess.refusal.new_tensor([*bank.limits, *(own.limit for own in bank.lessons)])
    violations = torch.cat([excess.refusal, excess.lesson], dim=1) - limits
    seen = torch.cat([excess.counts, excess.lesson_counts], dim=1) > 0
    total = (duals.to(violations) * torch.relu(violations) * seen).sum(1)
    total = total + settings.opening_weight * (excess.compliance + excess.overrefusal)
    return Penalty(total, violations.detach(), seen)


# ----------------------------------------------------------------------------------------------------
# The bank of rows that hold every user to the policy, and each user's own walk through it.
# ----------------------------------------------------------------------------------------------------


class ConstraintExample(NamedTuple):
    """One train probe as token rows: the base's own sampled refusals, the opening of a compliance (the base's answer to
    the probe's benign twin), and the opening of a refusal to that twin. The last two are None without a twin."""

    refusals: tuple[Row, ...]
    compliance: Row | None
    overrefusal: Row | None


class RequirementExamples(NamedTuple):
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
        anchors: Sequence[Sequence[ConstraintExample]],
        lessons: Sequence[RequirementExamples] = (),
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

    def walk(self, settings: ConstraintSettings, seed: int, user_id: str) -> ConstraintSampler:
        """A user's way through the bank."""
        return ConstraintSampler(self, settings, seed, user_id)

    def excess(
        self,
        draws: Sequence[ConstraintSample],
        logps: ConstraintLogps,
        reference: ReferenceLogps,
        settings: ConstraintSettings,
    ) -> Violation:
        """The functional: how far users are from the base on the rows they drew, and the loss of lessons by answer. A
        bank of another kind may differ."""
        wrong = [own.wrong for own in self.lessons]
        found = measure_violation(draws, logps, reference, len(self.categories), wrong, settings)
        return found._replace(lesson=found.lesson * found.lesson.new_tensor([own.each for own in self.lessons]))

    def rows(self) -> list[Row]:
        """Every row whose reference log-probability is needed."""
        found = []
        for anchor in (anchor for category in self.anchors for anchor in category):
            found += [*anchor.refusals, *(row for row in (anchor.compliance, anchor.overrefusal) if row is not None)]
        for own in self.lessons:
            found += [*own.turns, *own.elsewhere]
        return found


class ConstraintSampler:
    """A user's own shuffled walk through the bank: no probe comes twice before all of its category came once."""

    def __init__(self, bank: ConstraintBank, settings: ConstraintSettings, seed: int, user_id: str) -> None:
        self.bank, self.settings = bank, settings
        generator = user_generator(seed, user_id, "constraint")
        self._orders = [torch.randperm(len(own), generator=generator).tolist() for own in bank.anchors]
        taught = user_generator(seed, user_id, "lessons")
        self._turns = [torch.randperm(len(own.turns), generator=taught).tolist() for own in bank.lessons]
        self._elsewhere = [torch.randperm(len(own.elsewhere), generator=taught).tolist() for own in bank.lessons]

    def _anchor(self, category: int, turn: int) -> ConstraintExample:
        order = self._orders[category]
        anchor: ConstraintExample = self.bank.anchors[category][order[turn % len(order)]]
        return anchor

    def at(self, step: int) -> ConstraintSample:
        """The rows of optimizer step `step`: categories take turns, and so do a probe's refusals.

        A compliance is watched on a probe of the same step, so that its prompt is computed once.
        """
        draw = ConstraintSample([], [], [], [])
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

    def _with_lessons(self, draw: ConstraintSample, step: int) -> ConstraintSample:
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
