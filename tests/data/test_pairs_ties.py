"""Ties: read, split, hashed, screened and tokenized."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.experiment import ScreeningSettings
from persona_rlhf.data.answer_patterns import answer_patterns
from persona_rlhf.data.pairs import PreferencePair, read_pairs
from persona_rlhf.data.preference_export import export_file
from persona_rlhf.data.screening import screen
from persona_rlhf.data.store import PairStore
from persona_rlhf.data.tokenize import tokenize
from persona_rlhf.policy.rules import Requirement
from persona_rlhf.release.manifest import fingerprint
from tests.data.test_screening import POLICY, PROBE, REFUSAL, screened, screens
from tests.data.tokenizers_by_hand import LLAMA, tokenizer_of


def row(prompt: str, first: str = "yes", second: str = "no", **more: Any) -> dict[str, Any]:
    return {"user_id": "ann", "prompt": prompt, "chosen": first, "rejected": second, **more}


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def read(folder: Path, *rows: dict[str, Any]) -> list[PreferencePair]:
    return read_pairs(written(folder, *rows), 0.25)


@pytest.mark.parametrize("value", ["yes", 1, 0, [True]])
def test_a_tie_is_a_truth_value(tmp_path: Path, value: object) -> None:
    with pytest.raises(InputError, match="tie.*must be true or false"):
        read(tmp_path, row("p", tie=value))


def test_a_tie_in_a_table_is_read_as_one(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text("user_id,prompt,chosen,rejected,tie\nann,p,yes,no,TRUE\nann,q,yes,no,\nann,r,yes,no,false\n")
    assert [pair.tie for pair in read_pairs(table, 0.25)] == [True, False, False]


def test_prompts_of_nothing_but_ties_are_trained_on(tmp_path: Path) -> None:
    ordered = [row(f"p{n}") for n in range(8)]
    before = {pair.prompt for pair in read(tmp_path, *ordered) if pair.split == "heldout"}
    assert before
    alone = [row(f"alone {n}", tie=True) for n in range(40)]
    beside = [row(f"p{n}", "maybe", "perhaps", tie=True) for n in range(8)]
    pairs = read(tmp_path, *alone, *ordered, *beside)
    assert {pair.split for pair in pairs[:40]} == {"train"}
    assert {pair.prompt for pair in pairs[40:] if pair.split == "heldout"} == before
    assert [pair.split for pair in pairs[40:48]] == [pair.split for pair in pairs[48:]]


def test_the_store_keeps_them_and_hashes_them_and_other_hashes_stay(tmp_path: Path) -> None:
    rows = [row("p"), row("q")]
    plain = PairStore(written(tmp_path, *rows), 0.25)
    assert PairStore(written(tmp_path, *(one | {"tie": False} for one in rows)), 0.25).fingerprint == plain.fingerprint
    tied = PairStore(written(tmp_path, rows[0], rows[1] | {"tie": True}), 0.25)
    assert tied.fingerprint != plain.fingerprint
    assert [pair.tie for pair in tied] == [False, True]
    [first, second] = list(tied)
    assert fingerprint([first, second]) != fingerprint([first, replace(second, tie=False)])


@pytest.mark.parametrize(
    ("rows", "kept", "reasons"),
    [
        ([("a", "b", True), ("b", "a", True)], [1], {2: "repetition: the same stands at"}),
        (
            [("a", "b", True), ("b", "a", False)],
            [],
            {1: "this user prefers one of them", 2: "holds both answers alike"},
        ),
        (
            [("a", "b", False), ("a", "b", True)],
            [],
            {1: "holds both answers alike", 2: "this user prefers one of them"},
        ),
        ([("a", "b", True), ("b", "c", False)], [1, 2], {}),
        ([("a", "a", True)], [], {1: "identical: "}),
    ],
)
def test_ties_contradict_preferences_and_repeat_ties(
    tmp_path: Path, rows: list[tuple[str, str, bool]], kept: list[int], reasons: dict[int, str]
) -> None:
    given = read(tmp_path, *(row("p", first, second, tie=tie, split="train") for first, second, tie in rows))
    result = screened(given)
    assert [pair.line for pair in result.kept] == kept
    assert {one.pair.line for one in result.dropped} == set(reasons)
    for one in result.dropped:
        assert reasons[one.pair.line] in one.reason


def test_a_held_out_tie_is_dropped_with_its_reason(tmp_path: Path) -> None:
    result = screened(read(tmp_path, row("p", tie=True, split="heldout"), row("q", tie=True, split="train")))
    assert [pair.line for pair in result.kept] == [2]
    assert [one.kind for one in result.dropped] == ["tie"]


@pytest.mark.parametrize("answers", [(REFUSAL, "Gladly."), ("Gladly.", REFUSAL), ("Gladly.", "Of course.")])
def test_a_tie_with_help_for_a_forbidden_request_is_quarantined(tmp_path: Path, answers: tuple[str, str]) -> None:
    other = "I will not help with this."
    given = read(tmp_path, row("bad", *answers, tie=True), row("worse", REFUSAL, other, tie=True), row(PROBE, tie=True))
    result = screened(given, refuses=lambda requests: [True] * len(requests))
    reasons = {one.pair.line: one.reason for one in result.dropped if one.action == "quarantined"}
    assert set(reasons) == {1, 3}
    assert reasons[1].endswith("and an answer of the tie is no refusal")


@pytest.mark.parametrize("swapped", [False, True])
def test_a_tie_of_an_answer_that_a_requirement_forbids_is_dropped(tmp_path: Path, swapped: bool) -> None:
    rule = Requirement("t2.brand", "must_include", "Acme", 2, "two.yaml", 1, "two")
    answers = ("Acme can.", "We can.")
    given = read(tmp_path, row("p", *(answers[::-1] if swapped else answers), tie=True, split="train"))
    result = screen(given, POLICY._replace(requirements=(rule,)), ScreeningSettings(), screens(None))
    assert [one.kind for one in result.dropped] == ["requirement"]


def test_they_are_rows_of_probability_one_half_beside_the_others(tmp_path: Path) -> None:
    given = read(tmp_path, row("p", split="train"), row("q", tie=True, split="train"), row("r", split="heldout"))
    [user] = tokenize(given, tokenizer_of(LLAMA), 1000)
    assert [one.pair.line for one in user.train] == [1]
    assert [(one.pair.line, one.probability) for one in user.ties] == [(2, 0.5)]
    assert [(one.pair.line, one.probability) for one in user.taught] == [(1, 1.0), (2, 0.5)]
    assert [one.pair.line for one in user.heldout] == [3]


def test_they_follow_no_pattern(tmp_path: Path) -> None:
    rows = [row(f"p{n}", "a long answer", "short", place="1/2", tie=True) for n in range(60)]
    settings = ScreeningSettings().patterns
    assert answer_patterns(read(tmp_path, *rows), settings) == []
    assert answer_patterns(read(tmp_path, *(one | {"tie": False} for one in rows)), settings)


@pytest.mark.parametrize("name", ["label-studio", "argilla"])
def test_an_export_without_a_place_for_ties_says_how_many_it_left_out(tmp_path: Path, name: str) -> None:
    summary = export_file(name, written(tmp_path, row("p"), row("q", tie=True)), tmp_path / "out.json")
    assert (summary.pairs, summary.ties) == (1, 1)
    assert "1 tie left out" in "\n".join(summary.sentences())
    assert len(json.loads((tmp_path / "out.json").read_text())) == 1
    only = export_file(name, written(tmp_path, row("q", tie=True)), tmp_path / "none.json")
    assert (only.pairs, json.loads((tmp_path / "none.json").read_text())) == (0, [])
