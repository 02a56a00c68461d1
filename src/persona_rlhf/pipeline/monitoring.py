"""Progress, metrics.jsonl, trackers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.config.experiment import Config
from persona_rlhf.pipeline.distributed import WorkShare
from persona_rlhf.release.results import RunSummary

if TYPE_CHECKING:
    from persona_rlhf.training.engine import StepReport


# ----------------------------------------------------------------------------------------------------
# A run's curves for an experiment tracker, through accelerate's own trackers: means over users, and nobody's name.
# ----------------------------------------------------------------------------------------------------

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

    def end(self, summary: RunSummary, taken: int) -> None:
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


# ----------------------------------------------------------------------------------------------------
# What a person sees while a fleet trains, and what `metrics.jsonl` keeps of every step.
# ----------------------------------------------------------------------------------------------------


class Progress:
    """A live table on a terminal, a plain line now and then elsewhere; every step goes to `metrics.jsonl` either way.

    A figure that is not finite is written as null: the file stays JSON.
    """

    def __init__(
        self,
        console: Console,
        metrics: Path,
        users: int,
        share: WorkShare | None = None,
        tracking: Tracking | None = None,
    ) -> None:
        """`users` are those that this process has before it, in all chunks; `share` names it among several."""
        self.tracking = tracking
        self.console, self.metrics, self.users = console, metrics, users
        alone = share is None or share.workers == 1
        self.name = "" if share is None or alone else f"[{share.name}] "
        self.taken = self.ended = 0
        self.seen = self.planned = 0  # users of the chunks so far, and their steps
        self.steps: dict[str, int] = {}  # of the users of this chunk
        self.done: set[str] = set()  # of them
        self.started = self.spoken = time.monotonic()
        live = console.is_terminal and alone
        self.live = Live(console=console, refresh_per_second=4, transient=True) if live else None

    def __enter__(self) -> Progress:
        self.file = self.metrics.open("a", encoding="utf-8")
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if self.live is not None:
            self.live.stop()

    def begin(self, steps: dict[str, int], finished: Collection[str], users: int) -> None:
        """The next chunk: the steps of its users who train, those a run before finished, and how many are in it."""
        self.steps, self.done = steps, set(finished)
        self.seen += users
        self.planned += sum(steps.values())
        self.ended += users - len(steps) + len(finished)
        self.taken += sum(steps[user] for user in finished)

    def end(self, user_id: str, steps: int) -> None:
        """Counts a user as done after so many steps; those that he did not need are not waited for."""
        if user_id not in self.done:
            self.done.add(user_id)
            self.ended += 1
            self.planned -= self.steps.get(user_id, steps) - steps

    def step(self, reports: Sequence[StepReport]) -> None:
        """Takes in one step of a cohort."""
        for report in reports:
            row = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in report._asdict().items()
            }
            self.file.write(json.dumps(row) + "\n")
            if report.step >= report.steps:
                self.end(report.user_id, report.step)
        self.file.flush()
        self.taken += len(reports)
        if self.tracking is not None:
            self.tracking.step(reports, self.taken)
        if self.live is not None:
            self.live.update(self._table(reports))
        elif time.monotonic() - self.spoken > 10:
            self.spoken = time.monotonic()
            self.say(self._line(reports))

    def say(self, text: str) -> None:
        """One plain line for a person."""
        self.console.print(f"{self.name}{text}", highlight=False, markup=False)

    def _total(self) -> int:
        """Steps of all users: those of later chunks are taken to be as busy as those seen."""
        return round(self.planned * self.users / max(1, self.seen))

    def _left(self) -> str:
        spent = time.monotonic() - self.started
        left = spent * (self._total() - self.taken) / max(1, self.taken)
        return f"{int(left // 60)}:{int(left % 60):02d} left"

    def _line(self, reports: Sequence[StepReport]) -> str:
        worst = [report.violation for report in reports if report.violation is not None]
        violation = f", worst violation {max(worst):+.2f} nats" if worst else ""
        return (
            f"training: {self.ended:,} of {self.users:,} users done, {self.taken:,} of {self._total():,} steps, "
            f"loss {fmean(r.loss for r in reports):.3f}, margin {fmean(r.margin for r in reports):+.2f}"
            f"{violation}, {self._left()}"
        )

    def _table(self, reports: Sequence[StepReport]) -> Table:
        table = Table(title=self._line(reports), title_justify="left", expand=False)
        for name in ("user", "step", "loss", "margin", "accuracy", "violation (nats)", "dual"):
            table.add_column(name, justify="left" if name == "user" else "right")
        for report in reports[: max(4, self.console.height - 8)]:
            table.add_row(
                report.user_id[:32],
                f"{report.step}/{report.steps}",
                f"{report.loss:.3f}",
                f"{report.margin:+.2f}",
                f"{report.accuracy:.2f}",
                "" if report.violation is None else f"{report.violation:+.2f}",
                "" if report.dual is None else f"{report.dual:.2f}",
            )
        return table
