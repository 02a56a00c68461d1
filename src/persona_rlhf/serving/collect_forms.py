"""Forms of the feedback page: their fields, and the faults of texts that users write."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, urlsplit

from persona_rlhf.data.wish_documents import ASPECTS, WishDesk, Wishes

LONGEST_PROMPT = 4_000
"""Characters of a prompt, at most."""

_FIELDS = 16  # of a form
_DIGITS = 9  # of a number of words

Form = dict[str, str]
"""Texts by the names of fields."""


class PageError(Exception):
    """A page in place of the one that was asked for: its status, and a sentence for the user."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


def site_of(address: str) -> str:
    """Host and port of an address as a browser's `Origin` has them: in lower case, without the scheme's usual port."""
    parts = urlsplit(address)
    return parts.netloc.lower().removesuffix({"http": ":80", "https": ":443"}.get(parts.scheme, ""))


def read_form(kind: str, body: bytes) -> Form:
    """The fields of a form. Raises PageError for another body."""
    if kind.partition(";")[0].strip().lower() != "application/x-www-form-urlencoded":
        raise PageError(415, "This is no form of the page.")
    try:
        fields = parse_qsl(
            body.decode("ascii"), keep_blank_values=True, strict_parsing=True, errors="strict", max_num_fields=_FIELDS
        )
    except ValueError:  # UnicodeDecodeError is one
        raise PageError(400, "This form cannot be read.") from None
    return dict(fields)


def prompt_fault(prompt: str) -> str:
    """A sentence on a prompt that cannot be asked; "" for a good one."""
    if not prompt:
        return "Write a prompt, or take one of the suggestions."
    if len(prompt) > LONGEST_PROMPT:
        return f"This prompt has {len(prompt):,} characters. Please write at most {LONGEST_PROMPT:,}."
    if any(not letter.isprintable() and letter not in "\n\t" and ord(letter) < 160 for letter in prompt):
        return "This prompt has control characters. Please remove them."
    return ""


def wish_fields(desk: WishDesk, wishes: Wishes) -> dict[str, Any]:
    """The content of the form of wishes."""
    values = {name: ", ".join(value) if isinstance(value, list) else str(value) for name, value in wishes.items()}
    return {"offered": desk.offered, "values": {name: values.get(name, "") for name in ASPECTS}}


def wishes_of(form: Form) -> Wishes:
    """The wishes that a form states; empty fields state none. Values of the wrong kind are for the policy to refuse."""
    wishes: Wishes = {}
    for name in ASPECTS:
        text = form.get(name, "").strip()
        if not text:
            continue
        if name == "avoid":
            wishes[name] = [topic for part in text.split(",") if (topic := part.strip())]
        else:
            number = name.endswith("_words") and text.isascii() and text.isdecimal() and len(text) <= _DIGITS
            wishes[name] = int(text) if number else text
    return wishes
