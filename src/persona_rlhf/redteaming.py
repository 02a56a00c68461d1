"""`evaluate RUN --redteam`: the released adapters of a finished run in, RUN/redteam.json out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from persona_rlhf.config import Config, read_config
from persona_rlhf.evaluation.redteam import RedTeam, mean_adapter, widened
from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.policy.tiers import Policy
from persona_rlhf.release.peft_folder import read_adapter
from persona_rlhf.release.redteam import Attacked, MergedPair, RedTeamResult, content_of, write_redteam
from persona_rlhf.release.report import write_report
from persona_rlhf.release.results import Result, RunResults
from persona_rlhf.release.seal import SEAL
from persona_rlhf.run_folder import RunFolder
from persona_rlhf.training.base import Base, load_base
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.lora import LayerSpan

_COHORT = 32  # users attacked together


def red_team(run: Path, overrides: Sequence[str], say: Callable[[str], None]) -> tuple[RedTeamResult, Path]:
    """Attacks every released adapter, and the means of some pairs, and writes RUN/redteam.json, sealed with the run.

    `overrides` change the section `redteam` of the run's config. Raises InputError where the run is not finished or
    released nobody, its policy or base is no longer the same, or an adapter cannot be read.
    """
    released, config = _released(run), _settings(run, overrides)
    policy, base = Policy.read(config.policy.documents), load_base(config.base)
    RunFolder(run).check_same({"policy": policy.hash, "base": base.weights_hash})
    probes = probes_of(run, policy)
    adapted = AdaptedModel(base, config.lora)
    try:
        team = RedTeam(adapted, probes, is_refusal, config.redteam, config.gate.max_new_tokens, config.seed)
        spans, users = list(adapted.spans.values()), list[Attacked]()
        for start in range(0, len(released), _COHORT):
            cohort = released[start : start + _COHORT]
            say(f"attacking {start + 1} to {start + len(cohort)} of {len(released)} users")
            flat = torch.stack([_adapter(run, result, spans) for result in cohort]).to(base.device)
            for result, outcomes in zip(cohort, team.attack(flat), strict=True):
                users.append(Attacked(result.user_id, result.slug, result.alpha, result.manifest_sha256, outcomes))
    finally:
        adapted.close()
    found = RedTeamResult(users, [], dict(team.left_out))
    if "merged" in config.redteam.attacks:
        numbers = pairs_of(len(released), config.redteam.merged_pairs, config.seed)
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


def _released(run: Path) -> list[Result]:
    """The released users of a finished run. Raises InputError where it is not finished, or released nobody."""
    results = RunResults(run)
    if not (run / SEAL).is_file():
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
    return read_config(run / "config.yaml", overrides)


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
        for start in range(0, len(pairs) if team.assaults else 0, _COHORT):
            cohort = pairs[start : start + _COHORT]
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
