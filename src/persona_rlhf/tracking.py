"""A run's curves for an experiment tracker, through accelerate's own trackers: means over users, and nobody's name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from persona_rlhf.config import Config
from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.release.results import Summary

if TYPE_CHECKING:
    from persona_rlhf.training.engine import StepReport

_EVERY = 10  # steps of a cohort between two points of a curve


def check_trackers(names: Sequence[str], workers: int) -> None:
    """Raises InputError for each tracker whose package is not installed (accelerate would leave it out silently), and
    where several processes share the run: its curves would be those of one of them."""
    sentence = "the package `{0}` is not installed; `pip install {0}`, or take it out of the list"
    problems = [
        Problem("config", None, "run.report_to", sentence.format(name)) for name in names if find_spec(name) is None
    ]
    if names and workers > 1:
        alone = (
            "curves are those of a run in one process; take the trackers out, or train in one (metrics.jsonl has all)"
        )
        problems.append(Problem("config", None, "run.report_to", alone))
    if problems:
        raise InputError(problems)


class Tracking:
    """The trackers of `run.report_to`, while a run trains; none is no trouble. Their files lie under RUN/tracking.

    Every few steps: `loss`, `margin`, `accuracy`, `grad_norm` (means over the users in the slots), `violation` (the
    largest, nats over the limit), `dual` (the largest). At the end: the run in a handful of numbers.
    """

    def __init__(self, config: Config, run: Path) -> None:
        names = config.run.report_to
        self._accelerator, self._steps = None, 0
        if names:
            from accelerate import Accelerator

            place = run / "tracking"
            place.mkdir(parents=True, exist_ok=True)
            self._accelerator = Accelerator(log_with=list(names), project_dir=str(place), cpu=True)
            self._accelerator.init_trackers(config.name, config=_flat(config.model_dump(mode="json")))

    def step(self, reports: Sequence[StepReport], taken: int) -> None:
        """Takes in one step of a cohort, after which all users together have `taken` steps."""
        self._steps += 1
        if self._accelerator is None or self._steps % _EVERY != 1:
            return
        names = ("loss", "margin", "accuracy", "grad_norm")
        found = {name: fmean(getattr(report, name) for report in reports) for name in names}
        for name in ("violation", "dual"):
            values = [value for report in reports if (value := getattr(report, name)) is not None]
            found |= {name: max(values)} if values else {}
        sound = {f"train/{name}": value for name, value in found.items() if math.isfinite(value)}
        self._accelerator.log(sound, step=taken)

    def end(self, summary: Summary, taken: int) -> None:
        """The whole run; nothing is told after it."""
        if self._accelerator is not None:
            known = {f"run/{name}": value for name, value in summary._asdict().items() if value is not None}
            self._accelerator.log(known, step=taken)
            self._accelerator.end_training()


def _flat(section: dict[str, object], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Dotted keys with plain values, as every tracker takes them; lists as text."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value if isinstance(value, str | int | float | bool) else str(value)
    return flat
