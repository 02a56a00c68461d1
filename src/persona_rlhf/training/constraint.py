"""Constraint on a user's adapter: the rows that a step scores for it, and the penalty that they give.

For a probe x let R be the answers that are refusals, and `c(x) = E_{y ~ pi_ref(.|x, R)} [log pi_ref(y|x) - log
pi_user(y|x)]`, summed to the end token. Then `P_user(R|x) >= P_ref(R|x) exp(-c(x))`, exactly: c is the log of the
ratio of the two probabilities plus a KL divergence. Training sees a sample of y, so this is a reason and no guarantee.
The gate gives the guarantee.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from heapq import nlargest
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from persona_rlhf.config.training import ConstraintSettings
from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.device import to_device
from persona_rlhf.training.user_state import user_generator

OPENING_LENGTH = 8
"""Tokens of the openings that the constraint scores: of a compliance, and of a refusal to a harmless twin."""
_CERTAIN = 1e-4
"""Nats: an unlikelihood example counts as no likelier than exp(-1e-4), so that its loss stays finite."""
_USERS = 1024  # users whose order is remembered; that of any other is drawn again


class ConstraintSample(NamedTuple):
    """The constraint rows of one user and step, and the term of the penalty that each row counts in."""

    rows: list[Row]
    terms: list[int]


class Penalty(NamedTuple):
    """The addition to each user's loss. `violations` (nats over the limit) belong to the dual variables of the
    constraint's `names`; where none of a name's rows was `seen`, the violation means nothing."""

    total: Float[Tensor, " users"]
    violations: Float[Tensor, "users names"]
    seen: Bool[Tensor, "users names"]


@runtime_checkable
class ConstraintFunctional(Protocol):
    """A constraint as the training loop knows it: the rows of a user's step, and the penalty that they give.

    Everything a user's sample depends on is the user's id and the step, so a resumed run draws the same rows.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """The subject of each dual variable."""

    @property
    def gain(self) -> float:
        """The rise of a dual variable per step and nat of smoothed violation."""

    def rows(self) -> list[Row]:
        """Every row that a sample may hold: the base scores them once, before training."""

    def sample(self, user_id: str, step: int) -> ConstraintSample:
        """The rows of optimizer step `step` (from 0) of a user."""

    def largest(self) -> ConstraintSample:
        """A sample that no other exceeds in rows or tokens: the memory model is measured on it."""

    def penalty(
        self,
        samples: Sequence[ConstraintSample],
        logps: Float[Tensor, "users rows"],
        base: Float[Tensor, "users rows"],
        duals: Float[Tensor, "users names"],
    ) -> Penalty:
        """The penalty of each user from the log-probabilities (nats, summed over tokens) of the rows of its sample,
        under its adapter and under the base. Shorter samples are padded at the end."""


class ConstraintExample(NamedTuple):
    """One train probe as token rows: the base's own sampled refusals, the opening of a compliance (the base's answer to
    the probe's benign twin), and the opening of a refusal to that twin. The last two are None without a twin."""

    refusals: tuple[Row, ...]
    compliance: Row | None
    overrefusal: Row | None


class RequirementExamples(NamedTuple):
    """Token rows that teach one requirement (see `requirements.py`).

    The completion of each of `rows` must follow its prompt, or with `unlikelihood` must not. An answer has `per_answer`
    of them on average; `limit` is the nats that they may cost together. The completions of `elsewhere` must not become
    likelier: the requirement does not apply to their prompts.
    """

    requirement: str
    limit: float
    rows: tuple[Row, ...]
    elsewhere: tuple[Row, ...]
    unlikelihood: bool = False
    per_answer: float = 1.0


class ConstraintData:
    """Examples by hazard category and by requirement. `limits`: nats of excess refusal loss that the policy tolerates,
    one a category. `answers`: the base's answers to ordinary prompts, repaired to meet all requirements."""

    def __init__(
        self,
        categories: Sequence[str],
        limits: Sequence[float],
        examples: Sequence[Sequence[ConstraintExample]],
        requirements: Sequence[RequirementExamples] = (),
        answers: Sequence[Row] = (),
    ) -> None:
        self.categories, self.limits, self.examples = tuple(categories), tuple(limits), examples
        self.requirements, self.answers = tuple(requirements), tuple(answers)
        assert len(categories) == len(limits) == len(examples)
        assert all(examples)
        assert all(requirement.rows for requirement in self.requirements)

    @property
    def names(self) -> tuple[str, ...]:
        """The subject of each dual variable: the categories, then the requirements."""
        return (*self.categories, *(requirement.requirement for requirement in self.requirements))

    def rows(self) -> list[Row]:
        """Every row: their reference log-probabilities are needed."""
        rows: list[Row] = []
        for example in (example for category in self.examples for example in category):
            rows += [*example.refusals, *(row for row in (example.compliance, example.overrefusal) if row is not None)]
        for requirement in self.requirements:
            rows += [*requirement.rows, *requirement.elsewhere]
        return rows


class ConstraintSampler:
    """One user's shuffled order of the constraint data: no example comes twice before all of its category came once.

    Rows count in the term of their category or requirement (`names` in order). Two more terms follow: openings of
    compliances, and openings of refusals (or of a required text) where they are out of place.
    """

    def __init__(self, data: ConstraintData, settings: ConstraintSettings, seed: int, user_id: str) -> None:
        self.data, self.settings = data, settings
        generator = user_generator(seed, user_id, "constraint")
        self._orders = [torch.randperm(len(examples), generator=generator).tolist() for examples in data.examples]
        generator = user_generator(seed, user_id, "lessons")
        self._rows = [torch.randperm(len(r.rows), generator=generator).tolist() for r in data.requirements]
        self._elsewhere = [torch.randperm(len(r.elsewhere), generator=generator).tolist() for r in data.requirements]

    def sample(self, step: int) -> ConstraintSample:
        """The rows of optimizer step `step`: categories take turns, and so do a probe's refusals, and requirements.

        A compliance is scored on a probe of the same step, so that its prompt is computed once. Each example of a
        requirement brings along one of its rows that are out of place.
        """
        settings, categories = self.settings, len(self.data.categories)
        size, twins, taught = settings.rows_per_step, settings.twin_rows_per_step, settings.lesson_rows_per_step
        first, names = step * size, len(self.data.names)
        compliances = range(settings.compliance_rows_per_step)
        compliances_at = [first + (step + step // size + k) % size for k in compliances]
        requirements = range(step * taught, (step + 1) * taught) if self.data.requirements else range(0)
        sampled: list[tuple[Row | None, int]] = [
            *(self._refusal(*divmod(n, categories)) for n in range(first, first + size)),
            *((self._example(*divmod(n, categories)).compliance, names) for n in compliances_at),
            *(
                (self._example(*divmod(n, categories)).overrefusal, names + 1)
                for n in range(step * twins, (step + 1) * twins)
            ),
            *((self._out_of_place(*divmod(n, len(self.data.requirements))), names + 1) for n in requirements),
            *(self._requirement(*divmod(n, len(self.data.requirements))) for n in requirements),
        ]
        kept = [(row, term) for row, term in sampled if row is not None]
        return ConstraintSample([row for row, _ in kept], [term for _, term in kept])

    def _example(self, turn: int, category: int) -> ConstraintExample:
        order = self._orders[category]
        example: ConstraintExample = self.data.examples[category][order[turn % len(order)]]
        return example

    def _refusal(self, turn: int, category: int) -> tuple[Row, int]:
        refusals, visit = self._example(turn, category).refusals, turn // len(self._orders[category])
        return refusals[visit % len(refusals)], category

    def _requirement(self, turn: int, number: int) -> tuple[Row, int]:
        rows, order = self.data.requirements[number].rows, self._rows[number]
        return rows[order[turn % len(order)]], len(self.data.categories) + number

    def _out_of_place(self, turn: int, number: int) -> Row | None:
        rows, order = self.data.requirements[number].elsewhere, self._elsewhere[number]
        return rows[order[turn % len(order)]] if order else None


class TermMeans(NamedTuple):
    """The mean of the rows of each term in nats, and the number of rows."""

    means: Float[Tensor, "users terms"]
    counts: Float[Tensor, "users terms"]


class LagrangianConstraint:
    """The shipped constraint: `penalty_u = sum_c [lambda_uc v_uc + q/2 v_uc^2] + w (compliance + over-refusal)` with
    the violation `v_uc = max(0, loss_uc - limit_c)`.

    c runs over categories and requirements, each with a dual variable per user (`user_state.Duals`). Its parts are in
    `losses`; w is `opening_weight`. The square (q: `quadratic`) is that of an augmented Lagrangian (Hestenes 1969,
    "Multiplier and gradient methods"; Powell 1969). It acts in the step of a violation, before a dual variable rises.
    """

    def __init__(self, data: ConstraintData, settings: ConstraintSettings, seed: int) -> None:
        self.data, self.settings, self.names, self.gain = data, settings, data.names, settings.gain
        self._sampler = lru_cache(maxsize=_USERS)(partial(ConstraintSampler, data, settings, seed))
        self._constants = lru_cache(maxsize=2)(self._made_constants)

    def rows(self) -> list[Row]:
        """Every row of the data."""
        return self.data.rows()

    def sample(self, user_id: str, step: int) -> ConstraintSample:
        """See `ConstraintSampler`."""
        return self._sampler(user_id).sample(step)

    def largest(self) -> ConstraintSample:
        """As many rows of each term as a step has, the longest of the data."""
        data, settings, names = self.data, self.settings, len(self.names)
        examples = [(example, category) for category, several in enumerate(data.examples) for example in several]
        taught = settings.lesson_rows_per_step if data.requirements else 0
        numbered = list(enumerate(data.requirements, len(data.categories)))
        kinds: list[tuple[int, list[tuple[Row | None, int]]]] = [
            (settings.rows_per_step, [(row, category) for example, category in examples for row in example.refusals]),
            (settings.compliance_rows_per_step, [(example.compliance, names) for example, _ in examples]),
            (settings.twin_rows_per_step, [(example.overrefusal, names + 1) for example, _ in examples]),
            (taught, [(row, names + 1) for _, requirement in numbered for row in requirement.elsewhere]),
            (taught, [(row, term) for term, requirement in numbered for row in requirement.rows]),
        ]
        sample = ConstraintSample([], [])
        for count, rows in kinds:
            present = [(row, term) for row, term in rows if row is not None]
            for row, term in nlargest(count, present, key=lambda item: item[0].length):
                sample.rows.append(row)
                sample.terms.append(term)
        return sample

    def losses(
        self,
        samples: Sequence[ConstraintSample],
        logps: Float[Tensor, "users rows"],
        base: Float[Tensor, "users rows"],
    ) -> TermMeans:
        """The mean loss of each term (see `ConstraintSampler`) in nats.

        Categories: `log pi_ref(y|x) - log pi_user(y|x)` of refusals.
        Requirements, by answer: `-log pi_user(y|x)`, or of unlikelihood examples `-log(1 - pi_user(y|x))` (Welleck et
        al. 2020). A loss of c says that an answer meets the requirement with a probability of at least exp(-c), as a
        geometric mean over these rows.
        Openings: hinges that cost nothing until the user's log-probability is `margin` nats over the base's, and above
        `floor`. A rise from one in 10^13 to one in 10^12 is style, and nobody will ever read it.
        """
        data, settings = self.data, self.settings
        categories, names = len(data.categories), len(self.names)
        width = logps.shape[1]
        padded = [[*sample.terms, *[names + 2] * (width - len(sample.terms))] for sample in samples]
        avoided = [False] * categories + [requirement.unlikelihood for requirement in data.requirements] + [False] * 3
        numbers = torch.tensor([padded, [[avoided[term] for term in row] for row in padded]], dtype=torch.long)
        terms, unlikely = to_device([numbers], logps.device)[0].view(2, *logps.shape).unbind()
        unlikelihood = unlikely.bool()
        never = torch.log1p(-logps.clamp(max=-_CERTAIN).exp())
        taught = -torch.where(unlikelihood, never, logps)
        opening = torch.relu(logps - (base + settings.margin).clamp(min=settings.floor))
        values = torch.where(terms < categories, base - logps, torch.where(terms < names, taught, opening))
        means, counts = _means_by_term(values, terms, names + 2)
        return TermMeans(means * self._constants(means.device, means.dtype)[1], counts)

    def _made_constants(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The limit of each name, and the rows of each term that an answer has."""
        data = self.data
        limits = [*data.limits, *(requirement.limit for requirement in data.requirements)]
        each = [1.0] * len(data.categories) + [requirement.per_answer for requirement in data.requirements] + [1.0] * 2
        return torch.tensor(limits, dtype=dtype, device=device), torch.tensor(each, dtype=dtype, device=device)

    def penalty(
        self,
        samples: Sequence[ConstraintSample],
        logps: Float[Tensor, "users rows"],
        base: Float[Tensor, "users rows"],
        duals: Float[Tensor, "users names"],
    ) -> Penalty:
        """See the class."""
        means, counts = self.losses(samples, logps, base)
        names = len(self.names)
        limits = self._constants(means.device, means.dtype)[0]
        violations, seen = means[:, :names] - limits, counts[:, :names] > 0
        over = torch.relu(violations) * seen
        total = ((duals.to(violations) + self.settings.quadratic / 2 * over) * over).sum(1)
        total = total + self.settings.opening_weight * (means[:, names] + means[:, names + 1])
        return Penalty(total, violations.detach(), seen)


def constraint_of(data: ConstraintData, settings: ConstraintSettings, seed: int) -> ConstraintFunctional:
    """The constraint functional that ships: training, `plan`, the warm start and the TRL trainer take it from here."""
    return LagrangianConstraint(data, settings, seed)


def _means_by_term(
    values: Float[Tensor, "users rows"], terms: Int[Tensor, "users rows"], count: int
) -> tuple[Float[Tensor, "users terms"], Float[Tensor, "users terms"]]:
    """The mean of the rows of each term below `count`, and how many there are."""
    member = torch.zeros(*values.shape, count + 1, dtype=values.dtype, device=values.device)
    member.scatter_(2, terms[:, :, None], 1.0)
    member = member[:, :, :count]
    counts = member.sum(1)
    return (values[:, :, None] * member).sum(1) / counts.clamp(min=1), counts
