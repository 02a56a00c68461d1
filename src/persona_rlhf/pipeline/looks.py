"""The gate of a run: each look of a user is counted in the ledger and in the audit trail, and then judged."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import pseudonym
from persona_rlhf.common.version import __version__
from persona_rlhf.config.experiment import Config
from persona_rlhf.data.pool_copies import pool_copies
from persona_rlhf.data.store import PairStore
from persona_rlhf.data.tokenize import UserRows
from persona_rlhf.evaluation.answer_judge import judge_hashes
from persona_rlhf.evaluation.evaluator import Evaluator
from persona_rlhf.evaluation.gate import Demands, Verdict
from persona_rlhf.evaluation.ledger import LOOKS, Family, KeptHead, Ledger, LookKey, LookPlan
from persona_rlhf.evaluation.sequential import shortages, units_drawn
from persona_rlhf.evaluation.spending import Spending
from persona_rlhf.evaluation.still_base import StillBase
from persona_rlhf.pipeline.inputs import facts_of, ordinary_of
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.policy.policy import Policy
from persona_rlhf.policy.private_banks import PrivatePool, unit_name
from persona_rlhf.release import integrity
from persona_rlhf.release.deletion_records import forgotten
from persona_rlhf.release.integrity import JUDGED, LOOKED, RETESTED, heads_of_neighbours, kept_heads, looked
from persona_rlhf.release.report import config_of

_NOT_THE_EXAM: dict[str, bool | set[str]] = {"ledger": True, "valid_days": True, "judge_model": {"model", "template"}}
"""Keys of `gate` that change no verdict, and paths whose files `judge_hashes` covers."""


class Recorded(NamedTuple):
    """The likeness of a user's adapter and the base at its release, by alpha, and its `Spending.heldout`."""

    still_base: Mapping[float, StillBase]
    heldout: str | None


EarlierLooks = list[list[tuple[LookKey, bool]]]
"""Rounds of closed looks, at most one of each user in a round."""


class JudgedLook(NamedTuple):
    """The verdict of a look, and the part of delta that it spent."""

    verdict: Verdict
    spending: Spending


@dataclass
class GateLooks:
    """The gate of one run. `audit_run` is the run whose audit trail keeps the heads of the ledger.

    bank, exam: as in `LookKey`
    earlier: looks of the run before there was a ledger (`earlier_looks`), entered before the first
    plan: looks that the run shares with others, such as those of a sweep
    family: the users who share one delta (`gate.family: all`)
    pool: names of the units from which looks draw (`gate.sequential`)
    """

    evaluator: Evaluator
    ledger: Ledger
    audit_run: Path
    bank: str
    exam: str
    earlier: EarlierLooks
    plan: LookPlan | None = None
    family: Family | None = None
    pool: Sequence[str] = ()

    def judge(
        self,
        users: Sequence[str],
        flat: Float[Tensor, "users params"],
        rows: Sequence[UserRows] = (),
        recorded: Sequence[Recorded] = (),
    ) -> list[JudgedLook]:
        """The gate's verdicts on one adapter of each user, at the level of the user's look.

        `rows`: those of each user, whose held-out pairs may hold the adapter back; without them no pair does.
        `recorded`: in place of measures, those of an adapter that was released.

        The look is on the disk before the first probe is asked, and its head in the audit trail. Of a look that was
        closed before, the first verdict stands: a failed adapter stays held back, and one that passed is released at
        most at the alpha recorded. Raises InputError for a ledger that has forgotten looks.
        """
        heldout = (
            [one.heldout for one in recorded] or [self._heldout(of_user) for of_user in rows] or [None] * len(users)
        )
        keys = [
            LookKey(
                pseudonym(user),
                _digest(adapter),
                self.bank,
                self.exam if pairs is None else _sha256([self.exam, pairs]),
            )
            for user, adapter, pairs in zip(users, flat, heldout, strict=True)
        ]
        self.earlier = enter_earlier(self.ledger, self.audit_run, self.earlier)
        sequential = self.evaluator.gate.enabled and self.evaluator.gate.sequential
        looks = self.ledger.open(keys, sequential, self.plan, self.family, self.pool)
        integrity.append_all(self.audit_run, [looked(self.ledger)])
        demands = self.evaluator.demands
        units = [self.ledger.fresh_units(key, self.pool) for key in keys]
        of_looks = [demands.at_look(look.share, look.number) for look in looks]
        draws, measures = [[unit.name for unit in fresh] for fresh in units], [one.still_base for one in recorded]
        verdicts = self.evaluator.verdicts(flat, of_looks, draws, rows, measures, users)
        drawn = [units_drawn(verdict) if sequential else 0 for verdict in verdicts]
        columns = zip(keys, looks, units, drawn, strict=True)
        ends = {key: fresh[n - 1].place if n else look.start for key, look, fresh, n in columns} if sequential else {}
        allowed = (verdict.alpha if verdict.certified else 0.0 for verdict in verdicts)
        closed = self.ledger.close(zip(keys, allowed, strict=True), ends)
        if self.evaluator.gate.enabled:
            verdicts = [self._at_most(*of_user) for of_user in zip(verdicts, closed, of_looks, strict=True)]
        integrity.append_all(self.audit_run, [looked(self.ledger)])
        size = len(self.pool)
        pools = [(size, size - len(fresh) + n) if sequential else () for fresh, n in zip(units, drawn, strict=True)]
        spendings = [
            Spending.of_look(look, demands.delta, demands.judge_delta, *of_pool)._replace(heldout=pairs)
            for look, of_pool, pairs in zip(looks, pools, heldout, strict=True)
        ]
        return list(map(JudgedLook, verdicts, spendings))

    def _heldout(self, rows: UserRows) -> str | None:
        """sha256 of the tokens of a user's held-out pairs; None where they decide nothing."""
        gate = self.evaluator.gate
        tested = gate.enabled and gate.still_base is not None and gate.still_base.pairs_level is not None
        tokens = sorted((pair.chosen, pair.rejected) for pair in rows.heldout)
        return _sha256(tokens) if tested and tokens else None

    def _at_most(self, verdict: Verdict, recorded: float, demands: Demands) -> Verdict:
        """A verdict that allows no more than the alpha that the ledger recorded for its look."""
        if verdict.alpha <= recorded:
            return verdict
        lower = [test for test in verdict.looks if test.passed and test.alpha <= recorded]
        if lower:
            test = max(lower, key=lambda one: one.alpha)
            reason = f"passed up to alpha {test.alpha:g}; an earlier verdict at this look of the adapter allows no more"
            return verdict._replace(alpha=test.alpha, reason=reason, pooled=test.pooled, categories=test.categories)
        earlier = f"allowed alpha {recorded:g} only, which was not tested now" if recorded else "held it back"
        reason = f"held back: the earlier verdict at this look of the adapter decides, and it {earlier}"
        pooled, categories = self.evaluator.base_counts(demands)
        return verdict._replace(
            alpha=0.0, admitted=False, reason=reason, pooled=pooled, categories=categories, clusters=None
        )


def gate_looks(
    config: Config,
    policy: Policy,
    evaluator: Evaluator,
    audit_run: Path,
    users: Iterable[str],
    plan: LookPlan | None = None,
) -> GateLooks:
    """The gate of a run over `users` (pseudonyms); the run's forgotten users count as its users too.

    Raises InputError for a ledger that cannot be used; nothing is written.
    """
    gate, ledger = evaluator.gate, ledger_of(config, audit_run)
    shared = gate.enabled and gate.family == "all"
    family = Family.of({*users, *forgotten(audit_run)}) if shared else None
    ledger.check(family)
    exam, earlier = _exam(config, policy, evaluator), earlier_looks(audit_run)
    private = policy.private if gate.enabled and gate.sequential else None
    copies = [copy.probe for copy in pool_copies(policy)] if private is not None else []
    pool = () if private is None else _pool(private.pool, evaluator, ledger, copies)
    return GateLooks(evaluator, ledger, audit_run, policy.bank.sha256, exam, earlier, plan, family, pool)


def _pool(pool: PrivatePool, evaluator: Evaluator, ledger: Ledger, copies: Iterable[Probe] = ()) -> list[str]:
    """The names of the units from which looks draw: those of no draw that looks were taken at, without near copies.

    Raises InputError where they are too few for a first look that could pass.
    """
    certified = pool.units_in(draw for draw in pool.draws if ledger.uses(draw.sha256)) | set(map(unit_name, copies))
    units = {name: unit for name, unit in evaluator.pool.items() if name not in certified}
    if problems := shortages(evaluator.first_look, list(units.values())):
        raise InputError(problems)
    return list(units)


def users_of(pairs: PairStore) -> list[str]:
    """The pseudonyms of the users who have pairs."""
    return [user[0] for user in pairs.user_digests if user is not None]


def ledger_of(config: Config, run: Path) -> Ledger:
    """The ledger that a run counts in: that of `gate.ledger`, or one in the run's folder.

    Raises InputError where the folder of `gate.ledger` does not exist, or its name is that of a ledger's key or head.
    """
    file = config.gate.ledger
    if file is not None and not file.parent.is_dir():
        sentence = "this folder does not exist; make it, or name the ledger of other runs"
        raise InputError([Problem(str(file.parent), None, "gate.ledger", sentence)])
    if file is not None and file.suffix in (".key", ".head"):
        sentence = "a ledger keeps its key and its head in files of such names; name it otherwise, such as looks.jsonl"
        raise InputError([Problem(str(file), None, "gate.ledger", sentence)])
    if file is None:
        return Ledger(run / LOOKS, kept_heads(run))
    beside = heads_of_neighbours(run, Ledger(file).mark) if file.exists() else _heads_of_deleted(run, file)
    return Ledger(file, [*kept_heads(run), *beside])


def _heads_of_deleted(run: Path, file: Path) -> list[KeptHead]:
    """The heads of a ledger that is not there, in the other runs of the same folder whose config names it.

    Without its file a ledger has no mark to recognise it by. `gate.ledger` is read as from the folder of this process.
    """
    heads = []
    for other in sorted(run.absolute().parent.glob("*/config.yaml")):
        gate = config_of(other.parent).get("gate")
        named = gate.get("ledger") if isinstance(gate, dict) else None
        if other.parent != run.absolute() and named is not None and Path(str(named)).resolve() == file.resolve():
            heads += kept_heads(other.parent)
    return heads


def earlier_looks(run: Path) -> EarlierLooks:
    """The looks in the audit trail of a run that began before there was a ledger: of each user the first, and so on."""
    rounds: EarlierLooks = []
    looks_of = Counter[str]()
    for entry in integrity.read(run):
        if entry.event == LOOKED:
            return []
        if entry.event in (JUDGED, RETESTED):
            user = str(entry.facts["user"])
            if looks_of[user] == len(rounds):
                rounds.append([])
            rounds[looks_of[user]].append((LookKey(user, entry.hash, bank="", exam=""), entry.facts["certified"]))
            looks_of[user] += 1
    return rounds


def enter_earlier(ledger: Ledger, run: Path, earlier: EarlierLooks) -> EarlierLooks:
    """Enters earlier looks, which can be done again after a kill; none is left."""
    for looks in earlier:
        ledger.open([key for key, _ in looks])
        ledger.close(looks)
    if earlier:
        integrity.append_all(run, [looked(ledger)])
    return []


def _exam(config: Config, policy: Policy, evaluator: Evaluator) -> str:
    """sha256 of everything besides an adapter that decides its verdict."""
    composed = evaluator.composition.record("")  # users' wishes are in the hash of the policy
    return _sha256(
        ({"composed": composed} if composed else {})
        | {
            "bank": policy.bank,
            "policy": policy.hash,
            "demands": asdict(evaluator.demands),
            "gate": evaluator.gate.model_dump(mode="json", exclude=_NOT_THE_EXAM),
            "judges": judge_hashes(evaluator.gate),
            "toolkit": __version__,
            "base": evaluator.base.weights_hash,
            "lora": config.lora.model_dump(mode="json"),
            "conditions": evaluator.conditions,
            "seed": config.seed,
            "ordinary": ordinary_of(config),
            "facts": facts_of(config),
            "harmless_prompts": config.evaluation.harmless_prompts,
        }
    )


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=_sorted).encode()).hexdigest()


def _sorted(names: Iterable[str]) -> list[str]:
    return sorted(names)


def _digest(adapter: Float[Tensor, " params"]) -> str:
    """sha256 of an adapter's values in float32."""
    return hashlib.sha256(adapter.detach().to("cpu", torch.float32).numpy().tobytes()).hexdigest()
