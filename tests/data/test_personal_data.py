"""Personal data in texts: forms and check digits, masks, and the pairs that they leave."""

from __future__ import annotations

from time import process_time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.data.pairs import Message, PreferencePair
from persona_rlhf.data.personal_data import kinds_in, masked, personal_data, treat

PLANTED = {
    "email": ["ana.lopez+news@mail.example.org", "jörg@müller-bau.de", "a_b@x.co"],
    "bank account": ["DE89 3704 0044 0532 0130 00", "GB29NWBK60161331926819", "FR1420041010050500013M02606"],
    "payment card": ["4111 1111 1111 1111", "5500-0055-5555-5559", "378282246310005"],
    "social security number": ["536-90-4399"],
    "ip address": ["8.8.4.4", "2606:4700:4700::1111"],
    "phone number": [
        "+1 (212) 555-0147",
        "(212) 555-0147",
        "212-555-0147",
        "+44 20 7946 0958",
        "+33 6 12 34 56 78",
        "06 12 34 56 78",
        "030 1234 5678",
        "0612345678",
    ],
}

HARMLESS = [
    "4111 1111 1111 1112 has another check digit",
    "DE88 3704 0044 0532 0130 00 has other check digits",
    "1111 1111 1111 1111",
    "the router at 192.168.0.1, and 127.0.0.1",
    "version 1.2.3, chapter 4.5.6.7.8, and 999.1.1.1",
    "from 1914-1918 to 1939-1945, on 2026-11-30 at 12:30:45",
    "3.14159265358979 and 1,234,567,890",
    "add 2 cups, 350 degrees, 12 to 15 minutes",
    "write to @name or me@home",
    "ISBN 978-3-16-148410-0",
    "000-12-3456, 666-12-3456 and 900-12-3456",
    "5 000 000 000 people",
]


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in PLANTED.items() for text in texts])
def test_planted_data_is_masked_whole(kind: str, text: str) -> None:
    sentence = f"Please note {text}, and thank you."
    assert [datum.kind for datum in personal_data(sentence)] == [kind]
    assert masked(sentence) == f"Please note [{kind}], and thank you."


@pytest.mark.parametrize("text", HARMLESS)
def test_numbers_of_other_kinds_stay(text: str) -> None:
    assert masked(text) == text


@given(st.text(st.sampled_from("0123456789+-. ()@abDE:"), max_size=60))
def test_masks_leave_nothing_behind(text: str) -> None:
    assert personal_data(masked(text)) == []


def _pair(prompt: str, chosen: str, rejected: str) -> PreferencePair:
    turns = (Message("user", prompt),)
    return PreferencePair("ana", turns, chosen, rejected, "p1", None, None, 1.0, "train", None, "pairs.jsonl", 7)


def test_a_pair_is_kept_masked_or_dropped_and_its_finding_repeats_no_text() -> None:
    pair, other = _pair("Write to ana@x.org.", "Call +44 20 7946 0958.", "No."), _pair("Hello", "Hi", "Go")
    assert kinds_in(pair) == {"prompt": ["email"], "chosen": ["phone number"]}
    assert treat([pair, other], "keep").pairs == [pair, other]
    dropped = treat([pair, other], "drop")
    assert dropped.pairs == [other]
    assert [(one.action, one.trained) for one in dropped.findings] == [("dropped", False)]
    result = treat([pair, other], "mask")
    assert [(one.prompt[0].content, one.chosen, one.id) for one in result.pairs] == [
        ("Write to [email].", "Call [phone number].", "p1"),
        ("Hello", "Hi", "p1"),
    ]
    [finding] = result.findings
    assert (finding.action, finding.trained, finding.alarming) == ("masked", True, False)
    assert finding.reason == "personal data: email in `prompt`; phone number in `chosen`"


@pytest.mark.parametrize(
    "text",
    [
        part * (200_000 // len(part))
        for part in ("a@b.co ", "8.8.8.8 ", "1" * 15 + " ", "+1 2", "a@", "DE89 ", "0 ", ":1")
    ],
)
def test_long_hostile_texts_take_no_more_than_their_length(text: str) -> None:
    """Twice the text takes about twice the time; a square would take four times as long."""
    begun = process_time()
    personal_data(text[: len(text) // 4])
    quarter = process_time() - begun
    personal_data(text)
    assert process_time() - begun - quarter < 10 * quarter + 0.5
