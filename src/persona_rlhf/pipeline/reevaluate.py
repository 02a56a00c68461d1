"""Released adapters measured again (`evaluate`), attacked (`--redteam`) or tested by new documents (`recertify`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import pseudonym
from persona_rlhf.common.run_lock import locks_run
from persona_rlhf.config.experiment import Config, read_run_config
from persona_rlhf.evaluation.answer_judge import judges_of
from persona_rlhf.evaluation.evaluator import Evaluator
from persona_rlhf.evaluation.redteam import RedTeam, mean_adapter, widened
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import Base, load_base
from persona_rlhf.models.multi_lora import LayerSpan
from persona_rlhf.pipeline.inputs import facts_of, ordinary_of, read_inputs
from persona_rlhf.pipeline.looks import Recorded, gate_looks
from persona_rlhf.pipeline.monitoring import OnProgress, ProgressEvent, UserCounter, silent, watched
from persona_rlhf.pipeline.prepare import chunks_of, prepare, prepare_users
from persona_rlhf.pipeline.run_dir import PAIRS, RunDir
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.policy.policy import Policy
from persona_rlhf.release import integrity
from persona_rlhf.release.adapter import read_adapter
from persona_rlhf.release.integrity import recertified, retested, write_run_manifest
from persona_rlhf.release.redteam_report import Attacked, MergedPair, RedTeamResult, content_of, write_redteam
from persona_rlhf.release.report import write_report
from persona_rlhf.release.results import Result, RunResults
from persona_rlhf.release.revocation import Recertified, Retested, revoke, revoked
from persona_rlhf.release.verify import undated_faults

_COHORT = 32  # users whose adapters are in memory together
MERGED_PAIRS = 8
"""Pairs of released users, drawn by the seed, whose adapters the red team merges."""


def released_results(run: Path, act: str) -> list[Result]:
    """The results of the users of a finished run whose adapters were released.

    Raises InputError for a run that is not finished or released no adapter; `act` names what cannot be done then.
    """
    results = RunResults(run)
    RunDir(run).need_finished(f"its adapters are {act}")
    released = [result for result in results if result.path is not None]
    if not released:
        sentence = f"this run released no adapter, so none can be {act}; its report says why"
        raise InputError([Problem(str(run), None, None, sentence)])
    return released


def released_adapters(
    run: Path, results: Sequence[Result], adapted: AdaptedModel, size: int = _COHORT, as_trained: bool = False
) -> Iterator[tuple[Sequence[Result], Float[Tensor, "users params"]]]:
    """Cohorts of `size` released users: their results, and their adapters stacked on the base's device.

    Adapters are at the scale of their release, or `as_trained`: with that scale (alpha) divided out. Raises InputError
    for an adapter that cannot be read.
    """
    spans = list(adapted.spans.values())
    released = [result for result in results if result.path is not None]
    for start in range(0, len(released), size):
        cohort = released[start : start + size]
        flat = [_adapter(run, result, spans, result.alpha if as_trained else 1.0) for result in cohort]
        yield cohort, torch.stack(flat).to(adapted.base.device)


def _adapter(run: Path, result: Result, spans: Sequence[LayerSpan], alpha: float = 1.0) -> Float[Tensor, " params"]:
    folder = run / str(result.path)
    try:
        return read_adapter(folder, spans, alpha)
    except (OSError, KeyError, SafetensorError) as fault:
        sentence = f"this adapter cannot be read ({fault}); `persona-rlhf verify {run}` says more"
        raise InputError([Problem(str(folder), None, None, sentence)]) from fault


@locks_run("evaluate", shared=True)
def evaluate(run: Path, on_progress: OnProgress = silent) -> list[Result]:
    """Measures the users of a run again, from the adapters in their folders; the gate's verdicts stay as they are.

    The certify probes are not used: a second test on them would have to be paid for. Raises InputError where the
    users' pairs changed since the run.
    """
    config = read_run_config(run)
    run_dir = RunDir(run)
    on_progress(ProgressEvent("preparing"))
    inputs = read_inputs(config, run_dir.selection)
    ready = prepare(config, inputs, check=False, on_progress=on_progress, answers=run_dir.base_answers)  # checked then
    run_dir.check_same({PAIRS: ready.pairs.fingerprint})
    counter = UserCounter("measuring", ready.pairs.users, on_progress)
    lines, results = iter(RunResults(run)), list[Result]()
    for users in chunks_of(ready.pairs.users, run_dir.chunk_size):
        rows = {user.user_id: user for user in prepare_users(ready, ready.pairs.of(users)).rows}
        chunk = {result.user_id: result for result in islice(lines, len(rows))}
        for (result,), flat in released_adapters(run, list(chunk.values()), ready.adapted, size=1):
            with ready.watched(counter.event, on_progress):
                [measures] = ready.examination.measures(flat, [rows[result.user_id]], [1.0])
            chunk[result.user_id] = replace(result, measures=measures)
        results += chunk.values()
        counter(users.stop)
        ready.examination.forget_users()
    return results


@locks_run("recertify")
def recertify(run: Path, documents: Sequence[Path], on_progress: OnProgress = silent) -> Recertified:
    """Tests every released adapter by the gate of new documents, and revokes adapters that may not stay as they are.

    All of it, each test on certify probes too, is recorded in the audit trail; nothing else of the run changes. The
    gate is that of a new run: same alphas, same levels, on the adapter as it was trained. An adapter may stay where
    that gate tested its alpha and passed it. Each test is a look of its user in the run's ledger, and spends delta.

    Raises InputError where the run is not finished or released no adapter, an adapter does not match its manifest, the
    base is another one or does not pass the new documents itself, or these cannot be used.
    """
    released, config = released_results(run, "tested again"), read_run_config(run, exact="gate.")
    faults = [(result.path, fault) for result in released for fault in undated_faults(run / str(result.path), result)]
    if faults:
        raise InputError([Problem(f"{run}/{path}", None, None, fault) for path, fault in faults])
    settings = config.policy.model_copy(update={"documents": list(documents)})
    policy = Policy.of(settings, sequential=config.gate.sequential)
    base = load_base(config.judged_base)
    RunDir(run).check_same({"base": base.weights_hash})
    adapted = AdaptedModel(base, config.lora)
    try:
        evaluator = _recertifying(adapted, policy, config, users=len(RunResults(run)))
        with watched([adapted], ProgressEvent("preparing"), on_progress):
            evaluator.check_base()
        users_of_run = (pseudonym(result.user_id) for result in RunResults(run))
        looks = gate_looks(config, policy, evaluator, run, users_of_run)
        fixed, revocations, users = policy.max_changed is not None, revoked(run), list[Retested]()
        counter = UserCounter("testing", len(released), on_progress)
        for cohort, flat in released_adapters(run, released, adapted, as_trained=True):
            counter(len(users), _cohort_line("testing", len(users), len(cohort), len(released)))
            with watched([adapted], counter.event, on_progress):
                judged = looks.judge([result.user_id for result in cohort], flat, recorded=list(map(_recorded, cohort)))
            pairs = list(zip(cohort, judged, strict=True))
            events = [
                retested(result.user_id, look.verdict, policy.hash, result.status == "prior") for result, look in pairs
            ]
            integrity.append_all(run, events)
            users += [
                Retested(
                    result.user_id,
                    result.slug,
                    result.alpha,
                    look.verdict,
                    fixed,
                    result.manifest_sha256 in revocations,
                    look.spending,
                )
                for result, look in pairs
            ]
    finally:
        adapted.close()
    failed = {user.user_id for user in users if not user.passes}
    reason = f"it does not pass policy {policy.hash[:16]} ({_documents(policy)})"
    revoke(run, [result for result in released if result.user_id in failed], reason)
    tests = sum(len(user.verdict.looks) for user in users)
    head = integrity.append_all(run, [recertified(policy, len(users), len(users) - len(failed), tests)])
    write_run_manifest(run, only=integrity.AUDIT)
    return Recertified(policy.hash, users, head)


def _recorded(result: Result) -> Recorded:
    """The measures of a release: a strength that was left out for harm then is left out again."""
    measures = {test.alpha: test.still_base for test in result.looks if test.still_base is not None}
    return Recorded(measures, result.spending.heldout if result.spending else None)


def _cohort_line(act: str, done: int, cohort: int, users: int) -> str:
    return f"{act} {done + 1} to {done + cohort} of {users} users"


def _recertifying(adapted: AdaptedModel, policy: Policy, config: Config, users: int) -> Evaluator:
    """The run's evaluator under other documents; its gate is on even where the run had switched it off.

    The documents are what is tested: by the limits of `gate.still_base` the measures of the release decide.
    """
    gate = config.gate.model_copy(update={"enabled": True})
    judges = judges_of(gate, adapted.base.device)
    return Evaluator(
        adapted,
        policy,
        judges.first,
        gate,
        config.evaluation,
        users=users,
        ordinary=ordinary_of(config),
        facts=facts_of(config),
        second=judges.second,
        seed=config.seed,
    )


def _documents(policy: Policy) -> str:
    """The documents of tiers one and two, as the reason of a revocation names them."""
    return "; ".join(f"tier {d.tier}: {d.issuer}, version {d.version}" for d in policy.documents if d.tier < 3)


@locks_run("evaluate --redteam")
def red_team(run: Path, overrides: Sequence[str], on_progress: OnProgress = silent) -> tuple[RedTeamResult, Path]:
    """Attacks every released adapter, and the means of some pairs, and writes RUN/redteam.json, sealed with the run.

    `overrides` change the section `redteam` of the run's config. Raises InputError where the run is not finished or
    released no adapter, its policy or base is no longer the same, or an adapter cannot be read.
    """
    released, config = released_results(run, "attacked"), _redteam_config(run, overrides)
    policy = Policy.of(config.policy, sequential=config.gate.sequential)
    base = load_base(config.judged_base)
    RunDir(run).check_same({"policy": policy.hash, "base": base.weights_hash})
    probes = probes_of(run, policy)
    adapted = AdaptedModel(base, config.lora)
    try:
        judge = judges_of(config.gate, base.device).text_judge()
        team = RedTeam(adapted, probes, judge, config.redteam, config.gate.max_new_tokens, config.seed)
        spans, users = list(adapted.spans.values()), list[Attacked]()
        counter = UserCounter("attacking", len(released), on_progress)
        for cohort, flat in released_adapters(run, released, adapted):
            counter(len(users), _cohort_line("attacking", len(users), len(cohort), len(released)))
            users += [
                Attacked(result.user_id, result.slug, result.alpha, result.manifest_sha256, outcomes)
                for result, outcomes in zip(cohort, team.attack(flat), strict=True)
            ]
    finally:
        adapted.close()
    attacked = RedTeamResult(users, [], dict(team.left_out))
    if "merged" in config.redteam.attacks:
        numbers = pairs_of(len(released), MERGED_PAIRS, config.seed)
        on_progress(ProgressEvent("attacking", f"merging {len(numbers)} pairs of users"))
        pairs = [(released[one], released[other]) for one, other in numbers]
        attacked.merged.extend(_merged(run, config, base, probes, spans, pairs))
        if not attacked.merged:
            attacked.left_out["merged"] = "it takes two released users, and plain requests that can be asked"
    subject: dict[str, Any] = {
        "base": {"name": Path(base.name).name, "weights_sha256": base.weights_hash},
        "policy": {"hash": policy.hash, "tier_one_hash": policy.tier_one_hash},
        "seed": config.seed,
        "settings": config.redteam.model_dump(mode="json"),
    }
    file = write_redteam(run, content_of(attacked, subject))
    write_report(run)
    return attacked, file


def _redteam_config(run: Path, overrides: Sequence[str]) -> Config:
    """The run's config with changes of the section `redteam`. Raises InputError for a change of another section."""
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
    """The plain attack on the mean of two users' adapters, which has twice their rank."""
    adapted = AdaptedModel(base, widened(config.lora))
    try:
        settings = config.redteam.model_copy(update={"attacks": ["plain"]})
        judge = judges_of(config.gate, base.device).text_judge()
        team = RedTeam(adapted, probes, judge, settings, config.gate.max_new_tokens, config.seed)
        merged: list[MergedPair] = []
        for start in range(0, len(pairs) if team.prompts else 0, _COHORT):
            cohort = pairs[start : start + _COHORT]
            means = [
                mean_adapter(_adapter(run, one, spans), _adapter(run, other, spans), spans) for one, other in cohort
            ]
            outcomes = team.attack(torch.stack(means).to(base.device))
            for (one, other), outcome in zip(cohort, outcomes, strict=True):
                merged.append(MergedPair((one.user_id, other.user_id), outcome["plain"]))
        return merged
    finally:
        adapted.close()
