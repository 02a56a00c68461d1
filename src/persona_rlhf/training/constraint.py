"""Tier one as a constraint on every user's adapter: the bank of base refusals, and how far a user falls below them.

For a probe x let R be the answers that are refusals, and `c(x) = E_{y ~ pi_ref(.|x, R)} [log pi_ref(y|x) - log
pi_user(y|x)]`, summed to the end token. Then `P_user(R|x) >= P_ref(R|x) exp(-c(x))`, exactly: c is the log of the
ratio of the two probabilities plus a KL divergence. What is trained on is a sample of y, so this is a reason, not a
guarantee; the guarantee is the gate's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from persona_rlhf.preferences.tokens import Row
from persona_rlhf.training.reference import Known
from persona_rlhf.training.settings import ConstraintSettings

if TYPE_CHECKING:
    from persona_rlhf.training.bank import ConstraintBank


_SURE = 1e-4
"""Nats: a wrong turn counts as no surer than exp(-1e-4), so that its loss stays finite."""


class Draw(NamedTuple):
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


class Excess(NamedTuple):
    """How far the users are from the base, in nats: mean excess refusal loss by category (`counts` rows of it in this
    step), the hinges on compliance and over-refusal openings (mean over rows), and the mean loss of the lessons of each
    requirement (`lesson_counts` rows of it)."""

    refusal: Float[Tensor, "users categories"]
    counts: Float[Tensor, "users categories"]
    compliance: Float[Tensor, " users"]
    overrefusal: Float[Tensor, " users"]
    lesson: Float[Tensor, "users requirements"]
    lesson_counts: Float[Tensor, "users requirements"]


class Watched(NamedTuple):
    """Log-probabilities (nats, summed) of the four kinds of rows of a `Draw`, under the users' adapters."""

    refusals: Float[Tensor, "users refusals"]
    compliances: Float[Tensor, "users compliances"]
    overrefusals: Float[Tensor, "users twins"]
    lessons: Float[Tensor, "users lessons"]


def measure(
    draws: Sequence[Draw],
    logps: Watched,
    reference: Known,
    categories: int,
    wrong: Sequence[bool],
    settings: ConstraintSettings,
) -> Excess:
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

    return Excess(
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
    draws: Sequence[Draw],
    logps: Watched,
    reference: Known,
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
