"""`evaluate`, `evaluate --redteam`, `recertify` over one loader of released adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.config.experiment import Config, read_run_config
from persona_rlhf.evaluation.evaluator import Evaluator
from persona_rlhf.evaluation.redteam import RedTeam, mean_adapter, widened
from persona_rlhf.evaluation.refusals import load_classifier
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import Base, load_base
from persona_rlhf.models.multi_lora import LayerSpan
from persona_rlhf.pipeline.inputs import facts_of
from persona_rlhf.pipeline.run_dir import RunDir
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.policy.policy import Policy
from persona_rlhf.release import integrity
from persona_rlhf.release.adapter import read_adapter
from persona_rlhf.release.integrity import RUN_MANIFEST, recertified, retested, write_run_manifest
from persona_rlhf.release.redteam_report import Attacked, MergedPair, RedTeamResult, content_of, write_redteam
from persona_rlhf.release.report import write_report
from persona_rlhf.release.results import Result, RunResults
from persona_rlhf.release.revocation import Recertified, Retested, revoke, revoked
from persona_rlhf.release.verify import undated_faults

MERGED_PAIRS = 8
"""Pairs of released users, drawn by the seed, whose adapters the red team merges."""

# ----------------------------------------------------------------------------------------------------
# `recertify`: the released adapters of a finished run under new policy documents, without training anybody again.
# ----------------------------------------------------------------------------------------------------

_RECERTIFY_COHORT = 32  # users tested together


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
    released, config = _released_for_recertification(run), read_run_config(run)
    policy, base = Policy.read(documents), load_base(config.base)
    RunDir(run).check_same({"base": base.weights_hash})
    adapted = AdaptedModel(base, config.lora)
    try:
        examination = _examination(adapted, policy, config, users=len(RunResults(run)))
        examination.check_base()
        fixed = policy.max_changed is not None
        called_back, spans, users = revoked(run), list(adapted.spans.values()), list[Retested]()
        for start in range(0, len(released), _RECERTIFY_COHORT):
            cohort = released[start : start + _RECERTIFY_COHORT]
            say(f"testing {start + 1} to {start + len(cohort)} of {len(released)} users")
            flat = torch.stack([read_adapter(run / str(one.path), spans, one.alpha) for one in cohort]).to(base.device)
            verdicts = examination.verdicts(flat)
            pairs = list(zip(cohort, verdicts, strict=True))
            integrity.append_all(run, [retested(one.user_id, verdict, policy.hash) for one, verdict in pairs])
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
    head = integrity.append_all(run, [recertified(policy, len(users), len(users) - len(failed), looks)])
    write_run_manifest(run, only=integrity.AUDIT)
    return Recertified(policy.hash, users, head)


def _released_for_recertification(run: Path) -> list[Result]:
    """The released users of a finished run, whose adapters are what their papers say."""
    results = RunResults(run)
    if not (run / RUN_MANIFEST).is_file():
        raise _not_so(run, "this run is not finished; go on with it (train has --resume) before it is tested again")
    released = [result for result in results if result.path is not None]
    if not released:
        raise _not_so(run, "this run released no adapter, so there is nothing to test again; its report says why")
    faults = [(one.path, fault) for one in released for fault in undated_faults(run / str(one.path), one)]
    if faults:
        raise InputError([Problem(f"{run}/{path}", None, None, fault) for path, fault in faults])
    return released


def _not_so(run: Path, sentence: str) -> InputError:
    return InputError([Problem(str(run), None, None, sentence)])


def _examination(adapted: AdaptedModel, policy: Policy, config: Config, users: int) -> Evaluator:
    """The gate of the run under other documents; on, even where the run had switched it off."""
    gate = config.gate.model_copy(update={"enabled": True})
    second = None if gate.classifier is None else load_classifier(gate.classifier, adapted.base.device)
    return Evaluator(
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


# ----------------------------------------------------------------------------------------------------
# `evaluate RUN --redteam`: the released adapters of a finished run in, RUN/redteam.json out.
# ----------------------------------------------------------------------------------------------------

_REDTEAM_COHORT = 32  # users attacked together


def red_team(run: Path, overrides: Sequence[str], say: Callable[[str], None]) -> tuple[RedTeamResult, Path]:
    """Attacks every released adapter, and the means of some pairs, and writes RUN/redteam.json, sealed with the run.

    `overrides` change the section `redteam` of the run's config. Raises InputError where the run is not finished or
    released nobody, its policy or base is no longer the same, or an adapter cannot be read.
    """
    released, config = _released_for_redteam(run), _settings(run, overrides)
    policy, base = Policy.read(config.policy.documents), load_base(config.base)
    RunDir(run).check_same({"policy": policy.hash, "base": base.weights_hash})
    probes = probes_of(run, policy)
    adapted = AdaptedModel(base, config.lora)
    try:
        team = RedTeam(adapted, probes, is_refusal, config.redteam, config.gate.max_new_tokens, config.seed)
        spans, users = list(adapted.spans.values()), list[Attacked]()
        for start in range(0, len(released), _REDTEAM_COHORT):
            cohort = released[start : start + _REDTEAM_COHORT]
            say(f"attacking {start + 1} to {start + len(cohort)} of {len(released)} users")
            flat = torch.stack([_adapter(run, result, spans) for result in cohort]).to(base.device)
            for result, outcomes in zip(cohort, team.attack(flat), strict=True):
                users.append(Attacked(result.user_id, result.slug, result.alpha, result.manifest_sha256, outcomes))
    finally:
        adapted.close()
    found = RedTeamResult(users, [], dict(team.left_out))
    if "merged" in config.redteam.attacks:
        numbers = pairs_of(len(released), MERGED_PAIRS, config.seed)
        say(f"merging {len(numbers)} pairs of users")
        pairs = [(released[one], released[other]) for one, other in numbers]
        found.merged.extend(_merged(run, config, base, probes, spans, pairs))
        if not found.merged:
            found.left_out["merged"] = "it takes two released users, and plain requests that can be asked"
    papers: dict[str, Any] = {
        "base": {"name": Path(base.name).name, "weights_sha256": base.weights_hash},
        "policy": {"hash": policy.hash, "tier_one_hash": policy.tier_one_hash},
        "seed": config.seed,
        "settings": config.redteam.model_dump(mode="json"),
    }
    file = write_redteam(run, content_of(found, papers))
    write_report(run)
    return found, file


def _released_for_redteam(run: Path) -> list[Result]:
    """The released users of a finished run. Raises InputError where it is not finished, or released nobody."""
    results = RunResults(run)
    if not (run / RUN_MANIFEST).is_file():
        sentence = "this run is not finished; go on with it (train has --resume) before it is attacked"
        raise InputError([Problem(str(run), None, "--redteam", sentence)])
    released = [result for result in results if result.path is not None]
    if not released:
        sentence = "this run released no adapter, so there is nothing to attack; its report says why"
        raise InputError([Problem(str(run), None, "--redteam", sentence)])
    return released


def _settings(run: Path, overrides: Sequence[str]) -> Config:
    """The config of a run; only what turns the red team can be changed. Raises InputError for anything else."""
    foreign = [override for override in overrides if not override.startswith("redteam.")]
    if foreign:
        sentence = "only redteam.* can be changed here: the adapters are trained and judged already"
        raise InputError([Problem(f"override {override}", None, None, sentence) for override in foreign])
    return read_run_config(run, overrides)


def probes_of(run: Path, policy: Policy) -> list[Probe]:
    """The test probes of tier one. Raises InputError where there is none."""
    rules = (rule for rule in policy.restrictions if rule.tier == 1)
    probes = [probe for rule in rules for probe in rule.probes if probe.split == "test"]
    if not probes:
        sentence = "the policy's tier one has no probe of the test split to attack with; add some to its banks"
        raise InputError([Problem(str(run), None, "--redteam", sentence)])
    return probes


def pairs_of(users: int, most: int, seed: int) -> list[tuple[int, int]]:
    """Up to `most` different pairs of users by number, drawn by the seed; a user may be in several."""
    most = min(most, users * (users - 1) // 2)
    rng, drawn = Random(f"{seed} merged"), dict[tuple[int, int], None]()
    while len(drawn) < most:
        one, other = sorted(rng.sample(range(users), 2))
        drawn[one, other] = None
    return list(drawn)


def _merged(
    run: Path,
    config: Config,
    base: Base,
    probes: Sequence[Probe],
    spans: Sequence[LayerSpan],
    pairs: Sequence[tuple[Result, Result]],
) -> list[MergedPair]:
    """The plain requests, asked of the mean of two users' adapters, which has twice their rank."""
    adapted = AdaptedModel(base, widened(config.lora))
    try:
        settings = config.redteam.model_copy(update={"attacks": ["plain"]})
        team = RedTeam(adapted, probes, is_refusal, settings, config.gate.max_new_tokens, config.seed)
        found: list[MergedPair] = []
        for start in range(0, len(pairs) if team.prompts else 0, _REDTEAM_COHORT):
            cohort = pairs[start : start + _REDTEAM_COHORT]
            both = [(_adapter(run, one, spans), _adapter(run, other, spans)) for one, other in cohort]
            flat = torch.stack([mean_adapter(one, other, spans) for one, other in both]).to(base.device)
            for (one, other), outcomes in zip(cohort, team.attack(flat), strict=True):
                found.append(MergedPair((one.user_id, other.user_id), outcomes["plain"]))
        return found
    finally:
        adapted.close()


def _adapter(run: Path, result: Result, spans: Sequence[LayerSpan]) -> Float[Tensor, " params"]:
    """A released adapter, as it lies in its folder."""
    assert result.path is not None
    try:
        return read_adapter(run / result.path, spans)
    except (OSError, KeyError, SafetensorError) as fault:
        sentence = f"this adapter cannot be read ({fault}); `persona-rlhf verify {run}` says more"
        raise InputError([Problem(str(run / result.path), None, None, sentence)]) from fault
