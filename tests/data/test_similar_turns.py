"""The nearest answers, against brute force over all pairs of turns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.data import similar_turns
from persona_rlhf.data.similar_turns import AnsweredTurn, Nearest, nearest_answers, word_weights


def turn(words: str, answer: str, person: str, conversation: str) -> AnsweredTurn:
    return AnsweredTurn(frozenset(words.split()), frozenset(answer.split()), person, conversation)


def brute_force(turns: Sequence[AnsweredTurn]) -> list[Nearest | None]:
    """Every turn compared with every other one, from the definitions."""
    words = {word for each in turns for word in each.turn}
    counts = {word: sum(word in each.turn for each in turns) for word in words}
    compared = {word for word, n in counts.items() if n > 1 and (n <= 2 or n <= similar_turns.COMMON * len(turns))}
    weight = {word: math.log(len(turns) / counts[word]) for word in compared}

    def norm(each: AnsweredTurn) -> float:
        return math.sqrt(sum(weight[word] ** 2 for word in each.turn & compared))

    nearest: list[Nearest | None] = []
    for one in turns:
        best = None
        for place, other in enumerate(turns):
            common = one.turn & other.turn & compared
            if one.person == other.person or one.conversation == other.conversation or not common:
                continue
            if len(one.answer & other.answer) / len(one.answer | other.answer) >= similar_turns.IDENTICAL:
                continue
            if not (product := norm(one) * norm(other)):
                continue
            cosine = round(sum(weight[word] ** 2 for word in common) / product, 6)
            if cosine >= similar_turns.LEAST_SIMILARITY and (best is None or cosine > best.similarity):
                best = Nearest(place, cosine)
        nearest.append(best)
    return nearest


WORDS = st.frozensets(st.sampled_from([*"abcdefghij"]), min_size=1, max_size=5)
TURN = st.builds(AnsweredTurn, WORDS, WORDS, st.sampled_from([*"xyz"]), st.sampled_from([*"1234"]))
TURNS = st.lists(TURN, min_size=1, max_size=25)


@given(TURNS, st.sampled_from([0.1, 0.5]))
def test_as_by_brute_force(turns: list[AnsweredTurn], common: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similar_turns, "COMMON", common)
        patch.setattr(similar_turns, "_ROWS", 7)
        fast, slow = nearest_answers(turns), brute_force(turns)
        assert [each and round(each.similarity, 6) for each in fast] == [each and each.similarity for each in slow]
        for one, each in zip(turns, fast, strict=True):
            if each is not None:
                other = turns[each.place]
                assert one.person != other.person
                assert one.conversation != other.conversation
                assert len(one.answer & other.answer) < similar_turns.IDENTICAL * len(one.answer | other.answer)


def test_of_equal_turns_the_first_counts() -> None:
    turns = [turn("deep sea", f"answer {n}", f"p{n}", f"c{n}") for n in range(2)]
    turns += [turn("high hill", f"other {n}", f"p{n}", f"d{n}") for n in range(2)]
    assert nearest_answers(turns) == [Nearest(1, 1.0), Nearest(0, 1.0), Nearest(3, 1.0), Nearest(2, 1.0)]


def test_common_words_and_words_of_one_turn_are_not_compared() -> None:
    turns = [frozenset({"you", "rare"}), frozenset({"you", "rare"}), frozenset({"you", "once"})]
    assert word_weights(turns) == [{"rare": 1.0}, {"rare": 1.0}, {}]


def test_progress_counts_the_turns() -> None:
    seen: list[int] = []
    nearest_answers([turn("a", "b", "x", "1")] * 600, seen.append)
    assert seen == [512, 600]
    assert nearest_answers([]) == []
