"""The constraint and its rivals: ways to train a user under tier one, as engines and banks that replace ours.

plain      DPO (Rafailov et al. 2023).
swap       SafeDPO's rule (Kim et al. 2025): a pair whose chosen answer complies with what the base refuses is turned.
mix        DPO plus the loss of the base's refusals at a fixed weight (SafeInstruct: Bianchi et al. 2024).
surgery    SafeGrad (Yi et al. 2025): what in the user's gradient conflicts with the refusals' is taken out.
null       A keeps clear of the directions that tier-one prompts take at each layer (as GuardSpace, AlphaEdit).
event      log-sum-exp over four refusals of a probe: mass may move between wordings of a refusal at no cost.
ours       excess loss of refusals over a limit, a dual a user and category, hinges on openings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.config.training import ConstraintSettings
from persona_rlhf.data.tokenize import PairRow, Row, UserRows
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.pipeline.prepare import Prepared
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.training.constraint import (
    ConstraintBank,
    ConstraintLogps,
    ConstraintSample,
    ConstraintSampler,
    ReferenceLogps,
    Violation,
    measure_violation,
)
from persona_rlhf.training.engine import Engine
from persona_rlhf.training.objective import StepLoss

WORDINGS = 4  # refusals of a probe that `event` adds up
NULL_SHARE = 0.25  # of a layer's input directions that `null` keeps clear of


class Contender(NamedTuple):
    """A way to train: the kind of engine and of bank (None: no constraint rows), and what it does to pairs first."""

    engine: type[Engine]
    bank: type[ConstraintBank] | None
    prepare: Callable[[Prepared, UserRows], UserRows] = lambda _, rows: rows


class KeptBank(ConstraintBank):
    """Remembers what it measured, gradient and all, for engines that weigh it in their own way."""

    last: Violation

    def excess(
        self,
        draws: Sequence[ConstraintSample],
        logps: ConstraintLogps,
        reference: ReferenceLogps,
        settings: ConstraintSettings,
    ) -> Violation:
        self.last = super().excess(draws, logps, reference, settings)
        return self.last


class MixEngine(Engine):
    """The refusals' loss at weight 1, whatever the user's state (an excess differs from a loss by a constant)."""

    def _gradient(self, loss: StepLoss, learning: Float[Tensor, "users params"]) -> Float[Tensor, "users params"]:
        assert isinstance(self.bank, KeptBank)
        total = loss.dpo + self.bank.last.refusal.mean(1)
        return torch.autograd.grad(total.sum(), [learning])[0]


class SurgeryEngine(Engine):
    """`g = g_user - (g_user . g_safe / |g_safe|^2) g_safe` where they conflict, plus `g_safe`: two ways back a step."""

    def _gradient(self, loss: StepLoss, learning: Float[Tensor, "users params"]) -> Float[Tensor, "users params"]:
        assert isinstance(self.bank, KeptBank)
        found, weight = self.bank.last, self.constraint.opening_weight
        safe_loss = found.refusal.mean(1) + weight * (found.compliance + found.overrefusal)
        [user] = torch.autograd.grad(loss.dpo.sum(), [learning], retain_graph=True)
        [safe] = torch.autograd.grad(safe_loss.sum(), [learning])
        along = (user * safe).sum(1, keepdim=True).clamp(max=0) / (safe * safe).sum(1, keepdim=True).clamp(min=1e-12)
        return user - along * safe + safe


class EventBank(ConstraintBank):
    """`log sum_k pi_ref(y_k|x) - log sum_k pi_user(y_k|x)` over WORDINGS refusals of a probe.

    `P_user(R) >= P_user(y_1..y_K) = P_ref(y_1..y_K) exp(-c)`: a bound by the mass of these wordings alone, which for
    long answers is a small part of the mass of all refusals, so it is no useful bound.
    """

    def walk(self, settings: ConstraintSettings, seed: int, user_id: str) -> ConstraintSampler:
        return EventDraws(self, settings, seed, user_id)

    def excess(
        self,
        draws: Sequence[ConstraintSample],
        logps: ConstraintLogps,
        reference: ReferenceLogps,
        settings: ConstraintSettings,
    ) -> Violation:
        refused = logps.refusals
        groups = refused.view(len(draws), -1, WORDINGS)
        base = refused.new_tensor([[reference[row] for row in draw.refusals] for draw in draws]).view(groups.shape)
        # `measure` compares one log-probability a row with the base's: the groups' differences stand for the rows'
        gap = base.logsumexp(2) - groups.logsumexp(2)
        first = [draw._replace(refusals=draw.refusals[::WORDINGS]) for draw in draws]
        own = refused.new_tensor([[reference[row] for row in draw.refusals] for draw in first])
        shortened = logps._replace(refusals=own - gap)
        wrong = [own.wrong for own in self.lessons]
        return measure_violation(first, shortened, reference, len(self.categories), wrong, settings)


class EventDraws(ConstraintSampler):
    """Each probe comes with WORDINGS of the refusals kept for it (again from the first, where there are fewer)."""

    def at(self, step: int) -> ConstraintSample:
        draw = super().at(step)
        known: dict[Row, tuple[Row, ...]] = {
            row: anchor.refusals for own in self.bank.anchors for anchor in own for row in anchor.refusals
        }
        rows: list[Row] = []
        for row in draw.refusals:
            wordings = known[row]
            rows += [wordings[n % len(wordings)] for n in range(WORDINGS)]
        return draw._replace(refusals=rows)


class NullEngine(Engine):
    """After each step `A <- A - A U U^T`, U the main directions of a layer's inputs on tier-one refusals."""

    def _step(self, say: Callable[[str], None]) -> Any:
        if not hasattr(self, "_away"):
            assert isinstance(self.bank, ConstraintBank)
            self._away = tier_one_directions(self.adapted, self.bank)
        done = super()._step(say)
        for span in self.adapted.spans.values():
            a = self.slots.flat[:, span.start : span.b_start].view(-1, span.rank, span.inputs)
            a -= a @ self._away[span.name]
        return done


@torch.no_grad()
def tier_one_directions(adapted: AdaptedModel, bank: ConstraintBank) -> dict[str, Float[Tensor, "inputs inputs"]]:
    """By layer the projector on the directions that carry most of the inputs' energy on refusal rows."""
    sums: dict[str, Tensor] = {}
    hooks = []
    for span in adapted.spans.values():

        def add(_: Any, inputs: tuple[Tensor, ...], name: str = span.name) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            sums[name] = sums.get(name, torch.zeros(())) + x.T @ x

        hooks.append(adapted.layer(span).register_forward_pre_hook(add))
    rows = [anchor.refusals[0] for own in bank.anchors for anchor in own]
    with adapted.using(None):
        adapted.score([rows])
    for hook in hooks:
        hook.remove()
    found = {}
    for name, energy in sums.items():
        vectors = torch.linalg.eigh(energy).eigenvectors[:, -int(NULL_SHARE * energy.shape[0]) :]
        found[name] = (vectors @ vectors.T).float()
    return found


def turned(ready: Prepared, user: UserRows) -> UserRows:
    """Where the base refuses, pairs whose chosen answer complies and whose rejected one refuses, turned round."""
    refuses = ready.examination.base_refuses([pair.chosen.prompt for pair in user.train])
    train = []
    for pair, refused in zip(user.train, refuses, strict=True):
        wrong = refused and is_refusal(pair.pair.rejected) and not is_refusal(pair.pair.chosen)
        train.append(PairRow(pair.pair, pair.rejected, pair.chosen) if wrong else pair)
    return user._replace(train=train)


CONTENDERS = {
    "plain": Contender(Engine, None),
    "swap": Contender(Engine, None, turned),
    "mix": Contender(MixEngine, KeptBank),
    "surgery": Contender(SurgeryEngine, KeptBank),
    "null": Contender(NullEngine, ConstraintBank),
    "event": Contender(Engine, EventBank),
    "ours": Contender(Engine, ConstraintBank),
}
