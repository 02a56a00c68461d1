from __future__ import annotations

import json
from io import StringIO

import pytest
import torch
from rich.console import Console

from persona_rlhf.config.training import LoraSettings
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.row_answers import greedy_answers
from persona_rlhf.pipeline import monitoring
from persona_rlhf.pipeline.distributed import WorkShare
from persona_rlhf.pipeline.monitoring import (
    ProgressDisplay,
    ProgressEvent,
    TrainingMonitor,
    UserCounter,
    WorkCounter,
    seconds_left,
    watched,
)
from persona_rlhf.training.engine import StepReport
from tests.models.tiny import random_flat, random_row, tiny_base


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


def test_work_is_counted_with_the_time_left_at_the_mean_pace(monkeypatch):
    """Four of ten texts in 8 seconds: 12 seconds for the other six. Then 20 more begin, and 26 are left."""
    clock = iter([100.0, 102.0, 108.0, 108.1, 110.0])
    monkeypatch.setattr(monitoring.time, "monotonic", lambda: next(clock))
    events = list[ProgressEvent]()
    counter = WorkCounter(ProgressEvent("measuring", unit="texts"), events.append, 10)
    counter(0.0, 10)
    counter(4.0)
    counter(0.0, 20)  # too soon for another report
    counter(1.0)
    assert [(event.step, event.steps) for event in events] == [(4, 10), (5, 30)]
    assert [event.seconds_left for event in events] == pytest.approx([12.0, 50.0])
    assert events[0].figures == "4 of 10 texts, 0:12 left"
    assert events[0]._replace(scope="these users").figures == "4 of 10 texts, 0:12 left for these users"


@pytest.mark.parametrize(
    ("spent", "done", "total", "expected"),
    [
        (5.0, 2, 400, None),  # the first texts are the slowest: at their pace 16 minutes
        (5.0, 8, 400, 245.0),
        (30.0, 2, 400, 5970.0),  # half a minute for two texts is a pace
        (2.0, 0, 24, None),
        (9.0, 4, 4, 0.0),
        (9.0, 5, 4, 0.0),
    ],
)
def test_an_early_pace_gives_no_estimate(spent, done, total, expected):
    assert seconds_left(spent, done, total) == expected


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("work", ["generate", "sample", "score", "score_greedy", "greedy_answers"])
def test_all_texts_that_a_model_scores_or_writes_are_counted_in_steps(monkeypatch, work, padded):
    monkeypatch.setattr(monitoring, "_SECONDS_BETWEEN_EVENTS", 0)
    adapted, events = AdaptedModel(tiny_base(), LoraSettings(rank=2, alpha=2)), list[ProgressEvent]()
    adapted.tokens_per_pass = adapted.tokens_per_generation = 64
    adapted.packs_rows = not padded  # answers are then decoded with padding
    rows = [random_row(torch.Generator().manual_seed(n), 5, 3 + n) for n in range(12)]
    counts = list[tuple[float, int]]()
    flat = random_flat(adapted, 2)
    with watched([adapted], ProgressEvent("judging"), events.append), adapted.using(flat):
        show = adapted.on_rows
        adapted.on_rows = lambda done, begun: (counts.append((done, begun)), show(done, begun))
        if work in ("generate", "sample"):
            adapted.generate([[row.prompt for row in rows]] * 2, 6, 0.0 if work == "generate" else 1.0)
        elif work == "greedy_answers":
            adapted.packs_rows = True  # as it needs
            greedy_answers(adapted, [rows, rows[:7]], (), 6)
        else:
            getattr(adapted, work)([rows, rows[:7]])
    texts = sum(begun for _, begun in counts)
    assert texts == {"generate": 24, "sample": 24, "greedy_answers": texts}.get(work, 19)
    assert work != "greedy_answers" or texts > 19, "some answers must be decoded"
    assert sum(done for done, _ in counts) == pytest.approx(texts)
    assert len(events) > 2
    assert [event.step for event in events] == sorted(event.step for event in events)
    assert (events[-1].steps, events[-1].seconds_left) == (texts, pytest.approx(0, abs=1e-3))
    seen = len(events)
    adapted.generate([[rows[0].prompt]], 2)
    assert len(events) == seen, "outside nobody watches"


def _shown(events, *, terminal=False, share=None):
    out = StringIO()
    with ProgressDisplay(Console(file=out, force_terminal=terminal, width=120), share) as display:
        for event in events:
            display(event)
    return out.getvalue()


EVENT = ProgressEvent("training", "", 2, 30, 40, 600, 0.5, -0.25, 0.1, 61.0)
LINE = "training: 2 of 30 users done, 40 of 600 steps, loss 0.500, margin -0.25, worst violation +0.10 nats, 1:01 left"


def test_the_name_of_a_user_moves_no_cursor():
    assert _shown([ProgressEvent("judging", "judging \x1b[2Jz, \u202egnp")]) == "judging \\x1b[2Jz, \\u202egnp\n"


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
