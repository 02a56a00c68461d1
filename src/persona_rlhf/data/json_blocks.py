"""The values of a JSON list, or of JSON values with white space between them, read block by block."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from io import BufferedIOBase

BLOCK = 1 << 20
"""Bytes of a file that are read at once; a value that is longer is read in twice as many each time."""

_SPACES = re.compile(r"\s*")
_LONGEST_TOKEN = len("-Infinity")  # no escape, name or exponent that may be cut at the end of a block is longer


class JsonBlocks:
    """A JSON document of which only the values around a position are in memory."""

    def __init__(self, stream: BufferedIOBase, block: int = BLOCK) -> None:
        self._stream = stream
        self._block = block
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text = ""
        self._start = 0  # the position in the text
        self._line = 1  # of the position
        self._ended = False

    def values(self, decoder: json.JSONDecoder) -> Iterator[tuple[int, object]]:
        """Each value with the line on which it begins.

        Raises JSONDecodeError, RecursionError, or UnicodeDecodeError at the first fault; `line_of` names its line.
        """
        listed = self._next() == "["
        if listed:
            self._move(self._start + 1)
        while (character := self._next()) and not (listed and character == "]"):
            line = self._line
            yield line, self._value(decoder)
            after = self._next()
            if listed and after == ",":
                self._move(self._start + 1)
            elif listed and after != "]":
                raise json.JSONDecodeError("Expecting `,` or `]` after an object", self._text, self._start)
        if listed and not character:
            raise json.JSONDecodeError("Expecting `]`, but the file ends", self._text, self._start)
        if listed:
            self._move(self._start + 1)
            if self._next():
                raise json.JSONDecodeError("Expecting nothing after the list", self._text, self._start)

    def line_of(self, fault: Exception) -> int:
        """The line of a fault that `values` raised."""
        if isinstance(fault, UnicodeDecodeError):
            before = self._text.count("\n", self._start)
            return self._line + before + bytes(fault.object).count(b"\n", 0, fault.start)
        return self._line + self._text.count("\n", self._start, getattr(fault, "pos", self._start))

    def _value(self, decoder: json.JSONDecoder) -> object:
        """The value at the position, which moves behind it."""
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._start)
            except json.JSONDecodeError as fault:
                cut = fault.msg.startswith("Unterminated string") or fault.pos > len(self._text) - _LONGEST_TOKEN
                if not (cut and self._more()):
                    raise
                continue
            if len(self._text) - end < _LONGEST_TOKEN and self._more():  # a number may go on
                continue
            self._move(end)
            return value

    def _next(self) -> str:
        """The next character that is no white space, with the position at it; an empty text at the end."""
        while True:
            match = _SPACES.match(self._text, self._start)
            self._move(match.end() if match else self._start)
            if self._start < len(self._text):
                return self._text[self._start]
            if not self._more():
                return ""

    def _move(self, position: int) -> None:
        """Moves the position, and forgets the text before it once it fills a block."""
        self._line += self._text.count("\n", self._start, position)
        self._start = position
        if self._start > self._block:
            self._text, self._start = self._text[self._start :], 0

    def _more(self) -> bool:
        """Adds the next block to the text; False at the end of the file."""
        if self._ended:
            return False
        content = self._stream.read(max(self._block, len(self._text) - self._start))
        self._ended = not content
        self._text += self._decode(content, self._ended)
        return True
