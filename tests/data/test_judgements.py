"""Comparisons of a judgement's answers, and answers that are gathered on the disk."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.common.files import DiskFullError
from persona_rlhf.data import judgements
from persona_rlhf.data.judgements import Comparison, Judgement, PlacedJudgement, ScoredAnswer, comparisons, gathered

ANSWERS = st.lists(
    st.builds(
        ScoredAnswer,
        st.sampled_from("abcd"),
        st.sampled_from(["", "x", "y", "z"]),
        st.sampled_from([None, 0.0, 1.0, 1.5, 4.0]),
    ),
    min_size=2,
    max_size=6,
)


@given(ANSWERS, st.sampled_from([0.0, 1.0, 3.0]))
def test_comparisons_are_those_of_the_best_answers(answers: list[ScoredAnswer], gap: float) -> None:
    """Against all pairs of answers, tried one by one."""
    scored = [answer for answer in answers if answer.score is not None]
    outcome = list(comparisons(answers, gap))
    best = max((answer.score for answer in scored if answer.score is not None), default=None)
    expected = [
        (one, other)
        for one in scored
        for other in scored
        if one.score == best
        and other.score is not None
        and best is not None
        and best > other.score
        and best - other.score >= gap
        and one.text
        and other.text
        and one.text != other.text
    ]
    assert [tuple(one) for one in outcome if isinstance(one, Comparison)] == (expected if len(scored) > 1 else [])
    tops = sum(answer.score == best for answer in scored)
    expected_count = tops * (len(scored) - tops) + tops * (tops - 1) // 2 if len(scored) > 1 else 1
    assert len(outcome) == expected_count + len(answers) - len(scored)


def placed(user: str, prompt: str, text: str) -> PlacedJudgement:
    judgement = Judgement(user, prompt, [ScoredAnswer("", text, 1.0)], "", None, None)
    return PlacedJudgement("f", 1, judgement)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["p", "q"]), st.text(max_size=4)), max_size=12))
def test_answers_are_gathered_by_user_and_prompt_in_their_order(rows: list[tuple[str, str, str]]) -> None:
    groups: dict[tuple[str, str], list[str]] = {}
    for user, prompt, text in rows:
        groups.setdefault((user, prompt), []).append(text)
    read = {}
    for _, _, judgement in gathered(placed(*row) for row in rows):
        assert isinstance(judgement, Judgement)
        read[judgement.user, judgement.prompt] = [answer.text for answer in judgement.answers]
    assert read == groups
    assert list(read) == sorted(groups)


def test_a_full_temporary_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect

    def small(name: str) -> sqlite3.Connection:
        store = connect(name)
        store.execute("PRAGMA max_page_count = 8")
        return store

    monkeypatch.setattr(judgements.sqlite3, "connect", small)
    with pytest.raises(DiskFullError) as error:
        list(gathered(placed("u", f"p{n}", "text " * 200) for n in range(100)))
    assert error.value.path == Path(judgements.gettempdir()) / "answers by prompt"
