"""Patterns of users' choices: planted ones are reported, by exact bounds, and honest users are not."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
from scipy.stats import beta

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.experiment import PatternSettings
from persona_rlhf.data.answer_patterns import AnswerPattern, answer_patterns
from persona_rlhf.data.check import check
from persona_rlhf.data.pairs import Message, PreferencePair, read_pairs
from persona_rlhf.data.store import PairStore

SETTINGS = PatternSettings()


def pair(n: int, chosen: str, rejected: str, place: tuple[int, int] | None = None, user: str = "u") -> PreferencePair:
    prompt = (Message("user", f"p{n}"),)
    return PreferencePair(user, prompt, chosen, rejected, str(n), None, None, 1.0, "train", None, "f", n, place)


def of(count: int, n: int, true: tuple[str, str], other: tuple[str, str]) -> list[PreferencePair]:
    return [pair(number, *(true if number < count else other)) for number in range(n)]


def test_the_longer_answer_is_reported_above_the_limit_with_an_exact_bound() -> None:
    [pattern] = answer_patterns(of(60, 60, ("long", "no"), ("no", "long")), SETTINGS)
    assert (pattern.kind, pattern.followed, pattern.n) == ("longer", 60, 60)
    assert pattern.lower == pytest.approx(beta.ppf(0.05, 60, 1))
    assert pattern.reason == "chose the longer answer in 60 of 60 cases (at least 95%)"
    for count, n in ((58, 60), (20, 20), (0, 60), (30, 60)):
        expected = beta.ppf(0.05, count, n - count + 1) if count else 0.0
        reported = answer_patterns(of(count, n, ("long", "no"), ("no", "long")), SETTINGS)
        assert bool(reported) == (expected > 0.9)


def test_answers_of_equal_length_say_nothing_about_length() -> None:
    assert answer_patterns(of(60, 60, ("aa", "bb"), ("bb", "aa")), SETTINGS) == []


def test_a_choice_among_several_counts_once_and_the_level_is_shared_by_the_places() -> None:
    pairs = [pair(n, "best", f"rest{m}"[: 4 + m], (4, 4)) for n in range(30) for m in range(3)]
    [pattern] = [one for one in answer_patterns(pairs, SETTINGS) if one.kind == "place"]
    assert (pattern.followed, pattern.n) == (30, 30)
    assert pattern.lower == pytest.approx(beta.ppf(0.05 / 4, 30, 1))
    assert answer_patterns(pairs[: 3 * 10], SETTINGS) == []


def test_a_repeated_pair_is_compared_with_its_first_answer() -> None:
    pairs = [pair(n, *(("a", "b") if turn % 2 else ("b", "a"))) for n in range(30) for turn in range(3)]
    [pattern] = answer_patterns(pairs, SETTINGS)
    assert (pattern.kind, pattern.followed, pattern.n) == ("changed", 30, 60)
    same = [pair(n, "a", "b") for n in range(30) for _ in range(3)]
    assert answer_patterns(same, SETTINGS) == []


def test_a_limit_of_null_reports_nothing_and_a_smaller_level_asks_for_more() -> None:
    pairs = [pair(n, *sides, place=(1, 2)) for n in range(40) for sides in (("long", "no"), ("long", "no"))]
    pairs += [pair(n, "no", "long", place=(1, 2)) for n in range(1000, 1001)]
    pairs += [pair(n, *sides) for n in range(2000, 2060) for sides in (("aa", "bb"), ("bb", "aa"))]
    limits = {"place": 0.8, "longer": 0.9, "changed": 0.35}
    assert {one.kind for one in answer_patterns(pairs, PatternSettings(**limits))} == {*limits}
    for kind in limits:
        left = {one.kind for one in answer_patterns(pairs, PatternSettings(**{**limits, kind: None}))}
        assert left == {*limits} - {kind}
    forty = of(40, 40, ("long", "no"), ("no", "long"))
    assert answer_patterns(forty, PatternSettings(level=0.05))
    assert not answer_patterns(forty, PatternSettings(level=0.01))


def test_honest_users_are_reported_no_more_often_than_the_level_says() -> None:
    """Users at the very limit: a share of exactly 0.9 is reported in at most 5% of the users."""
    random = Random(1)
    pairs = [
        pair(n, *(("long", "no") if random.random() < 0.9 else ("no", "long")), user=f"u{user}")
        for user in range(400)
        for n in range(80)
    ]
    assert len(answer_patterns(pairs, SETTINGS)) <= 0.05 * 400 + 3 * (400 * 0.05 * 0.95) ** 0.5


def test_check_and_the_store_read_the_place(tmp_path: Path) -> None:
    rows = [{"user_id": "u", "prompt": f"p{n}", "chosen": "aa", "rejected": "bb", "place": "1/2"} for n in range(30)]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [pattern] = check([file]).patterns
    assert pattern == AnswerPattern("u", "place", 30, 30, pytest.approx(beta.ppf(0.025, 30, 1)))
    assert "place" not in check([file]).unknown_columns
    assert {one.place for one in read_pairs(file, 0.25)} == {one.place for one in PairStore(file, 0.25)} == {(1, 2)}


@pytest.mark.parametrize("place", ["0/2", "3/2", "2", "a/b", 1, "1/2/3", "-1/2"])
def test_a_place_is_written_as_a_fraction(tmp_path: Path, place: object) -> None:
    row = {"user_id": "u", "prompt": "p", "chosen": "aa", "rejected": "bb", "place": place}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match="place: is .*; write the place of `chosen` among the answers shown"):
        check([tmp_path / "p.jsonl"])
