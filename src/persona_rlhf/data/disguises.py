"""Readings of a text: ways in which a prompt may be written so that a comparison of letters would miss it.

A reading undoes one encoding. Look-alike letters and invisible characters are undone in every reading.
"""

from __future__ import annotations

import binascii
import codecs
import re
import sys
import unicodedata
from base64 import b64decode
from collections.abc import Callable, Iterator
from html import unescape
from urllib.parse import unquote

from persona_rlhf.policy.judges import skeleton

_LEET = {"3": "e", "@": "a", "4": "a", "5": "s", "$": "s", "6": "g", "7": "t", "8": "b", "9": "g", "€": "e"}
_IGNORABLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
"""Characters that no font draws (Default_Ignorable_Code_Point of Unicode 16 beyond category Cf, and the empty Braille
pattern)."""

_LATIN = re.compile(
    r"(?:LATIN|SYMBOL)\b.*LETTER (?:SMALL CAPITAL )?"
    r"(?:(?:TURNED|REVERSED|INVERTED|DOTLESS|OPEN|SCRIPT|INSULAR) )*([A-Z])\b"
)
"""The Latin letter in the Unicode name of one that looks like it: small capitals, hooks, squares, circles."""

_DRAWN = re.compile(r"(?:LATIN LETTER SMALL CAPITAL|SYMBOL LETTER|(?:SQUARED|CIRCLED) LATIN CAPITAL LETTER) ([A-Z])$")
_DOUBLED, _FEWEST_DOUBLED = re.compile(r"(.)\1+", re.DOTALL), 0.1
_TAGS = re.compile("[\U000e0020-\U000e007e]")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{16,}={0,2}")
_HEX = re.compile(r"(?:(?:0x|\\x)?[0-9A-Fa-f]{2}[\s:,]?){12,}")
_BINARY = re.compile(r"(?:[01]{8}[\s,]*){12,}")
_ESCAPES = re.compile(r"&#\w+;|%[0-9A-Fa-f]{2}")
_CODE_POINTS = re.compile(r"\\(?:u\{([0-9A-Fa-f]{1,6})\}|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8}))")


class _Folding(dict[int, str]):
    """Code point -> its plain letters, worked out at the first use; for `str.translate`."""

    def __missing__(self, code: int) -> str:
        self[code] = folded = _folded(chr(code))
        return folded


def _folded(character: str) -> str:
    if character.isspace():
        return " "
    if _IGNORABLE.match(character) or unicodedata.category(character) in ("Mn", "Me"):
        return ""
    return "".join(_LEET.get(letter) or _latin(letter) for letter in skeleton(character))


def _latin(letter: str) -> str:
    match = None if letter.isascii() else _LATIN.search(unicodedata.name(letter, ""))
    return letter if match is None else skeleton(match[1])


_FOLDING = _Folding()


class _Unmasking(dict[int, str]):
    """Code point -> the characters that a reader takes it for, worked out at the first use; for `str.translate`."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        hidden = _IGNORABLE.match(character) or unicodedata.category(character) == "Cf"
        letter = _DRAWN.search(unicodedata.name(character, ""))
        plain = letter[1].lower() if letter else unicodedata.normalize("NFKC", character)
        self[code] = "" if hidden else plain if character.isalnum() or letter else character  # quotes, dashes stay
        return self[code]


_UNMASKING = _Unmasking()


def plain_letters(text: str) -> str:
    """A text in lower-case letters that look alike, with spaces for white space and signs left as they are."""
    return text.translate(_FOLDING)


def unmasked(text: str) -> list[str]:
    """Requests that a text makes in disguise: the text in plain characters, and what is encoded in it.

    For models, which read words; empty for a text without a disguise. Letters of other alphabets and accents stay.
    """
    plain = text.translate(_UNMASKING)
    return [other for other in dict.fromkeys([plain, *_encoded(text)]) if other != text and other.strip()]


def readings(text: str) -> Iterator[str]:
    """The text, its rot13, and what base64, hexadecimal and binary digits, escapes and tag characters stand for.

    A text in which many characters are doubled is read with each of them once, too.
    Letters in reverse order are no reading: `near_copies` compares them by itself.
    """
    yield text
    yield codecs.encode(text, "rot13")
    once = _DOUBLED.sub(r"\1", text)
    if len(text) - len(once) > _FEWEST_DOUBLED * len(text):
        yield once
    yield from _encoded(text)


def _encoded(text: str) -> Iterator[str]:
    if _ESCAPES.search(text):
        yield unescape(unquote(text))
    if _CODE_POINTS.search(text):
        yield _CODE_POINTS.sub(_of_code_point, text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if not text.isascii() and (tags := _TAGS.findall(text)):
        yield "".join(chr(ord(tag) - 0xE0000) for tag in tags)
    yield from _decoded(_BASE64.findall(text), _of_base64)
    yield from _decoded(_HEX.findall(text), _of_hex)
    yield from _decoded(_BINARY.findall(text), _of_binary)


def _decoded(runs: list[str], decode: Callable[[str], bytes]) -> Iterator[str]:
    """The readable texts among the decoded runs, and that of all runs as one."""
    if len(runs) > 1:
        runs = [*runs, "".join(runs)]
    for run in runs:
        try:
            text = decode(run).decode()
        except (ValueError, binascii.Error):
            continue
        if "".join(text.split()).isprintable():
            yield text


def _of_base64(run: str) -> bytes:
    letters = run.rstrip("=").translate({ord("-"): "+", ord("_"): "/"})
    return b64decode(letters + "=" * (-len(letters) % 4), validate=True)


def _of_hex(run: str) -> bytes:
    return bytes.fromhex(re.sub(r"0x|\\x|[\s:,]", "", run))


def _of_binary(run: str) -> bytes:
    digits = re.sub(r"[\s,]", "", run)
    return bytes(int(digits[n : n + 8], 2) for n in range(0, len(digits), 8))


def _of_code_point(escape: re.Match[str]) -> str:
    """The character of an escape; the escape itself where Unicode has no such code point."""
    code = int(next(filter(None, escape.groups())), 16)
    return chr(code) if code <= sys.maxunicode else escape[0]
