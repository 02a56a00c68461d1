from __future__ import annotations

import json
from io import StringIO

from rich.console import Console

from persona_rlhf.pipeline import monitoring
from persona_rlhf.pipeline.distributed import WorkShare
from persona_rlhf.pipeline.monitoring import ProgressDisplay, ProgressEvent, TrainingMonitor, UserCounter
from persona_rlhf.training.engine import StepReport


def _report(user_id: str, step: int) -> StepReport:
    return StepReport(user_id, step, 10, 0.5, 0.1, 1.0, 1.0, None, None)


def test_steps_that_nobody_takes_are_not_waited_for(tmp_path):
    """One user finished by an earlier process; one who stops now; one who takes all planned steps."""
    events = list[ProgressEvent]()
    with TrainingMonitor(tmp_path / "metrics.jsonl", 3, events.append) as progress:
        progress.begin({"a": 10, "b": 10, "c": 10}, ["a"], 3)
        for step in range(1, 11):
            progress.step([_report("b", step)] if step > 4 else [_report("b", step), _report("c", step)])
            if step == 4:
                progress.end("c", 4)
        progress.end("b", 10)
        progress.log("judging b")
        assert progress.taken == progress.planned == 10 + 10 + 4
        assert progress.ended == 3
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 14
    assert [(event.users_done, event.step, event.steps) for event in events[:1]] == [(1, 12, 30)]
    *_, last, text = events
    assert (last.users_done, last.users, last.step, last.steps, last.seconds_left) == (3, 3, 24, 24, 0)
    assert text == last._replace(text="judging b")


def test_a_resumed_run_repeats_no_step_in_its_metrics(tmp_path):
    """Killed in step 6; the checkpoint has step 4 of `b`, `a` is finished and `c` waits again."""
    metrics = tmp_path / "metrics.jsonl"
    with TrainingMonitor(metrics, 3) as progress:
        progress.begin({"a": 2, "b": 10, "c": 10}, [], 3)
        for step in range(1, 7):
            progress.step([_report(user, step) for user in "abc" if step <= 2 or user != "a"])
    with metrics.open("a") as file:
        file.write('{"user_id": "b", "st')
    with TrainingMonitor(metrics, 3) as progress:
        progress.begin({"a": 2, "b": 10, "c": 10}, ["a"], 3, {"b": 4})
        progress.step([_report("b", 5), _report("c", 1)])
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = {user: [row["step"] for row in rows if row["user_id"] == user] for user in "abc"}
    assert steps == {"a": [1, 2], "b": [1, 2, 3, 4, 5], "c": [1]}


def _shown(events, *, terminal=False, share=None):
    out = StringIO()
    with ProgressDisplay(Console(file=out, force_terminal=terminal, width=120), share) as display:
        for event in events:
            display(event)
    return out.getvalue()


EVENT = ProgressEvent("training", "", 2, 30, 40, 600, 0.5, -0.25, 0.1, 61.0)
LINE = "training: 2 of 30 users done, 40 of 600 steps, loss 0.500, margin -0.25, worst violation +0.10 nats, 1:01 left"


def test_without_a_terminal_text_is_printed_and_figures_every_ten_seconds(monkeypatch):
    assert _shown([ProgressEvent("preparing"), EVENT, ProgressEvent("training", "[b]judging[/b] a")]) == (
        "[b]judging[/b] a\n"
    )
    monkeypatch.setattr(monitoring, "_SECONDS_BETWEEN_LINES", -1.0)
    assert _shown([EVENT]) == f"{LINE}\n"
    assert _shown([EVENT], share=WorkShare(1, 4)) == f"[2-of-4] {LINE}\n"


def test_on_a_terminal_there_is_a_bar_with_the_time_left():
    shown = _shown([ProgressEvent("preparing"), EVENT, ProgressEvent("training", "judging a")], terminal=True)
    assert "judging a\n" in shown.replace("\r", "")
    assert "━" in shown
    assert "\x1b[31m" not in _shown([EVENT], terminal=True, share=WorkShare(0, 2))
    assert "━" not in _shown([EVENT], terminal=True, share=WorkShare(0, 2))


def test_a_counter_of_users_extrapolates_the_time_left(monkeypatch):
    clock, events = iter((100.0, 100.0, 110.0)), list[ProgressEvent]()
    monkeypatch.setattr(monitoring.time, "monotonic", lambda: next(clock))
    counter = UserCounter("attacking", 40, events.append)
    counter(0, "attacking 1 to 10 of 40 users")
    counter(10)
    assert [event.seconds_left for event in events] == [None, 30.0]
    assert events[1].figures == "10 of 40 users done, 0:30 left"
