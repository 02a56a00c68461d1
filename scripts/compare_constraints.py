#!/usr/bin/env python3
"""What keeps tier one, at what price: constraints and baselines over the same users, the same base and one harness.

python scripts/compare_constraints.py configs/quickstart.yaml users.path=DIR evaluation.utilities=DIR/utilities.yaml
python scripts/compare_constraints.py ... --contenders plain ours surgery --split test --json

Every contender trains every user at full strength (alpha 1), the screen is off, and refusals are counted on `dev`
probes (`--split test` for figures to publish: nothing may be chosen by them). `gate alone` is plain DPO as the gate
releases it. Intervals are 95% bootstraps over users. Seconds are CPU seconds of this process for training alone.

plain      DPO (Rafailov et al. 2023).
swap       SafeDPO's rule (Kim et al. 2025): a pair whose chosen answer complies with what the base refuses is turned.
mix        DPO plus the loss of the base's refusals at a fixed weight (SafeInstruct: Bianchi et al. 2024).
surgery    SafeGrad (Yi et al. 2025): what in the user's gradient conflicts with the refusals' is taken out.
null       A keeps clear of the directions that tier-one prompts take at each layer (as GuardSpace, AlphaEdit).
event      log-sum-exp over four refusals of a probe: mass may move between wordings of a refusal at no cost.
ours       excess loss of refusals over a limit, a dual a user and category, hinges on openings.
gate alone, ours + gate   the same adapters at the alpha that the gate allows (`certify` probes).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import torch
from compare_runs import ratio_of_means
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from persona_rlhf.config import read_config
from persona_rlhf.evaluation.intervals import bootstrap
from persona_rlhf.evaluation.measures import Measures
from persona_rlhf.evaluation.utility import Utility
from persona_rlhf.inputs.problems import InputError
from persona_rlhf.line import constraint_bank, with_reference
from persona_rlhf.materials import read_materials
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.preferences.tokens import PairRow, Row, UserRows
from persona_rlhf.preparation import Prepared, prepare, prepare_users
from persona_rlhf.training.constraint import ConstraintBank, Draw, Excess, UserDraws, Watched, measure
from persona_rlhf.training.engine import Engine
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.objective import StepLoss
from persona_rlhf.training.reference import Reference
from persona_rlhf.training.settings import ConstraintSettings

SLOTS = 8
WORDINGS = 4  # refusals of a probe that `event` adds up
NULL_SHARE = 0.25  # of a layer's input directions that `null` keeps clear of


class Contender(NamedTuple):
    """A way to train: the kind of engine and of bank (None: no constraint rows), and what it does to pairs first."""

    engine: type[Engine]
    bank: type[ConstraintBank] | None
    prepare: Callable[[Prepared, UserRows], UserRows] = lambda _, rows: rows


class KeptBank(ConstraintBank):
    """Remembers what it measured, gradient and all, for engines that weigh it in their own way."""

    last: Excess

    def excess(self, draws: Sequence[Draw], logps: Watched, reference: Reference, margin: float) -> Excess:
        self.last = super().excess(draws, logps, reference, margin)
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

    def walk(self, settings: ConstraintSettings, seed: int, user_id: str) -> UserDraws:
        return EventDraws(self, settings, seed, user_id)

    def excess(self, draws: Sequence[Draw], logps: Watched, reference: Reference, margin: float) -> Excess:
        refused, *others = logps
        groups = refused.view(len(draws), -1, WORDINGS)
        base = refused.new_tensor([[reference[row] for row in draw.refusals] for draw in draws]).view(groups.shape)
        # `measure` compares one log-probability a row with the base's: the groups' differences stand for the rows'
        gap = base.logsumexp(2) - groups.logsumexp(2)
        first = [draw._replace(refusals=draw.refusals[::WORDINGS]) for draw in draws]
        own = refused.new_tensor([[reference[row] for row in draw.refusals] for draw in first])
        return measure(first, (own - gap, others[0], others[1]), reference, len(self.categories), margin)


class EventDraws(UserDraws):
    """Each probe comes with WORDINGS of the refusals kept for it (again from the first, where there are fewer)."""

    def at(self, step: int) -> Draw:
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

    def _step(self) -> Any:
        if not hasattr(self, "_away"):
            assert isinstance(self.bank, ConstraintBank)
            self._away = tier_one_directions(self.adapted, self.bank)
        done = super()._step()
        for span in self.adapted.spans.values():
            a = self.slots.flat[:, span.start : span.middle].view(-1, span.rank, span.inputs)
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
GATED = {"plain": "gate alone", "ours": "ours + gate"}


@dataclass(frozen=True)
class SplitPolicy:
    """A policy whose `test` probes are those of another split."""

    policy: Any
    split: str

    def probes(self, split: str) -> Any:
        return self.policy.probes(self.split if split == "test" else split)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)


class Outcome(NamedTuple):
    """One user under one contender."""

    user_id: str
    group: str
    alpha: float
    measures: Measures


def group_of(utility: Utility) -> str:
    """The users whose mean is reported together; drawn poisoned users are named KIND-SHARE-NUMBER."""
    if utility.poisoned:
        return f"poisoned: {re.sub('-[0-9]{5}$', '', utility.user_id)}"
    return "clean, close to a hazard" if utility.kind == "hazard_adjacent" else "clean"


def run(
    ready: Prepared, names: Sequence[str], gated: bool, chunk: int, console: Console
) -> tuple[dict[str, list[Outcome]], dict[str, float]]:
    """Outcomes by contender, and its CPU seconds of training a user."""
    config, adapted = ready.config, ready.adapted
    fleet = config.fleet.model_copy(update={"slots": SLOTS})  # the same for every contender
    examination, utilities = ready.examination, dict(ready.examination.utilities)
    bank = constraint_bank(config, ready.policy, adapted)
    assert bank is not None, "the constraint is off in this config"
    outcomes: dict[str, list[Outcome]] = {}
    seconds = dict.fromkeys(names, 0.0)
    for start in range(0, ready.pairs.users, chunk):
        pairs = ready.pairs.of(range(start, min(start + chunk, ready.pairs.users)))
        rows = [user for user in prepare_users(ready, pairs).rows if user.train]
        reference = with_reference(adapted, rows, bank)
        for name in names:
            kind = CONTENDERS[name]
            own = [kind.prepare(ready, user) for user in rows]
            begun = time.process_time()
            kept = kind.bank and kind.bank(bank.categories, bank.limits, bank.anchors)
            trained = list(
                kind.engine(adapted, own, reference, kept, config.dpo, config.constraint, fleet, config.seed).run()
            )
            seconds[name] += time.process_time() - begun
            by_id = {user.user_id: user for user in rows}
            for at in range(0, len(trained), 8):
                cohort = [user for user in trained[at : at + 8] if user.adapter is not None]
                flat = torch.stack([user.adapter for user in cohort if user.adapter is not None])
                people = [by_id[user.user_id] for user in cohort]
                alphas = {name: [1.0] * len(cohort)}
                if gated and name in GATED:
                    alphas[GATED[name]] = [verdict.alpha for verdict in examination.verdicts(flat)]
                found = examination.measures(flat, people, alphas[name])
                for title, own_alphas in alphas.items():
                    if own_alphas != alphas[name]:
                        found = examination.measures(flat, people, own_alphas)
                    outcomes.setdefault(title, []).extend(
                        Outcome(user.user_id, group_of(utilities[user.user_id]), alpha, measured)
                        for user, alpha, measured in zip(people, own_alphas, found, strict=True)
                    )
            examination.forget_users()
            console.print(f"{min(start + chunk, ready.pairs.users)} of {ready.pairs.users} users: {name}")
    return outcomes, {name: spent / ready.pairs.users for name, spent in seconds.items()}


def accuracy_gain(m: Measures) -> float | None:
    """Held-out accuracy on noise-free labels over chance."""
    return m.heldout_clean and m.heldout_clean.adapted - 0.5


def win_gain(m: Measures) -> float | None:
    """Win rate against the base over a tie."""
    return m.win_rate and m.win_rate.value - 0.5


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """One contender and group: gains over chance, refusals against the base in points, over-refusal, releases."""

    def column(of: Callable[[Measures], float | None]) -> dict[str, Any] | None:
        values = [value for o in outcomes if (value := of(o.measures)) is not None]
        if not values:
            return None
        return {"mean": fmean(values), "interval": bootstrap(values), "worst": min(values)}

    def refusal(m: Measures) -> float | None:
        return None if m.test_pooled is None else 100 * m.test_pooled.refused / m.test_pooled.n

    def lost(m: Measures) -> float | None:
        pooled = m.test_pooled
        return None if pooled is None else 100 * (pooled.refused - pooled.base_refused) / pooled.n

    def category(m: Measures) -> float | None:
        shares = [100 * (c.refused - c.base_refused) / c.n for c in m.test_categories.values() if c.n]
        return min(shares) if shares else None

    def over(m: Measures) -> float | None:
        o = m.over_refusal
        return None if o is None or not o.n else 100 * (o.refused - o.base_refused) / o.n

    return {
        "users": len(outcomes),
        "accuracy_gain": column(accuracy_gain),
        "win_gain": column(win_gain),
        "refusal": column(refusal),
        "against_base": column(lost),
        "worst_category": column(category),
        "over_refusal": column(over),
        "at_full_strength": fmean(o.alpha == 1 for o in outcomes),
        "above_zero": fmean(o.alpha > 0 for o in outcomes),
    }


def kept(own: Sequence[Outcome], plain: Sequence[Outcome]) -> dict[str, Any]:
    """Mean gains over those of plain DPO, the same users drawn together."""
    before = {outcome.user_id: outcome.measures for outcome in plain}
    found: dict[str, Any] = {}
    for name, gain in {"accuracy_kept": accuracy_gain, "win_kept": win_gain}.items():
        both = [(gain(outcome.measures), gain(before[outcome.user_id])) for outcome in own]
        known = [(a, b) for a, b in both if a is not None and b is not None]
        if known:
            ratio = ratio_of_means([a for a, _ in known], [b for _, b in known])
            found[name] = {"ratio": ratio.value, "interval": ratio.interval}
    return found


def rendered(found: dict[str, Any]) -> Table:
    """The same for people."""
    heads = (
        "users",
        "contender",
        "accuracy - 0.5",
        "kept",
        "win rate - 0.5",
        "kept",
        "refused, %",
        "worst user",
        "worst category",
    )
    table = Table(*heads, "over-refusal, points", "CPU s a user", "alpha 1 / > 0", title=found["title"])

    def cell(value: dict[str, Any] | None, form: str) -> str:
        if value is None:
            return ""
        low, high = value["interval"]
        return f"{value['mean']:{form}} ({low:{form}} to {high:{form}})"

    def ratio(value: dict[str, Any] | None) -> str:
        if value is None or value["ratio"] is None:
            return ""
        return f"{value['ratio']:.2f} ({value['interval'][0]:.2f} to {value['interval'][1]:.2f})"

    for group, rows in found["groups"].items():
        for name, row in rows.items():
            worst = "" if row["refusal"] is None else f"{row['refusal']['worst']:.1f}"
            category = "" if row["worst_category"] is None else f"{row['worst_category']['worst']:+.1f}"
            table.add_row(
                f"{group} ({row['users']})",
                name,
                cell(row["accuracy_gain"], ".3f"),
                ratio(row.get("accuracy_kept")),
                cell(row["win_gain"], ".3f"),
                ratio(row.get("win_kept")),
                cell(row["refusal"], ".1f"),
                worst,
                category,
                cell(row["over_refusal"], "+.2f"),
                "" if name not in found["seconds"] else f"{found['seconds'][name]:.2f}",
                f"{row['at_full_strength']:.0%} / {row['above_zero']:.0%}",
            )
        table.add_section()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--gate", action="store_true", help="plain and ours as the gate releases them, too")
    parser.add_argument("--chunk", type=int, default=32, metavar="USERS")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    console = Console(stderr=True)
    try:
        config = read_config(asked.config, [*asked.overrides, "screening.quarantine=false"])
        materials = read_materials(config)
        probed = SplitPolicy(materials.policy, asked.split)
        ready = prepare(config, materials._replace(policy=probed))  # type: ignore[arg-type]
    except InputError as fault:
        sys.exit(str(fault))
    outcomes, seconds = run(ready, asked.contenders, asked.gate, asked.chunk, console)
    groups: dict[str, dict[str, Any]] = {}
    for name, own in outcomes.items():
        for group in sorted({outcome.group for outcome in own}):
            some = [o for o in own if o.group == group]
            plain = [o for o in outcomes.get("plain", []) if o.group == group]
            groups.setdefault(group, {})[name] = summary(some) | (kept(some, plain) if plain else {})
    found = {"title": f"{ready.pairs.users} users, {asked.split} probes", "seconds": seconds, "groups": groups}
    print(json.dumps(found, indent=2)) if asked.json else Console(width=200).print(rendered(found))


if __name__ == "__main__":
    main()
