"""The impact report of a finished run (`report RUN --impact`): evidence from its files and its users' pairs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from heapq import nsmallest
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import pseudonym
from persona_rlhf.config.experiment import Config, read_run_config
from persona_rlhf.data.pairs import PreferencePair
from persona_rlhf.data.store import PairStore
from persona_rlhf.evaluation.impact import impact_of
from persona_rlhf.evaluation.impact_evidence import RunEvidence, UserEvidence
from persona_rlhf.evaluation.impact_statistics import Factors, gram_of
from persona_rlhf.pipeline.ask_adapters import ask_adapters
from persona_rlhf.pipeline.inputs import read_inputs
from persona_rlhf.pipeline.monitoring import OnProgress, silent
from persona_rlhf.pipeline.plan_offline import step_flops
from persona_rlhf.pipeline.run_dir import PAIRS, RunDir
from persona_rlhf.release.compatibility import WEIGHTS
from persona_rlhf.release.impact_report import write_impact
from persona_rlhf.release.report import attacks_in, policy_of
from persona_rlhf.release.results import Result, RunResults

MOST_USERS = 200
"""Users who enter the report: of a larger run, those with the smallest pseudonyms, which are hashes."""


def impact(run: Path, groups: Path | None = None, ask: bool = False, on_progress: OnProgress = silent) -> Path:
    """Writes RUN/impact.json and RUN/impact.html; returns the page. `ask` loads the base and asks every adapter.

    `groups` is a JSON object of user ids and the names of their groups, which stays outside the run. Raises InputError
    for a run that is not finished, pairs that changed since, or groups that cannot be read.
    """
    run_dir = RunDir(run)
    run_dir.need_finished("its impact is measured")
    config = read_run_config(run)
    group_of = {} if groups is None else _read_groups(groups)
    results = nsmallest(MOST_USERS, RunResults(run), key=lambda result: pseudonym(result.user_id))
    names = {result.user_id for result in results}
    store = PairStore(config.users.path, config.users.heldout, run_dir.selection)
    run_dir.check_same({PAIRS: store.fingerprint})
    pairs: dict[str, list[PreferencePair]] = defaultdict(list)
    for pair in store:
        if pair.user_id in names:
            pairs[pair.user_id].append(pair)
    answers = ask_adapters(run, config, results, pairs, on_progress) if ask else {}
    curves = _curves(run_dir.metrics, names)
    adapters: list[Factors] = []
    users = []
    for result in results:
        place = None
        if result.status == "released":  # the population's adapter is nobody's
            place = len(adapters)
            adapters.append(_factors(run, result))
        users.append(
            UserEvidence(
                measures=result.measures,
                pairs=[(pair.chosen, pair.rejected) for pair in pairs[result.user_id] if not pair.tie],
                trained=result.pairs.train,
                steps=result.steps,
                seconds=result.seconds,
                curve=curves[result.user_id],
                gain_over_prior=result.gain_over_prior,
                group=group_of.get(result.user_id),
                factors_at=place,
                answers=answers.get(result.user_id),
            )
        )
    gram = gram_of(adapters) if adapters else np.zeros((0, 0))
    limit = (policy_of(run).get("aspects") or {}).get("max_changed")
    dpo = config.dpo
    labelled = config.basis is not None
    flops = _step_flops(config, run_dir)
    evidence = RunEvidence(users, gram, dpo.pairs_per_step, dpo.epochs, attacks_in(run), limit, labelled, flops)
    return write_impact(run, impact_of(evidence), len(users), store.users)


def _step_flops(config: Config, run_dir: RunDir) -> float | None:
    """Operations of a step; None where the base's shape cannot be read on this machine."""
    try:
        return step_flops(config, read_inputs(config, run_dir.selection))
    except InputError:
        return None


def _read_groups(file: Path) -> Mapping[str, str]:
    try:
        groups = json.loads(file.read_bytes())
    except (OSError, ValueError) as fault:
        raise InputError([Problem(str(file), None, "--groups", f"the groups cannot be read ({fault})")]) from fault
    if not isinstance(groups, dict) or not all(isinstance(group, str) for group in groups.values()):
        sentence = 'the groups are no JSON object of names, such as {"alma": "north", "boris": "south"}'
        raise InputError([Problem(str(file), None, "--groups", sentence)])
    return groups


def _curves(metrics: Path, names: set[str]) -> dict[str, list[float]]:
    """The accuracy on the training pairs of every step, by user; the last attempt at a step counts.

    A line that a kill cut short is left out.
    """
    steps: dict[str, dict[int, float]] = defaultdict(dict)
    if metrics.exists():
        with metrics.open(encoding="utf-8") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if row.get("user_id") in names and row.get("accuracy") is not None:
                    steps[row["user_id"]][int(row["step"])] = float(row["accuracy"])
    curves = {user: [rows[step] for step in sorted(rows)] for user, rows in steps.items()}
    return defaultdict(list, curves)


def _factors(run: Path, result: Result) -> Factors:
    file = run / str(result.path) / WEIGHTS
    try:
        tensors = {name: tensor.float().numpy() for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as fault:
        sentence = f"this adapter cannot be read ({fault}); `persona-rlhf verify {run}` says more"
        raise InputError([Problem(str(file), None, None, sentence)]) from fault
    layers = (name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight"))
    return {layer: (tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]) for layer in layers}
