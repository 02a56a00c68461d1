from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from persona_rlhf.common.errors import InputError
from persona_rlhf.data.check import check, render

SAMPLE = Path(__file__).parents[2] / "data" / "samples" / "preferences.jsonl"


def test_the_shipped_sample_is_sound() -> None:
    summary = check([SAMPLE])
    assert (summary.pairs, summary.users) == (15, 3)
    assert summary.screened_out == {}
    assert summary.unknown_columns == {}
    assert summary.users_without_train == summary.users_without_heldout == 0


def test_everything_is_counted(tmp_path: Path) -> None:
    rows = [
        {
            "user_id": "a",
            "prompt": "one two",
            "chosen": "x y z",
            "rejected": "x",
            "split": "train",
            "clean_choice": True,
        },
        {"user_id": "a", "prompt": "one two", "chosen": "x y z", "rejected": "x", "split": "heldout", "extra": 1},
        {"user_id": "a", "prompt": "b", "chosen": "x", "rejected": "x", "split": "train", "clean_choice": False},
        {"user_id": "b", "prompt": "b", "chosen": "x", "rejected": "y z", "split": "heldout"},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = check([path])
    assert summary.to_json() == {
        "pairs": 4,
        "users": 2,
        "pairs_per_user": {"minimum": 1, "median": 2.0, "p95": 3, "maximum": 3},
        "splits": {"train": 2, "heldout": 2},
        "users_without_train": 1,
        "users_without_heldout": 0,
        "words": {
            "prompt": {"minimum": 1, "median": 1.5, "p95": 2, "maximum": 2},
            "chosen": {"minimum": 1, "median": 2.0, "p95": 3, "maximum": 3},
            "rejected": {"minimum": 1, "median": 1.0, "p95": 2, "maximum": 2},
        },
        "screened_out": {"repetition": 1, "identical": 1},
        "ties": 0,
        "on_both_sides": 1,
        "chosen_is_longer": pytest.approx(2 / 3),
        "clean_labels": 0.5,
        "unknown_columns": {"extra": 1},
        "read_as": {},
        "personal_data": {},
        "patterns": [],
        "columns": {
            "user": {"user_id": 4},
            "prompt": {"prompt": 4},
            "chosen": {"chosen": 4},
            "rejected": {"rejected": 4},
            "split": {"split": 4},
            "clean label": {"clean_choice": 2},
        },
    }
    assert json.loads(json.dumps(summary.to_json()))["users"] == 2
    screen = io.StringIO()
    Console(file=screen, width=100).print(render(summary))
    for words in ("pairs", "unknown column `extra`", "will be dropped, identical", "labels without noise"):
        assert words in screen.getvalue()


def test_the_column_of_each_role_is_told(tmp_path: Path) -> None:
    answers = {"chosen_response": "x", "rejected_response": "y"}
    talk = {
        side: [{"role": "user", "content": "p"}, {"role": "assistant", "content": side}]
        for side in ("chosen", "rejected")
    }
    rows = [
        {"user_id": "a", "instruction": "p", "input": "q", **answers, "created_at": "2026-11-01"},
        {"user_id": "a", "question": "r", **answers},
        {"user_id": "b", **talk},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = check([path])
    assert summary.columns == {
        "user": {"user_id": 3},
        "prompt": {"instruction": 1, "question": 1, "chosen and rejected, up to the last answer": 1},
        "chosen": {"chosen_response": 2, "chosen": 1},
        "rejected": {"rejected_response": 2, "rejected": 1},
        "time": {"created_at": 1},
    }
    screen = io.StringIO()
    Console(file=screen, width=140).print(render(summary))
    assert "column, chosen" in screen.getvalue()
    assert "chosen_response (2 rows), chosen (1 rows)" in screen.getvalue()


def test_the_bad_rows_of_all_files_are_told(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("{}\n")
    with pytest.raises(InputError) as error:
        check([tmp_path / "a.jsonl", SAMPLE, tmp_path / "b.jsonl"])
    assert {Path(problem.file).name for problem in error.value.problems} == {"a.jsonl", "b.jsonl"}


def test_seven_thousand_long_rows_take_seconds(tmp_path: Path) -> None:
    text = "some words of an answer " * 60
    rows = (
        {"user_id": f"u{i % 420}", "prompt": f"p{i}", "chosen": f"{text}{i}", "rejected": f"{i}{text}"}
        for i in range(7000)
    )
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = time.process_time()
    assert check([path]).users == 420
    assert time.process_time() - start < 30  # 0.7 s where it was written; a machine may be slower
