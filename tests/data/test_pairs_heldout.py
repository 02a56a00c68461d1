from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.data.pairs import Message, Prompt, deciding, held_out, position, read_pairs


def prompts(count: int) -> list[Prompt]:
    return [(Message("user", f"prompt {i}"),) for i in range(count)]


def test_the_share_is_met_over_many_prompts() -> None:
    shares = [len(held_out(f"user {u}", prompts(200), 0.25)) / 200 for u in range(50)]
    assert mean(shares) == pytest.approx(0.25, abs=0.015)


@given(st.integers(1, 12), st.floats(0, 0.999), st.text(max_size=5))
def test_a_small_user_stays_useful(count: int, share: float, user_id: str) -> None:
    held = held_out(user_id, prompts(count), share)
    assert held <= set(prompts(count))
    assert len(held) < count
    assert len(held) >= (1 if count >= 4 and share > 0 else 0)
    assert held == held_out(user_id, reversed(prompts(count) * 2), share)  # neither order nor repetition matters


def test_a_new_prompt_moves_no_other() -> None:
    before, after = held_out("u", prompts(40), 0.25), held_out("u", prompts(41), 0.25)
    assert before == after - {prompts(41)[-1]}


def test_the_split_is_the_same_on_every_machine() -> None:
    assert position("u", prompts(1)[0]) == pytest.approx(0.7610831937246441, abs=1e-12)


def test_a_prompt_is_on_one_side_and_a_given_split_is_kept(tmp_path: Path) -> None:
    rows = [
        {"user_id": user, "prompt": f"p{i % 10}", "chosen": f"c{i}", "rejected": "r"}
        for user in ("a", "b")
        for i in range(30)
    ]
    rows += [{"user_id": "c", "prompt": f"p{i}", "chosen": "c", "rejected": "r", "split": "heldout"} for i in range(5)]
    rows += [{"user_id": "c", "prompt": f"p{i}", "chosen": "d", "rejected": "r"} for i in range(5)]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = read_pairs(path, 0.25)
    sides = {(pair.user_id, pair.prompt, pair.split) for pair in pairs}
    assert len(sides) == 25
    assert {pair.split for pair in pairs if pair.user_id == "c"} == {"heldout"}
    assert {pair.split for pair in pairs if pair.user_id == "a"} == {"train", "heldout"}
    assert {pair.split for pair in read_pairs(path, 0.0) if pair.user_id == "a"} == {"train"}
    with pytest.raises(ValueError, match="heldout is 1"):
        read_pairs(path, 1.0)


@given(st.integers(0, 30), st.text(max_size=5))
def test_half_of_the_heldout_prompts_decide_whatever_their_order(count: int, user_id: str) -> None:
    chosen = deciding(user_id, prompts(count))
    assert chosen <= set(prompts(count))
    assert len(chosen) == count // 2
    assert deciding(user_id, prompts(count)[::-1]) == chosen


def test_who_decides_does_not_follow_from_who_is_held_out() -> None:
    """The key is another: the deciding half is not the half that lies first among the held-out prompts."""
    first = {prompt for prompt in prompts(200) if position("user", prompt) < 0.5}
    assert 30 < len(first & deciding("user", prompts(200))) < 70
