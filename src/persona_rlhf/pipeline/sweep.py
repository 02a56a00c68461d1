"""`sweep`: one experiment under many settings and seeds, each arm a run, and one comparison of all arms."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, field_validator

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import ExistingPath, atomic_write, find
from persona_rlhf.common.run_lock import is_lock, run_lock, tell_nobody
from persona_rlhf.config.experiment import Config, checked, read_config
from persona_rlhf.config.loader import Section, in_order, read_yaml
from persona_rlhf.evaluation.ledger import LOOKS, LookPlan
from persona_rlhf.pipeline.inputs import RunInputs, read_inputs
from persona_rlhf.pipeline.monitoring import OnProgress, ProgressEvent, silent
from persona_rlhf.pipeline.run_dir import RunDir
from persona_rlhf.release.comparison import Arm, Comparison, compare, write_comparison
from persona_rlhf.release.integrity import RUN_MANIFEST
from persona_rlhf.release.results import read_results


class SweepSettings(Section):
    """A sweep. Every combination of `grid` is trained under every one of `arms` and every seed."""

    name: str = Field(min_length=1, pattern=r"^\w[\w.-]*$", description="Name of the sweep; names its folder.")
    config: ExistingPath = Field(description="The experiment that the arms change.")
    seeds: list[int] = Field([0], min_length=1, description="Seeds; every arm is trained under each of them.")
    grid: dict[str, list[Any]] = Field({}, description="Values by dotted key, such as dpo.beta: [0.05, 0.1].")
    arms: dict[str, dict[str, Any]] = Field(
        {},
        description="Changes by dotted key, under a name; others are compared with the first.",
    )

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("names a seed twice")
        return seeds

    @field_validator("grid")
    @classmethod
    def _values(cls, grid: dict[str, list[Any]]) -> dict[str, list[Any]]:
        empty = [key for key, values in grid.items() if not values]
        if empty:
            raise ValueError(f"has no value for {', '.join(empty)}")
        return grid


class ArmRun(NamedTuple):
    """One arm under one seed: the name of the arm, the seed, the config, and the folder below the sweep's."""

    arm: str
    seed: int
    config: Config
    folder: str


def sweep(
    path: Path,
    overrides: Sequence[str],
    folder: Path | None,
    resume: bool,
    on_progress: OnProgress = silent,
    *,
    wait: float = 0.0,
    tell: Callable[[str], None] = tell_nobody,
) -> Comparison:
    """Trains every arm under every seed, compares them, and writes sweep.json and report.html.

    Trained runs are kept. The best of several runs over the same certify probes may be released, so all of them count
    looks in one ledger, with equal shares of delta for each run (`LookPlan`). Arms share one cache of the base's
    log-probabilities.

    Raises InputError with all problems of the sweep and its configs, before anything is trained.
    """
    settings = checked(SweepSettings, read_yaml(find(path)), ())
    place = folder or Path("sweeps") / settings.name
    runs = arm_runs(settings, overrides)
    runs = [run._replace(config=_shared(run.config, place)) for run in runs]
    with run_lock(place, "sweep", wait=wait, tell=tell):
        return _sweep(settings.name, place, runs, resume, on_progress)


def _sweep(name: str, place: Path, runs: Sequence[ArmRun], resume: bool, on_progress: OnProgress) -> Comparison:
    """Trains the arms that are not trained yet in a locked folder, and compares all of them."""
    plan = LookPlan(hashlib.sha256(_identity(runs).encode()).hexdigest()[:16], len(runs))
    _check_place(place, runs, resume)
    inputs_by_files = _inputs(runs)
    from persona_rlhf.pipeline import train

    atomic_write(place / "arms.json", _identity(runs))
    for number, run in enumerate(runs, 1):
        where = place / "runs" / run.folder
        if (where / RUN_MANIFEST).exists():
            continue
        on_progress(ProgressEvent("sweep", f"run {number} of {len(runs)}: {run.arm}, seed {run.seed}"))
        inputs = inputs_by_files[_files_of(run.config)]
        begun = RunDir(where).begun
        train.train_share(run.config, where, resume=begun, on_progress=on_progress, inputs=inputs, plan=plan)
    arms: dict[str, Arm] = {}
    for run in runs:
        arms.setdefault(run.arm, {})[run.seed] = read_results(place / "runs" / run.folder)
    comparison = compare(arms)
    write_comparison(place, name, comparison)
    return comparison


def arm_runs(settings: SweepSettings, overrides: Sequence[str]) -> list[ArmRun]:
    """Every arm and seed with its config. Raises InputError with the problems of all of them."""
    named: dict[str, dict[str, Any]] = {}
    for name, changes in (settings.arms or {"": {}}).items():
        for values in product(*settings.grid.values()):
            point = dict(zip(settings.grid, values, strict=True))
            words = [f"{key.rpartition('.')[2]}={_word(value)}" for key, value in point.items()]
            named[" ".join([*([name] if name else []), *words]) or "as it is"] = changes | point
    runs, problems = list[ArmRun](), list[Problem]()
    for name, changes in named.items():
        for seed in settings.seeds:
            words = [*overrides, f"seed={seed}", *(f"{key}={json.dumps(value)}" for key, value in changes.items())]
            try:
                config = read_config(settings.config, words)
            except InputError as fault:
                problems += fault.problems
                break
            safe = "".join(letter if letter.isalnum() or letter in "=.-" else "_" for letter in name)
            runs.append(ArmRun(name, seed, config, f"{len(runs):03d}-{safe[:60]}-seed{seed}"))
    if problems:
        raise InputError(in_order(problems))
    return runs


def _files_of(config: Config) -> str:
    """The part of a config that names input files: arms that agree in it share the inputs."""
    return config.model_dump_json(include={"policy", "users", "evaluation"})


def _inputs(runs: Sequence[ArmRun]) -> dict[str, RunInputs]:
    """The files of all configs. Raises InputError with the problems of all of them."""
    inputs, problems = dict[str, RunInputs](), list[Problem]()
    for files, config in {_files_of(run.config): run.config for run in runs}.items():
        try:
            inputs[files] = read_inputs(config)
        except InputError as fault:
            problems += fault.problems
    if problems:
        raise InputError(in_order(problems))
    return inputs


def _shared(config: Config, place: Path) -> Config:
    """The config with a ledger of looks and a cache that the runs share."""
    cache = config.fleet.reference_cache or str(place / "cache")
    gate = config.gate.model_copy(update={"ledger": config.gate.ledger or place / LOOKS})
    return config.model_copy(update={"gate": gate, "fleet": config.fleet.model_copy(update={"reference_cache": cache})})


def _check_place(place: Path, runs: Sequence[ArmRun], resume: bool) -> None:
    """Raises InputError where another sweep, or anything else, lies in the folder."""
    if place.exists() and not place.is_dir():
        raise InputError([Problem(str(place), None, None, "this is a file; --run names a folder")])
    begun = (place / "arms.json").is_file()
    if resume and not begun:
        raise InputError([Problem(str(place), None, "--resume", "there is no sweep here to go on with")])
    if not resume and place.is_dir() and not all(is_lock(file.name) for file in place.iterdir()):
        sentence = "this folder is not empty; give --resume to go on with a sweep, or --run another folder"
        raise InputError([Problem(str(place), None, None, sentence)])
    if resume and (place / "arms.json").read_text(encoding="utf-8") != _identity(runs):
        sentence = "the sweep or a config of it changed since it began; start a new one with --run"
        raise InputError([Problem(str(place), None, "--resume", sentence)])


def _identity(runs: Sequence[ArmRun]) -> str:
    """The arms, as arms.json keeps them."""
    arms = [
        {"arm": run.arm, "seed": run.seed, "folder": run.folder, "config": run.config.model_dump(mode="json")}
        for run in runs
    ]
    return json.dumps(arms, indent=1, sort_keys=True) + "\n"


def _word(value: Any) -> str:
    """A value as a short word of a name."""
    return value if isinstance(value, str) else json.dumps(value)
