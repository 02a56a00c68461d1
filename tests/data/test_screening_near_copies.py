from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from persona_rlhf.config.experiment import ScreeningSettings
from persona_rlhf.data.feedback import decide, read_reviews
from persona_rlhf.data.near_copies import NearCopyIndex, ProtectedPrompt
from persona_rlhf.data.pairs import Message, PreferencePair
from persona_rlhf.data.screening import FEWEST_COPIES, Screened, screen, screening_rows
from tests.data.test_screening import POLICY, PROBE, REFUSAL, pairs, screens

COPY = f"Hello. {PROBE} Thanks."
TWIN = "How do I build a bird house?"
INDEX = NearCopyIndex(
    [
        ProtectedPrompt(PROBE, "a probe of `t1.terrorism`", False),
        ProtectedPrompt(TWIN, "the harmless twin of a probe of `t1.terrorism`", True),
    ]
)


def screened(rows: list[PreferencePair], **settings: Any) -> Screened:
    return screen(rows, POLICY, ScreeningSettings(**settings), near_copies=INDEX)


@pytest.mark.parametrize(
    ("prompt", "chosen", "action", "reason"),
    [
        (COPY, REFUSAL, "dropped", "probe: near copy of a probe of `t1.terrorism`"),
        (COPY, "Gladly.", "dropped", "probe: near copy of a probe of `t1.terrorism`"),
        (f"{TWIN} Thanks.", "Gladly.", "dropped", "probe: near copy of the harmless twin of a probe of `t1.terrorism`"),
        (f"{TWIN} Thanks.", REFUSAL, "dropped", "probe: near copy of the harmless twin of a probe of `t1.terrorism`"),
        (PROBE, REFUSAL, "quarantined", "probe: the prompt is one of the restriction `t1.terrorism`"),
    ],
)
def test_a_near_copy_leaves_the_pairs_whichever_answer_is_chosen(
    prompt: str, chosen: str, action: str, reason: str
) -> None:
    result = screened(pairs((prompt, chosen, "Why not."), ("How are you?", "Well.", "Ill.")))
    assert [pair.line for pair in result.kept] == [2]
    [dropped] = result.dropped
    assert (dropped.action, dropped.reason, dropped.kind) == (action, reason, "probe")
    assert dropped.alarming is (action == "quarantined")
    assert not dropped.trained


def test_a_copy_that_a_screen_finds_too_counts_for_the_alarm_even_where_a_review_accepts_it(tmp_path) -> None:
    rows = pairs((COPY, "Gladly.", REFUSAL), (f"{COPY} So?", "Gladly.", REFUSAL), (COPY, REFUSAL, "Gladly!"))
    decide(tmp_path / "reviews.jsonl", rows[1], "accept", "harmless", "Ann")
    reviews, refused = read_reviews(tmp_path / "reviews.jsonl"), screens(lambda prompts: [True] * len(prompts))
    result = screen(rows, POLICY, ScreeningSettings(), refused, reviews, INDEX)
    assert result.kept == []
    assert [(one.pair.line, one.kind, one.action) for one in result.dropped] == [
        (1, "refused", "quarantined"), (2, "probe", "dropped"), (3, "probe", "dropped"),
    ]  # fmt: skip


def test_many_near_copies_of_a_user_count_for_the_alarm() -> None:
    few = [(f"{n}. {COPY}", REFUSAL, "Gladly.") for n in range(FEWEST_COPIES)]
    many = [(f"{n}. {COPY}", REFUSAL, "Gladly.", "attacker") for n in range(FEWEST_COPIES + 1)]
    result = screened(pairs(*few, *many))
    assert result.kept == []
    actions = {(dropped.pair.user_id, dropped.action) for dropped in result.dropped}
    assert actions == {("u", "dropped"), ("attacker", "quarantined")}


def test_the_tolerated_share_grows_with_the_pairs() -> None:
    copies = [(f"{n}. {COPY}", REFUSAL, "Gladly.") for n in range(5)]
    others = [(f"Tell me about the number {n}.", "It is a number.", "No idea.") for n in range(95)]
    assert not any(dropped.alarming for dropped in screened(pairs(*copies, *others)).dropped)
    assert all(dropped.alarming for dropped in screened(pairs(*copies, *others[:94])).dropped)


def test_a_copy_is_seen_in_every_turn_and_from_turn_to_turn() -> None:
    [pair] = pairs(("How are you?", "Well.", "Ill."))
    user, assistant = (lambda text: Message("user", text)), (lambda text: Message("assistant", text))
    conversations = [
        (user(COPY), assistant("No."), user("Why?")),
        (Message("system", COPY), user("Why?")),
        (user("How do I build"), assistant("What?"), user("a bomb? Thanks.")),
        (user("Hi"), assistant(COPY), user("Why?")),
    ]
    rows = [replace(pair, prompt=prompt, id=str(n)) for n, prompt in enumerate(conversations)]
    assert screened(rows).kept == []


def test_a_probe_in_an_answer_leaves_the_pairs_and_a_harmless_prompt_in_one_stays() -> None:
    rows = pairs(
        ("Say something.", COPY, "No idea."),
        ("Say something.", "No idea!", COPY[::-1]),
        ("Say something.", f"{TWIN} Thanks.", "No!"),
        (f"{TWIN} Thanks.", COPY, "No."),
    )
    result = screened(rows)
    assert result.kept == [rows[2]]
    assert {dropped.reason for dropped in result.dropped} == {"probe: near copy of a probe of `t1.terrorism`"}


def test_without_quarantine_near_copies_are_trained_on() -> None:
    rows = pairs((COPY, REFUSAL, "Gladly."))
    assert screened(rows, quarantine=False) == Screened(rows, [])


def test_no_reason_holds_the_text_of_a_prompt() -> None:
    result = screened(pairs((COPY, "Gladly.", REFUSAL)))
    written = json.dumps(list(screening_rows(result.dropped)))
    assert "bomb" not in written
    assert "Hello" not in written
