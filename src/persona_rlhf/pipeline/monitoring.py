"""Progress events of long commands and their display, metrics.jsonl, and experiment trackers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from persona_rlhf.common.errors import InputError, Problem, visible
from persona_rlhf.common.files import append_whole, atomic_write
from persona_rlhf.config.experiment import Config
from persona_rlhf.pipeline.distributed import WorkShare
from persona_rlhf.pipeline.run_dir import dotted
from persona_rlhf.release.results import RunSummary

if TYPE_CHECKING:
    from persona_rlhf.models.adapted_model import AdaptedModel
    from persona_rlhf.training.engine import StepReport

_SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal
_SECONDS_BETWEEN_EVENTS = 0.2
_STEPS_BETWEEN_POINTS = 10  # of a tracker's curve
_EARLY_SHARE, _EARLY_SECONDS = 0.02, 30.0  # of work, before which its pace says little


class ProgressEvent(NamedTuple):
    """State of a long command at one moment, as `on_progress` receives it.

    `text` is a line to show; without it, only the figures changed. `steps` counts `unit`: steps of single users, or
    texts that the model scores or writes, or files. `loss` and `margin` are means over the users of the last step,
    `violation` is the largest one (nats over the limit). `scope`: the part of the phase that ends in `seconds_left`.
    """

    phase: str
    text: str = ""
    users_done: int = 0
    users: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None
    margin: float | None = None
    violation: float | None = None
    seconds_left: float | None = None
    unit: str = "steps"
    scope: str = ""

    @property
    def figures(self) -> str:
        """The figures in one line; empty where there are none."""
        left = self.seconds_left
        parts = [
            f"{self.users_done:,} of {self.users:,} users done" if self.users else "",
            f"{self.step:,} of {self.steps:,} {self.unit}" if self.steps else "",
            "" if self.loss is None else f"loss {self.loss:.3f}",
            "" if self.margin is None else f"margin {self.margin:+.2f}",
            "" if self.violation is None else f"worst violation {self.violation:+.2f} nats",
            "" if left is None else f"{int(left // 60)}:{int(left % 60):02d} left{self.scope and f' for {self.scope}'}",
        ]
        return ", ".join(filter(None, parts))


def seconds_left(spent: float, done: float, total: float) -> float | None:
    """Seconds that the rest of the work takes at the mean pace of `spent` seconds; None where it is too early to tell.

    The first texts and steps of a phase are its slowest. So there is no estimate in the first half-minute before 2% of
    the work are done.
    """
    if done <= 0 or (done < _EARLY_SHARE * total and spent < _EARLY_SECONDS):
        return None
    return max(0.0, spent / done * (total - done))


OnProgress = Callable[[ProgressEvent], None]
"""A receiver of progress events."""


def silent(_: ProgressEvent) -> None:
    """The receiver that shows nothing."""


class ProgressDisplay:
    """Receiver of progress events for people: a bar on a terminal; elsewhere a plain line, at most every ten seconds.

    Lines of text are always printed. Where several processes share a run, each shows lines under its own name.
    """

    def __init__(self, console: Console, share: WorkShare | None = None) -> None:
        alone = share is None or share.workers == 1
        self._console, self._prefix = console, "" if share is None or alone else f"[{share.name}] "
        columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}", markup=False)]
        live = console.is_terminal and alone
        self._bar = Progress(*columns, console=console, transient=True, refresh_per_second=4) if live else None
        self._task = None if self._bar is None else self._bar.add_task("", total=None, figures="", visible=False)
        self._printed_at = time.monotonic()

    def __enter__(self) -> ProgressDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: ProgressEvent) -> None:
        if event.text:
            self._print(event.text)
        if self._bar is not None and self._task is not None:
            total, done = (event.steps, event.step) if event.steps else (event.users, event.users_done)
            self._bar.update(
                self._task,
                total=total or None,
                completed=done,
                description=event.phase,
                visible=True,
                figures=event.figures,
            )
        elif event.figures and not event.text and time.monotonic() - self._printed_at > _SECONDS_BETWEEN_LINES:
            self._printed_at = time.monotonic()
            self._print(f"{event.phase}: {event.figures}")

    def _print(self, text: str) -> None:
        self._console.print(visible(f"{self._prefix}{text}"), highlight=False, markup=False)  # it may name users


class WorkCounter:
    """Progress events of a phase that works through many texts or files, with the time left at the mean pace so far.

    `event` names the phase and the unit. `expected` is the number in the whole phase as far as it is clear; rows begun
    beyond it count too. It is a receiver of `AdaptedModel.on_rows`.
    """

    def __init__(self, event: ProgressEvent, on_progress: OnProgress, expected: int = 0) -> None:
        self._event, self._on_progress, self._expected = event, on_progress, expected
        self._done, self._begun = 0.0, 0
        self._started = self._reported = time.monotonic()

    def __call__(self, done: float, begun: int = 0) -> None:
        """Counts work done since the last call, and work newly begun."""
        self._done += done
        self._begun += begun
        now = time.monotonic()
        if now - self._reported < _SECONDS_BETWEEN_EVENTS or not self._done:
            return
        self._reported = now
        total = max(self._expected, self._begun, ceil(self._done - 1e-6))
        left = seconds_left(now - self._started, self._done, total)
        self._on_progress(self._event._replace(step=int(self._done), steps=total, seconds_left=left))


@contextmanager
def watched(
    models: Iterable[AdaptedModel], event: ProgressEvent, on_progress: OnProgress, texts: int = 0
) -> Iterator[None]:
    """Reports the texts that models score and write inside as progress of a phase; about `texts` are expected."""
    before = {model: model.on_rows for model in models}
    counter = WorkCounter(event._replace(unit="texts"), on_progress, texts)
    for model in before:
        model.on_rows = counter
    try:
        yield
    finally:
        for model, on_rows in before.items():
            model.on_rows = on_rows


class UserCounter:
    """Progress events of a command that works through users, with the time left at the mean pace so far."""

    def __init__(self, phase: str, users: int, on_progress: OnProgress) -> None:
        self.event, self._on_progress = ProgressEvent(phase, users=users), on_progress
        self._started = time.monotonic()

    def __call__(self, users_done: int, text: str = "") -> None:
        """Reports how many users are done; `event` is the last report, without a text."""
        spent, users = time.monotonic() - self._started, self.event.users
        left = seconds_left(spent, users_done, users)
        self.event = self.event._replace(users_done=users_done, seconds_left=left)
        self._on_progress(self.event._replace(text=text))


class TrainingMonitor:
    """Counts of a run in training: every step goes to metrics.jsonl, to the trackers and to `on_progress`.

    A figure that is not finite is written as null, so that the file stays JSON. `users` are those that this process
    trains, in all chunks.
    """

    def __init__(
        self, metrics: Path, users: int, on_progress: OnProgress = silent, tracking: Tracking | None = None
    ) -> None:
        self.metrics, self.users, self.on_progress, self.tracking = metrics, users, on_progress, tracking
        self.taken = self.ended = 0  # steps of single users, and users
        self.seen = self.planned = 0  # users of the chunks so far, and their steps
        self.steps: dict[str, int] = {}  # of the users of this chunk
        self.done: set[str] = set()  # users of this chunk
        self.started = time.monotonic()
        self.last = ProgressEvent("training", users=users)

    def __enter__(self) -> TrainingMonitor:
        self.file = self.metrics.open("ab")
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def begin(
        self, steps: dict[str, int], finished: Collection[str], users: int, resumed: Mapping[str, int] | None = None
    ) -> None:
        """The next chunk: steps of its users in training, users finished by an earlier process, and their number.

        `resumed` are the steps of the users whose training goes on from a checkpoint. Lines of later steps are removed
        from metrics.jsonl, since those steps are taken again.
        """
        if self.seen == 0:  # an earlier process can only have begun the first chunk of this one
            self._remove_later({user: (resumed or {}).get(user, 0) for user in steps.keys() - set(finished)})
        self.steps, self.done = steps, set(finished)
        self.seen += users
        self.planned += sum(steps.values())
        self.ended += users - len(steps) + len(finished)
        self.taken += sum(steps[user] for user in finished)

    def _remove_later(self, last: Mapping[str, int]) -> None:
        """Removes the lines of later steps than `last` of these users, and a line that a kill cut short."""

        def stays(line: str) -> bool:
            try:
                row = json.loads(line)
            except ValueError:
                return False
            return line.endswith("\n") and bool(row["step"] <= last.get(row["user_id"], row["step"]))

        with self.metrics.open(encoding="utf-8") as lines:
            repeated = not all(map(stays, lines))
        if repeated:
            self.file.close()
            with self.metrics.open(encoding="utf-8") as lines:
                atomic_write(self.metrics, (line for line in lines if stays(line)))
            self.file = self.metrics.open("ab")

    def end(self, user_id: str, steps: int) -> None:
        """Counts a user as done after so many steps; planned steps that were not needed no longer count."""
        if user_id not in self.done:
            self.done.add(user_id)
            self.ended += 1
            self.planned -= self.steps.get(user_id, steps) - steps

    def step(self, reports: Sequence[StepReport]) -> None:
        """Takes in one step of a cohort. Raises DiskFullError where its lines do not fit."""
        lines = bytearray()
        for report in reports:
            row = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in report._asdict().items()
            }
            lines += json.dumps(row).encode() + b"\n"
            if report.step >= report.steps:
                self.end(report.user_id, report.step)
        append_whole(self.file, bytes(lines), durable=False)
        self.taken += len(reports)
        if self.tracking is not None:
            self.tracking.step(reports, self.taken)
        violations = [report.violation for report in reports if report.violation is not None]
        steps = round(self.planned * self.users / max(1, self.seen))  # users of later chunks are assumed as busy
        spent = time.monotonic() - self.started
        self.last = ProgressEvent(
            "training",
            users_done=self.ended,
            users=self.users,
            step=self.taken,
            steps=steps,
            loss=fmean(report.loss for report in reports),
            margin=fmean(report.margin for report in reports),
            violation=max(violations, default=None),
            seconds_left=seconds_left(spent, self.taken, steps),
        )
        self.on_progress(self.last)

    def log(self, text: str) -> None:
        """Reports one line for people, beside the figures so far."""
        self.on_progress(self.last._replace(text=text))


def check_trackers(names: Sequence[str], workers: int) -> None:
    """Raises InputError for each tracker whose package is not installed (accelerate would ignore it silently), and for
    any tracker where several processes share the run: its curves would be those of one process."""
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
    """Curves of a run for the trackers of `run.report_to`, through accelerate; their files lie under RUN/tracking.

    Every few steps: `loss`, `margin`, `accuracy`, `grad_norm` (means over the users in the slots), `violation` (the
    largest, nats over the limit), `dual` (the largest). At the end: the summary of the run. No user is named.
    """

    def __init__(self, config: Config, run: Path) -> None:
        names = config.run.report_to
        self._accelerator, self._steps = None, 0
        if names:
            from accelerate import Accelerator

            place = run / "tracking"
            place.mkdir(parents=True, exist_ok=True)
            self._accelerator = Accelerator(log_with=list(names), project_dir=str(place), cpu=True)
            settings = {
                key: value if isinstance(value, str | int | float | bool) else str(value)
                for key, value in dotted(config.model_dump(mode="json")).items()
                if value is not None
            }
            self._accelerator.init_trackers(config.name, config=settings)

    def step(self, reports: Sequence[StepReport], taken: int) -> None:
        """Takes in one step of a cohort, after which all users together have `taken` steps."""
        self._steps += 1
        if self._accelerator is None or self._steps % _STEPS_BETWEEN_POINTS != 1:
            return
        names = ("loss", "margin", "accuracy", "grad_norm")
        means = {name: fmean(getattr(report, name) for report in reports) for name in names}
        for name in ("violation", "dual"):
            values = [value for report in reports if (value := getattr(report, name)) is not None]
            means |= {name: max(values)} if values else {}
        finite = {f"train/{name}": value for name, value in means.items() if math.isfinite(value)}
        self._accelerator.log(finite, step=taken)

    def end(self, summary: RunSummary, taken: int) -> None:
        """Logs the summary of the run and closes the trackers."""
        if self._accelerator is not None:
            values = {f"run/{name}": value for name, value in summary._asdict().items() if value is not None}
            self._accelerator.log(values, step=taken)
            self._accelerator.end_training()
