from __future__ import annotations

from io import StringIO

from rich.console import Console

from persona_rlhf.pipeline.monitoring import Progress
from persona_rlhf.training.engine import StepReport


def _report(user_id: str, step: int) -> StepReport:
    return StepReport(user_id, step, 10, 0.5, 0.1, 1.0, 1.0, None, None)


def test_steps_that_nobody_takes_are_not_waited_for(tmp_path):
    """One user of a run before; one who stops now; one who goes to his end."""
    with Progress(Console(file=StringIO()), tmp_path / "metrics.jsonl", 3) as progress:
        progress.begin({"a": 10, "b": 10, "c": 10}, ["a"], 3)
        for step in range(1, 11):
            progress.step([_report("b", step)] if step > 4 else [_report("b", step), _report("c", step)])
            if step == 4:
                progress.end("c", 4)
        progress.end("b", 10)
        assert progress.taken == progress.planned == 10 + 10 + 4
        assert progress.ended == 3
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 14
