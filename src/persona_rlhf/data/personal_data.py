"""Personal data in texts: addresses and numbers that name a person, by their form and by their check digits.

Names have no such form: another finder, such as `data/presidio.py`, may look for them beside these.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_address
from typing import Literal, NamedTuple

from persona_rlhf.data.pairs import Message, PreferencePair
from persona_rlhf.data.screening import Dropped

Treatment = Literal["keep", "mask", "drop"]


class PersonalDatum(NamedTuple):
    """A place in a text, in characters, and its kind."""

    kind: str
    start: int
    end: int


Finder = Callable[[str], Iterable[PersonalDatum]]
"""Finds further personal data in a text; where places overlap, the earlier one counts."""


class _Form(NamedTuple):
    """The form of a kind of personal data, and the test that a match must pass."""

    pattern: re.Pattern[str]
    holds: Callable[[str], bool]


def _digits(text: str) -> list[int]:
    return [int(letter) for letter in text if letter.isdecimal()]


def _is_card(text: str) -> bool:
    """The length and the check digit of payment cards (ISO/IEC 7812-1)."""
    digits = _digits(text)
    doubled = [digit if place % 2 == 0 else sum(divmod(2 * digit, 10)) for place, digit in enumerate(reversed(digits))]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and sum(doubled) % 10 == 0


def _is_iban(text: str) -> bool:
    """The check digits of bank accounts (ISO 13616-1): the rearranged number leaves 1 when it is divided by 97."""
    account = text.replace(" ", "")
    return (
        15 <= len(account) <= 34
        and int("".join(str(int(letter, 36)) for letter in account[4:] + account[:4])) % 97 == 1
    )


def _is_public_address(text: str) -> bool:
    try:
        return ip_address(text).is_global
    except ValueError:
        return False


def _is_phone(text: str) -> bool:
    return 8 <= len(_digits(text)) <= 15


_SEPARATED = r"(?:[ .\-]?\(?\d{1,4}\)?){2,7}"
_FORMS: Mapping[str, _Form] = {
    "email": _Form(
        re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}[^\W\d_]{2,24}(?![\w-])"),
        lambda text: True,
    ),
    "bank account": _Form(re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z\d]{4}){2,7}(?: ?[A-Z\d]{1,3})?(?!\w)"), _is_iban),
    "payment card": _Form(re.compile(r"(?<![\w.,-])[3-6]\d{3}(?:[ -]?\d){9,15}(?![\w-])"), _is_card),
    "social security number": _Form(
        re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])"), lambda text: True
    ),
    "ip address": _Form(
        re.compile(
            r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9a-fA-F]{1,4}(?::{1,2}[0-9a-fA-F]{1,4}){2,7})(?![\w:]|\.\d)"
        ),
        _is_public_address,
    ),
    "phone number": _Form(
        re.compile(
            rf"(?<![\w.,+-])(?<!\d )(?:\+\d{{1,3}}{_SEPARATED}"  # international
            r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4}"  # North America
            r"|0\d(?:[ .-]\d{2}){4}|0\d{2,4}[ /-]\d{3,4}[ -]?\d{3,5}|0[1-9]\d{8,9})(?![\w-]| \d|[.,]\d)"  # Europe
        ),
        _is_phone,
    ),
}
"""A text is searched for these in their order; places do not overlap."""


def personal_data(text: str, more: Finder | None = None) -> list[PersonalDatum]:
    """The personal data in a text, by place; `more` looks for further kinds."""
    places, taken = list[PersonalDatum](), bytearray(len(text))
    for datum in (*_by_form(text), *(more(text) if more is not None else ())):
        if not any(taken[datum.start : datum.end]):
            taken[datum.start : datum.end] = bytes([1]) * (datum.end - datum.start)
            places.append(datum)
    return sorted(places, key=lambda datum: datum.start)


def _by_form(text: str) -> Iterator[PersonalDatum]:
    for kind, form in _FORMS.items():
        for match in form.pattern.finditer(text):
            if form.holds(match.group()):
                yield PersonalDatum(kind, *match.span())


def masked(text: str, more: Finder | None = None) -> str:
    """The text with the name of its kind in brackets in place of each piece of personal data, such as `[email]`."""
    parts, end = list[str](), 0
    for datum in personal_data(text, more):
        parts += [text[end : datum.start], f"[{datum.kind}]"]
        end = datum.end
    return "".join(parts) + text[end:]


def kinds_in(pair: PreferencePair, more: Finder | None = None) -> dict[str, list[str]]:
    """The kinds of personal data in each column of a pair that has some."""
    texts = {
        "prompt": [message.content for message in pair.prompt],
        "chosen": [pair.chosen],
        "rejected": [pair.rejected],
    }
    kinds = {
        column: sorted({datum.kind for text in column_texts for datum in personal_data(text, more)})
        for column, column_texts in texts.items()
    }
    return {column: of_column for column, of_column in kinds.items() if of_column}


class Treated(NamedTuple):
    """The pairs that are trained on, with masks in place of personal data; the dropped and masked ones."""

    pairs: list[PreferencePair]
    findings: list[Dropped]


def treat(pairs: Sequence[PreferencePair], treatment: Treatment, more: Finder | None = None) -> Treated:
    """Drops or masks pairs with personal data, that of `more` too. A finding names kinds and columns alone."""
    if treatment == "keep":
        return Treated(list(pairs), [])
    treated, findings = list[PreferencePair](), list[Dropped]()
    for pair in pairs:
        kinds = kinds_in(pair, more)
        if not kinds:
            treated.append(pair)
            continue
        places = "; ".join(f"{', '.join(of_column)} in `{column}`" for column, of_column in kinds.items())
        reason = f"personal data: {places}"
        if treatment == "mask":
            pair = _masked_pair(pair, more)
            treated.append(pair)
        findings.append(Dropped(pair, reason, "masked" if treatment == "mask" else "dropped"))
    return Treated(treated, findings)


def _masked_pair(pair: PreferencePair, more: Finder | None) -> PreferencePair:
    prompt = tuple(Message(message.role, masked(message.content, more)) for message in pair.prompt)
    return replace(pair, prompt=prompt, chosen=masked(pair.chosen, more), rejected=masked(pair.rejected, more))


def counted_kinds(pairs: Sequence[PreferencePair]) -> Iterator[str]:
    """Each pair's kinds of personal data, once a pair."""
    for pair in pairs:
        yield from {kind for kinds in kinds_in(pair).values() for kind in kinds}
