"""Tokens that become text as they are written: never half a character, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from persona_rlhf.preferences.template import ChatTokenizer

_HALF = "\ufffd"  # what a tokenizer writes for the first bytes of a character


class Unfolding:
    """The text of one answer. What `add` and `end` return, put together, is the text up to the first stop string.

    Tokens are decoded with a few before them, since the text of one may depend on its neighbours (a word's space).
    """

    def __init__(self, tokenizer: ChatTokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._from, self._read = 0, 0  # tokens decoded as neighbours, and those whose text is known
        self._text, self._told = "", 0
        self.stopped = False

    def add(self, token: int) -> str:
        """One more token; the text that can be told now."""
        self._ids.append(token)
        self._take(final=False)
        return self._tell(len(self._text) - self._begun())

    def end(self) -> str:
        """No more tokens; the rest of the text."""
        if not self.stopped:
            self._take(final=True)
        return self._tell(len(self._text))

    def _take(self, final: bool) -> None:
        before = self._decoded(self._ids[self._from : self._read])
        now = self._decoded(self._ids[self._from :])
        if len(now) > len(before) and (final or not now.endswith(_HALF)):
            known = len(self._text)
            self._text += now[len(before) :]
            self._from, self._read = self._read, len(self._ids)
            self._cut(known)

    def _cut(self, known: int) -> None:
        """Ends the text before the stop string that is complete first, of those that end after `known` characters."""
        found = [(self._text.find(stop, max(0, known - len(stop) + 1)), len(stop)) for stop in self._stop]
        ends = [(start + length, start) for start, length in found if start >= 0]
        if ends:
            self._text, self.stopped = self._text[: min(ends)[1]], True

    def _begun(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        if self.stopped:
            return 0
        return max((n for stop in self._stop for n in range(1, len(stop)) if self._text.endswith(stop[:n])), default=0)

    def _tell(self, upto: int) -> str:
        new = self._text[self._told : upto]
        self._told = max(self._told, upto)
        return new

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
