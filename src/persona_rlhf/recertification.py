"""`recertify`: the released adapters of a finished run under new policy documents, without training anybody again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from persona_rlhf.config import Config, read_config
from persona_rlhf.evaluation.classifiers import load_classifier
from persona_rlhf.evaluation.examination import Examination
from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.materials import facts_of
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.policy.tiers import Policy
from persona_rlhf.release import audit
from persona_rlhf.release.peft_folder import read_adapter
from persona_rlhf.release.recertified import Recertified, Retested
from persona_rlhf.release.results import Result, RunResults
from persona_rlhf.release.revocation import revoke, revoked
from persona_rlhf.release.seal import SEAL, seal
from persona_rlhf.release.trail import recertified, retested
from persona_rlhf.release.verify import paper_faults
from persona_rlhf.run_folder import RunFolder
from persona_rlhf.training.base import load_base
from persona_rlhf.training.fleet import AdaptedModel

_COHORT = 32  # users tested together


def recertify(run: Path, documents: Sequence[Path], say: Callable[[str], None]) -> Recertified:
    """Puts every released adapter through the gate of the new documents, revokes those that may not stay as they are,
    and enters all of it (each look at certify too) in the audit trail. Nothing else of the run changes.

    The gate is the one that a new run would have: same alphas, same levels, on the adapter as it was trained (its
    released scale divided out). An adapter may stay where that gate looked at its alpha and passed it.
    No look is charged: an adapter that was chosen by the old documents is tested by other hypotheses, once, and
    nothing is chosen among the answers. Retraining whoever fails is a choice, and is paid for with `gate.runs`.

    Raises InputError where the run is not finished or released nobody, an adapter is not what its papers say, the base
    is another one or does not pass the new documents itself, or these cannot be used.
    """
    released, config = _released(run), read_config(run / "config.yaml")
    policy, base = Policy.read(documents), load_base(config.base)
    RunFolder(run).check_same({"base": base.weights_hash})
    adapted = AdaptedModel(base, config.lora)
    try:
        examination = _examination(adapted, policy, config, users=len(RunResults(run)))
        examination.check_base()
        fixed = policy.max_changed is not None
        called_back, spans, users = revoked(run), list(adapted.spans.values()), list[Retested]()
        for start in range(0, len(released), _COHORT):
            cohort = released[start : start + _COHORT]
            say(f"testing {start + 1} to {start + len(cohort)} of {len(released)} users")
            flat = torch.stack([read_adapter(run / str(one.path), spans, one.alpha) for one in cohort]).to(base.device)
            verdicts = examination.verdicts(flat)
            pairs = list(zip(cohort, verdicts, strict=True))
            audit.append_all(run, [retested(one.user_id, verdict, policy.hash) for one, verdict in pairs])
            users += [
                Retested(one.user_id, one.slug, one.alpha, verdict, fixed, one.manifest_sha256 in called_back)
                for one, verdict in pairs
            ]
    finally:
        adapted.close()
    failed = {user.user_id for user in users if not user.passes}
    reason = f"it does not pass policy {policy.hash[:16]} ({_named(policy)})"
    revoke(run, [one for one in released if one.user_id in failed], reason)
    looks = sum(len(user.verdict.looks) for user in users)
    head = audit.append_all(run, [recertified(policy, len(users), len(users) - len(failed), looks)])
    seal(run, only=audit.AUDIT)
    return Recertified(policy.hash, users, head)


def _released(run: Path) -> list[Result]:
    """The released users of a finished run, whose adapters are what their papers say."""
    results = RunResults(run)
    if not (run / SEAL).is_file():
        raise _not_so(run, "this run is not finished; go on with it (train has --resume) before it is tested again")
    released = [result for result in results if result.path is not None]
    if not released:
        raise _not_so(run, "this run released no adapter, so there is nothing to test again; its report says why")
    faults = [(one.path, fault) for one in released for fault in paper_faults(run / str(one.path), one)]
    if faults:
        raise InputError([Problem(f"{run}/{path}", None, None, fault) for path, fault in faults])
    return released


def _not_so(run: Path, sentence: str) -> InputError:
    return InputError([Problem(str(run), None, None, sentence)])


def _examination(adapted: AdaptedModel, policy: Policy, config: Config, users: int) -> Examination:
    """The gate of the run under other documents; on, even where the run had switched it off."""
    gate = config.gate.model_copy(update={"enabled": True})
    second = None if gate.classifier is None else load_classifier(gate.classifier, adapted.base.device)
    return Examination(
        adapted,
        policy,
        is_refusal,
        gate,
        config.evaluation,
        users=users,
        facts=facts_of(config),
        second=second,
        seed=config.seed,
    )


def _named(policy: Policy) -> str:
    """The documents of tiers one and two, as a reason names them."""
    return "; ".join(f"tier {d.tier}: {d.issuer}, version {d.version}" for d in policy.documents if d.tier < 3)
