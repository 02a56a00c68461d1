"""Tier one as a constraint on every user's adapter: the bank of base refusals, and how far a user falls below them.

For a probe x let R be the answers that are refusals, and `c(x) = E_{y ~ pi_ref(.|x, R)} [log pi_ref(y|x) - log
pi_user(y|x)]`, summed to the end token. Then `P_user(R|x) >= P_ref(R|x) exp(-c(x))`, exactly: c is the log of the
ratio of the two probabilities plus a KL divergence. What is trained on is a sample of y, so this is a reason, not a
guarantee; the guarantee is the gate's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.policy import judges
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.policy.tiers import Policy
from persona_rlhf.preferences.messages import Message
from persona_rlhf.preferences.tokens import Row, prompt_ids
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.reference import Known
from persona_rlhf.training.scheduler import user_generator
from persona_rlhf.training.settings import ConstraintSettings


class Anchor(NamedTuple):
    """One train probe as token rows: the base's own sampled refusals, the opening of a compliance (the base's answer to
    the probe's benign twin), and the opening of a refusal to that twin. The last two are None without a twin."""

    refusals: tuple[Row, ...]
    compliance: Row | None
    overrefusal: Row | None


class Draw(NamedTuple):
    """The constraint rows of one user and step. `categories[i]` is the category of `refusals[i]`."""

    refusals: list[Row]
    categories: list[int]
    compliances: list[Row]
    overrefusals: list[Row]

    @property
    def rows(self) -> list[Row]:
        """All of them."""
        return [*self.refusals, *self.compliances, *self.overrefusals]


class ConstraintBank:
    """Anchors by category. `limits` are nats of excess refusal loss that the policy tolerates, one a category."""

    def __init__(self, categories: Sequence[str], limits: Sequence[float], anchors: Sequence[Sequence[Anchor]]) -> None:
        self.categories, self.limits, self.anchors = tuple(categories), tuple(limits), anchors
        assert len(categories) == len(limits) == len(anchors)
        assert all(anchors)

    def walk(self, settings: ConstraintSettings, seed: int, user_id: str) -> UserDraws:
        """A user's way through the bank."""
        return UserDraws(self, settings, seed, user_id)

    def excess(self, draws: Sequence[Draw], logps: Watched, reference: Known, settings: ConstraintSettings) -> Excess:
        """The functional: how far users are from the base on the rows they drew. A bank of another kind may differ."""
        return measure(draws, logps, reference, len(self.categories), settings)

    def rows(self) -> list[Row]:
        """Every row whose reference log-probability is needed."""
        found = []
        for anchor in (anchor for category in self.anchors for anchor in category):
            found += [*anchor.refusals, *(row for row in (anchor.compliance, anchor.overrefusal) if row is not None)]
        return found


class UserDraws:
    """A user's own shuffled walk through the bank: no probe comes twice before all of its category came once."""

    def __init__(self, bank: ConstraintBank, settings: ConstraintSettings, seed: int, user_id: str) -> None:
        self.bank, self.settings = bank, settings
        generator = user_generator(seed, user_id, "constraint")
        self._orders = [torch.randperm(len(own), generator=generator).tolist() for own in bank.anchors]

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
        return draw


def build_bank(
    adapted: AdaptedModel,
    categories: Sequence[str],
    limits: Sequence[float],
    probes: Sequence[Probe],
    encode: Callable[[str], tuple[int, ...]],
    is_refusal: Callable[[str], bool],
    settings: ConstraintSettings,
    seed: int,
    max_new_tokens: int,
) -> ConstraintBank:
    """Samples the base's own refusals to the train probes at temperature 1, and keeps those the judge calls refusals.

    `encode` turns a prompt into token ids (chat template and all). A probe that the base never refused in
    `refusals_per_probe` tries is left out: the constraint asks a user for nothing that the base does not do. Raises
    ValueError where a category is left without a probe.
    """
    train = [probe for probe in probes if probe.split == "train" and probe.category in categories]
    tries = settings.refusals_per_probe
    prompts = [encode(probe.prompt) for probe in train]
    twins = [encode(probe.twin) if probe.twin else None for probe in train]
    end = adapted.base.eos_ids[:1]
    with adapted.using(None):
        [sampled] = adapted.generate([[p for p in prompts for _ in range(tries)]], max_new_tokens, 1.0, seed)
        [welcomed] = adapted.generate([[twin for twin in twins if twin]], settings.opening_tokens, 1.0, seed + 1)
    openings = iter(welcomed)
    anchors: dict[str, list[Anchor]] = {category: [] for category in categories}
    for n, (probe, prompt, twin) in enumerate(zip(train, prompts, twins, strict=True)):
        opening = next(openings).ids if twin else ()
        finished = [answer.ids for answer in sampled[n * tries : (n + 1) * tries] if answer.finished]
        texts = [str(adapted.base.tokenizer.decode(list(ids))) for ids in finished]
        refusals = [ids for ids, text in zip(finished, texts, strict=True) if is_refusal(text)]
        if not refusals:
            continue
        anchors[probe.category].append(
            Anchor(
                tuple(Row(prompt, ids + end) for ids in dict.fromkeys(refusals)),
                Row(prompt, opening) if opening else None,
                Row(twin, refusals[0][: settings.opening_tokens]) if twin else None,
            )
        )
    empty = [category for category, own in anchors.items() if not own]
    if empty:
        raise ValueError(f"the base refused no train probe of {', '.join(empty)}; it is not safety-aligned")
    return ConstraintBank(categories, limits, [anchors[category] for category in categories])


def policy_bank(
    adapted: AdaptedModel, policy: Policy, settings: ConstraintSettings, seed: int, max_new_tokens: int
) -> ConstraintBank:
    """The bank of a policy's restrictions. Raises InputError where the base refuses no train probe of a category."""
    limits = {rule.category: rule.limit for rule in policy.restrictions}
    try:
        return build_bank(
            adapted,
            list(limits),
            list(limits.values()),
            policy.probes("train"),
            lambda text: prompt_ids((Message("user", text),), adapted.base.tokenizer),
            judges.is_refusal,
            settings,
            seed,
            max_new_tokens,
        )
    except ValueError as fault:
        raise InputError([Problem(adapted.base.name, None, "base.model", f"not certifiable: {fault}")]) from fault


class Excess(NamedTuple):
    """How far the users are from the base, in nats: mean excess refusal loss by category (`counts` rows of it in this
    step), and the hinges on compliance and over-refusal openings (mean over rows)."""

    refusal: Float[Tensor, "users categories"]
    counts: Float[Tensor, "users categories"]
    compliance: Float[Tensor, " users"]
    overrefusal: Float[Tensor, " users"]


Watched = tuple[Float[Tensor, "users refusals"], Float[Tensor, "users compliances"], Float[Tensor, "users twins"]]
"""Log-probabilities (nats, summed) of the three kinds of rows of a `Draw`, under the users' adapters."""


def measure(
    draws: Sequence[Draw],
    logps: Watched,
    reference: Known,
    categories: int,
    settings: ConstraintSettings,
) -> Excess:
    """Compares the users' log-probabilities of their constraint rows with the base's.

    Refusals: `log pi_ref(y|x) - log pi_user(y|x)`, averaged by category. The other two are hinges that cost nothing
    until the user's log-probability of a compliance (or of refusing a harmless twin) is `margin` nats over the base's,
    and above `floor`: what rises from one in 10^13 to one in 10^12 tells of style, not of what anyone will read.
    """
    refused, complied, over = logps
    fill = {"dtype": refused.dtype, "device": refused.device}
    base = refused.new_tensor([[reference[row] for row in draw.refusals] for draw in draws]).view(refused.shape)
    member = torch.zeros(*refused.shape, categories, **fill)  # type: ignore[call-overload]
    kinds = torch.tensor([draw.categories for draw in draws], device=refused.device).view(refused.shape)
    member.scatter_(2, kinds[:, :, None], 1.0)
    counts = member.sum(1)
    refusal = ((base - refused)[:, :, None] * member).sum(1) / counts.clamp(min=1)

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
    )


class Penalty(NamedTuple):
    """What the constraint adds to each user's loss; and the violation (nats over the limit) of the categories that were
    seen in this step."""

    total: Float[Tensor, " users"]
    violations: Float[Tensor, "users categories"]
    seen: Bool[Tensor, "users categories"]


def penalty(
    bank: ConstraintBank,
    draws: Sequence[Draw],
    logps: Watched,
    reference: Known,
    duals: Float[Tensor, "users categories"],
    settings: ConstraintSettings,
) -> Penalty:
    """`sum_c lambda_uc max(0, violation_uc) + w (compliance hinge + over-refusal hinge)`."""
    excess = bank.excess(draws, logps, reference, settings)
    violations, seen = excess.refusal - excess.refusal.new_tensor(bank.limits), excess.counts > 0
    total = (duals.to(violations) * torch.relu(violations) * seen).sum(1)
    total = total + settings.opening_weight * (excess.compliance + excess.overrefusal)
    return Penalty(total, violations.detach(), seen)
