"""The gate of a run: each look of a user is counted in the ledger and in the audit trail, and then judged."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import pseudonym
from persona_rlhf.config.experiment import Config
from persona_rlhf.evaluation.evaluator import Evaluator
from persona_rlhf.evaluation.gate import Verdict
from persona_rlhf.evaluation.ledger import LOOKS, Ledger, LookKey, LookPlan, Spending
from persona_rlhf.pipeline.inputs import facts_of, ordinary_of
from persona_rlhf.policy.policy import Policy
from persona_rlhf.release import integrity
from persona_rlhf.release.integrity import JUDGED, LOOKED, RETESTED, kept_heads, looked

_NOT_THE_EXAM = {"ledger", "valid_days"}  # keys of `gate` that change no verdict


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
    """

    evaluator: Evaluator
    ledger: Ledger
    audit_run: Path
    bank: str
    exam: str
    earlier: EarlierLooks
    plan: LookPlan | None = None

    def judge(self, users: Sequence[str], flat: Float[Tensor, "users params"]) -> list[JudgedLook]:
        """The gate's verdicts on one adapter of each user, at the level of the user's look.

        The look is on the disk before the first probe is asked, and its head in the audit trail. Raises InputError for
        a ledger that has forgotten looks.
        """
        keys = [
            LookKey(pseudonym(user), _digest(adapter), self.bank, self.exam)
            for user, adapter in zip(users, flat, strict=True)
        ]
        self.earlier = enter_earlier(self.ledger, self.audit_run, self.earlier)
        sequential = self.evaluator.gate.sequential
        looks = self.ledger.open(keys, sequential, self.plan)
        integrity.append_all(self.audit_run, [looked(self.ledger)])
        demands = self.evaluator.demands
        draws = [self.ledger.draws(key.user, look.number) for key, look in zip(keys, looks, strict=True)]
        verdicts = self.evaluator.verdicts(flat, [demands.at_look(look.share) for look in looks], draws)
        self.ledger.close((key, verdict.certified) for key, verdict in zip(keys, verdicts, strict=True))
        integrity.append_all(self.audit_run, [looked(self.ledger)])
        return [
            JudgedLook(verdict, Spending.of_look(look, demands.delta, demands.judge_delta))
            for verdict, look in zip(verdicts, looks, strict=True)
        ]


def gate_looks(
    config: Config, policy: Policy, evaluator: Evaluator, audit_run: Path, plan: LookPlan | None = None
) -> GateLooks:
    """The gate of a run. Raises InputError for a ledger that cannot be used; nothing is written."""
    ledger = ledger_of(config, audit_run)
    ledger.check()
    exam = _exam(config, policy, evaluator)
    return GateLooks(evaluator, ledger, audit_run, policy.bank.sha256, exam, earlier_looks(audit_run), plan)


def ledger_of(config: Config, run: Path) -> Ledger:
    """The ledger that a run counts in: that of `gate.ledger`, or one in the run's folder.

    Raises InputError where the folder of `gate.ledger` does not exist.
    """
    file = config.gate.ledger
    if file is not None and not file.parent.is_dir():
        sentence = "this folder does not exist; make it, or name the ledger of other runs"
        raise InputError([Problem(str(file.parent), None, "gate.ledger", sentence)])
    return Ledger(file or run / LOOKS, kept_heads(run))


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
    return _sha256(
        {
            "bank": policy.bank,
            "policy": policy.hash,
            "demands": asdict(evaluator.demands),
            "gate": evaluator.gate.model_dump(mode="json", exclude=_NOT_THE_EXAM),
            "base": evaluator.base.weights_hash,
            "conditions": evaluator.conditions,
            "seed": config.seed,
            "ordinary": ordinary_of(config),
            "facts": facts_of(config),
        }
    )


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=_sorted).encode()).hexdigest()


def _sorted(names: Iterable[str]) -> list[str]:
    return sorted(names)


def _digest(adapter: Float[Tensor, " params"]) -> str:
    """sha256 of an adapter's values in float32."""
    return hashlib.sha256(adapter.detach().to("cpu", torch.float32).numpy().tobytes()).hexdigest()
