"""Rivals of the constraint: ways to train a user under tier one, as plug-ins of the one training loop.

plain      DPO (Rafailov et al. 2023).
swap       SafeDPO's rule (Kim et al. 2025): a pair whose chosen answer complies with what the base refuses is turned.
mix        DPO plus the loss of the base's refusals at a fixed weight (SafeInstruct: Bianchi et al. 2024). Up to a
           constant, this is an estimate of the divergence KL(base || user) over refusals.
primal     a dual variable per user and category alone, without the square and the hinges on openings (as
           primal-dual DPO, arXiv 2510.05703).
surgery    SafeGrad (Yi et al. 2025): the part of the user's gradient that conflicts with the refusals' is removed.
null       A keeps clear of the directions that tier-one prompts take at each layer (as GuardSpace, AlphaEdit).
ours       excess loss of refusals over a limit, a dual variable per user and category, hinges on openings.
squared    the same with the square of the violation, four refusal rows a step, and an anchor: for all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.config.experiment import Config
from persona_rlhf.config.training import ConstraintSettings, FleetSettings
from persona_rlhf.data.tokenize import PairRow, UserRows
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.pipeline.prepare import Prepared
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.training.cache import Reference
from persona_rlhf.training.constraint import (
    ConstraintData,
    ConstraintFunctional,
    ConstraintSample,
    LagrangianConstraint,
    Penalty,
)
from persona_rlhf.training.engine import Engine, GradientRule, TrainedUser, total_gradient
from persona_rlhf.training.objective import StepLoss

NULL_SHARE = 0.25  # of a layer's input directions that `null` keeps clear of

Projection = Callable[[Float[Tensor, "users params"]], None]
"""A change of the adapters in place, after each step."""


class Contender(NamedTuple):
    """A way to train: the constraint (None: no constraint rows), the gradient of its loss, what it does to pairs first
    and to adapters after each step, and the anchor (`dpo.anchor`; None: the config's)."""

    constraint: Callable[[ConstraintData, ConstraintSettings, int], ConstraintFunctional] | None
    gradient: GradientRule = total_gradient
    prepare: Callable[[Prepared, UserRows], UserRows] = lambda _, rows: rows
    projection: Callable[[AdaptedModel, ConstraintData], Projection] | None = None
    anchor: float | None = None

    def train(
        self,
        adapted: AdaptedModel,
        users: Sequence[UserRows],
        reference: Reference,
        data: ConstraintData,
        config: Config,
        fleet: FleetSettings,
    ) -> list[TrainedUser]:
        """Trains these users in the one training loop."""
        constraint = self.constraint and self.constraint(data, config.constraint, config.seed)
        dpo = config.dpo if self.anchor is None else config.dpo.model_copy(update={"anchor": self.anchor})
        engine = Engine(adapted, users, reference, constraint, dpo, fleet, config.seed, gradient=self.gradient)
        if self.projection is None:
            return list(engine.run())
        project = self.projection(adapted, data)
        return list(engine.run(lambda _: project(engine.slots.flat)))


class FixedWeights(LagrangianConstraint):
    """The refusals' loss at weight 1 and the hinges on openings, whatever the user's state: an excess differs from a
    loss by a constant. The dual variables are recorded and weigh nothing."""

    def penalty(
        self,
        samples: Sequence[ConstraintSample],
        logps: Float[Tensor, "users rows"],
        base: Float[Tensor, "users rows"],
        duals: Float[Tensor, "users names"],
    ) -> Penalty:
        means, _ = self.losses(samples, logps, base)
        openings = means[:, len(self.names)] + means[:, len(self.names) + 1]
        total = means[:, : len(self.data.categories)].mean(1) + self.settings.opening_weight * openings
        return super().penalty(samples, logps, base, duals)._replace(total=total)


def refusal_mix(data: ConstraintData, settings: ConstraintSettings, seed: int) -> FixedWeights:
    """The refusals' loss alone."""
    return FixedWeights(data, settings.model_copy(update={"opening_weight": 0.0}), seed)


def primal_dual(data: ConstraintData, settings: ConstraintSettings, seed: int) -> LagrangianConstraint:
    """Dual variables on the loss of refusals, without its square and the hinges on openings."""
    return LagrangianConstraint(data, settings.model_copy(update={"opening_weight": 0.0, "quadratic": 0.0}), seed)


def squared(data: ConstraintData, settings: ConstraintSettings, seed: int) -> LagrangianConstraint:
    """The shipped constraint, stiff enough for all layers."""
    return LagrangianConstraint(data, settings.model_copy(update={"quadratic": 10.0, "rows_per_step": 4}), seed)


def surgery(loss: StepLoss, adapters: Float[Tensor, "users params"]) -> Float[Tensor, "users params"]:
    """`g = g_user - (g_user . g_safe / |g_safe|^2) g_safe` where they conflict, plus `g_safe`: two backward passes."""
    assert loss.penalty is not None
    [user] = torch.autograd.grad(loss.dpo.sum(), [adapters], retain_graph=True)
    [safe] = torch.autograd.grad(loss.penalty.sum(), [adapters])
    along = (user * safe).sum(1, keepdim=True).clamp(max=0) / (safe * safe).sum(1, keepdim=True).clamp(min=1e-12)
    return user - along * safe + safe


def null_space(adapted: AdaptedModel, data: ConstraintData) -> Projection:
    """After each step `A <- A - A U U^T`, U the main directions of a layer's inputs on tier-one refusals."""
    directions = tier_one_directions(adapted, data)

    def project(flat: Float[Tensor, "users params"]) -> None:
        for span in adapted.spans.values():
            a = flat[:, span.start : span.b_start].view(-1, span.rank, span.inputs)
            a -= a @ directions[span.name]

    return project


@torch.no_grad()
def tier_one_directions(adapted: AdaptedModel, data: ConstraintData) -> dict[str, Float[Tensor, "inputs inputs"]]:
    """By layer the projector on the directions that carry most of the inputs' energy on refusal rows."""
    energies: dict[str, Tensor] = {}
    hooks = []
    for span in adapted.spans.values():

        def add(_: Any, inputs: tuple[Tensor, ...], name: str = span.name) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            energies[name] = energies.get(name, torch.zeros(())) + x.T @ x

        hooks.append(adapted.layer(span).register_forward_pre_hook(add))
    rows = [example.refusals[0] for examples in data.examples for example in examples]
    with adapted.using(None):
        adapted.score([rows])
    for hook in hooks:
        hook.remove()
    projectors = {}
    for name, energy in energies.items():
        vectors = torch.linalg.eigh(energy).eigenvectors[:, -int(NULL_SHARE * energy.shape[0]) :]
        projectors[name] = (vectors @ vectors.T).float()
    return projectors


def turned(ready: Prepared, user: UserRows) -> UserRows:
    """The user's pairs, with chosen and rejected exchanged where the base refuses the prompt, the chosen answer
    complies and the rejected one refuses."""
    refused = ready.examination.base_refuses([pair.chosen.prompt for pair in user.train])
    train = []
    for pair, base_refused in zip(user.train, refused, strict=True):
        harmful = base_refused and is_refusal(pair.pair.rejected) and not is_refusal(pair.pair.chosen)
        train.append(PairRow(pair.pair, pair.rejected, pair.chosen) if harmful else pair)
    return user._replace(train=train)


CONTENDERS = {
    "plain": Contender(None),
    "swap": Contender(None, prepare=turned),
    "mix": Contender(refusal_mix),
    "primal": Contender(primal_dual),
    "surgery": Contender(FixedWeights, gradient=surgery),
    "null": Contender(LagrangianConstraint, projection=null_space),
    "ours": Contender(LagrangianConstraint),
    "squared": Contender(squared, anchor=0.3),
}
