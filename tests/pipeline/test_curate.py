"""The tables and the JSON of `data screen`."""

from __future__ import annotations

import io
import json

from rich.console import Console

from persona_rlhf.data.answer_patterns import AnswerPattern
from persona_rlhf.pipeline.curate import ScreeningSummary, render_screening

SUMMARY = ScreeningSummary(2, 120, {("dropped", "identical"): 3}, 1, [])
PATTERN = AnswerPattern("[b]ana", "longer", 60, 60, 0.951)


def text_of(summary: ScreeningSummary) -> str:
    screen = io.StringIO()
    for table in render_screening(summary):
        Console(file=screen, width=140).print(table)
    return screen.getvalue()


def test_a_user_with_a_pattern_is_named_with_the_reason() -> None:
    text = text_of(SUMMARY._replace(patterns=[PATTERN]))
    assert "[b]ana" in text
    assert "chose the longer answer in 60 of 60 cases (at least 95%)" in text
    assert "reported, not left out" not in text_of(SUMMARY)


def test_the_json_holds_patterns_beside_the_counts() -> None:
    printed = json.loads(json.dumps(SUMMARY._replace(patterns=[PATTERN]).to_json()))
    assert printed["found"] == [{"action": "dropped", "why": "identical", "pairs": 3}]
    [pattern] = printed["patterns"]
    assert (pattern["user_id"], pattern["kind"], pattern["followed"], pattern["n"]) == ("[b]ana", "longer", 60, 60)
    assert pattern["reason"] == PATTERN.reason
