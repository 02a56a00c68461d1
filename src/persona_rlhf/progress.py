"""What a person sees while a fleet trains, and what `metrics.jsonl` keeps of every step."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table

if TYPE_CHECKING:
    from persona_rlhf.training.engine import StepReport


class Progress:
    """A live table on a terminal, a plain line now and then elsewhere; every step goes to `metrics.jsonl` either way.

    A figure that is not finite is written as null: the file stays JSON.
    """

    def __init__(self, console: Console, metrics: Path, steps: dict[str, int]) -> None:
        self.console, self.metrics, self.steps = console, metrics, steps
        self.taken = 0
        self.total = sum(steps.values())
        self.ended: set[str] = set()
        self.started = self.spoken = time.monotonic()
        self.live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __enter__(self) -> Progress:
        self.file = self.metrics.open("a", encoding="utf-8")
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if self.live is not None:
            self.live.stop()

    def skip(self, user_id: str, steps: int) -> None:
        """Counts a user whom a run before this one finished."""
        self.taken += steps
        self.end(user_id, steps)

    def end(self, user_id: str, steps: int) -> None:
        """Counts a user as done after so many steps; those that he did not need are not waited for."""
        if user_id not in self.ended:
            self.ended.add(user_id)
            self.total -= self.steps.get(user_id, steps) - steps

    def step(self, reports: Sequence[StepReport]) -> None:
        """Takes in one step of a cohort."""
        for report in reports:
            row = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in report._asdict().items()
            }
            self.file.write(json.dumps(row) + "\n")
            if report.step >= report.steps:
                self.ended.add(report.user_id)
        self.file.flush()
        self.taken += len(reports)
        if self.live is not None:
            self.live.update(self._table(reports))
        elif time.monotonic() - self.spoken > 10:
            self.spoken = time.monotonic()
            self.say(self._line(reports))

    def say(self, text: str) -> None:
        """One plain line for a person."""
        self.console.print(text, highlight=False)

    def _left(self) -> str:
        spent = time.monotonic() - self.started
        left = spent * (self.total - self.taken) / max(1, self.taken)
        return f"{int(left // 60)}:{int(left % 60):02d} left"

    def _line(self, reports: Sequence[StepReport]) -> str:
        worst = [report.violation for report in reports if report.violation is not None]
        violation = f", worst violation {max(worst):+.2f} nats" if worst else ""
        return (
            f"training: {len(self.ended)} of {len(self.steps)} users done, {self.taken} of {self.total} steps, "
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
