"""Append-only files of JSON lines, chained by hashes: a run's audit trail, and the ledger of looks.

Every line holds its own hash and that of the line before it. A changed, removed or inserted line is visible in the file
itself. A rewritten or cut tail is visible against a head kept elsewhere.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from persona_rlhf.common.clock import now
from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import append_whole

_BEFORE_ALL = "0" * 64
_BLOCK = 1 << 16  # bytes


class ChainHead(NamedTuple):
    """The head of a chain at some time: the number of its last line, and that line's hash."""

    seq: int
    hash: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"

    @staticmethod
    def parse(text: str) -> ChainHead:
        """A head as `str` writes it. Raises ValueError for anything else."""
        seq, _, digest = text.strip().partition(":")
        if not seq.isdecimal() or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise ValueError(f"a head of a chain of lines reads NUMBER:SHA256, got `{text.strip()[:80]}`")
        return ChainHead(int(seq), digest)


NO_LINES = ChainHead(0, _BEFORE_ALL)
"""The head of an empty chain."""


class ChainEntry(NamedTuple):
    """One line: its number from 1, the time (UTC, ISO 8601), the event with its facts, and the hash chain."""

    seq: int
    time: str
    event: str
    facts: dict[str, Any]
    previous: str
    hash: str

    @property
    def head(self) -> ChainHead:
        """The head of the chain up to this line."""
        return ChainHead(self.seq, self.hash)


class Chain:
    """A file of chained lines. It is read without a lock; a lock on the file orders threads and processes that write.

    Facts are plain JSON values.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def append(self, events: Iterable[tuple[str, Mapping[str, Any]]]) -> ChainHead:
        """Appends events, flushed to the disk together; returns the new head."""
        with self.locked() as chain:
            return chain.append(events)

    @contextmanager
    def locked(self) -> Iterator[LockedChain]:
        """The file, made if need be, under an exclusive lock.

        An incomplete last line, left by a killed process, is removed first: no caller relied on it. Damage elsewhere
        does not stop appending, and stays visible to `faults`. Raises InputError for a folder or a device.
        """
        self._need_file()
        with self.file.open("ab+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield LockedChain(stream)

    def __iter__(self) -> Iterator[ChainEntry]:
        """The valid entries in order; none if there is no file. `faults` names the invalid lines."""
        for line in self._lines():
            if (entry := entry_of(line)) is not None:
                yield entry

    @property
    def head(self) -> ChainHead | None:
        """The last line; None if there is none or it is damaged."""
        last = b""
        for line in self._lines():
            last = line
        entry = entry_of(last)
        return None if entry is None else entry.head

    def faults(self, heads: Iterable[tuple[str, ChainHead]] = ()) -> list[str]:
        """Every break of the chain, by line, and every one of `heads` (its keeper, the head) that is no longer in it.

        A missing file has no faults, unless somebody keeps a head of it.
        """
        name = self.file.name
        kept_heads: dict[int, list[tuple[str, str]]] = {}
        for keeper, kept in heads:
            kept_heads.setdefault(kept.seq, []).append((keeper, kept.hash))
        breaks, present = list[str](), set[tuple[str, str]]()
        previous: str | None = _BEFORE_ALL
        number = 0
        for number, line in enumerate(self._lines(), 1):
            entry = entry_of(line)
            if not line.endswith(b"\n"):
                breaks.append(f"{name}: line {number} is cut short; the next entry would take its place")
            elif entry is None:
                breaks.append(f"{name}: line {number} was changed: it does not match its own hash")
            elif entry.seq != number or (previous is not None and entry.previous != previous):
                breaks.append(
                    f"{name}: line {number} does not follow line {number - 1}: lines were removed or inserted"
                )
            previous = None if entry is None else entry.hash  # the link after a damaged line cannot be checked
            present |= {kept for kept in kept_heads.get(number, []) if entry is not None and kept[1] == entry.hash}
        for seq in sorted(kept_heads):
            for keeper, digest in kept_heads[seq]:
                if (keeper, digest) not in present:
                    why = f"it ends at line {number}" if seq > number else "that line has another hash now"
                    breaks.append(f"{name}: {keeper} keeps the head {seq}:{digest[:16]}..., which is not in it: {why}")
        return breaks

    def _need_file(self) -> None:
        """Raises InputError where there is something at the path, and it is no regular file."""
        if self.file.exists() and not self.file.is_file():
            raise InputError([Problem(str(self.file), None, None, "this is no regular file; name a file here")])

    def _lines(self) -> Iterator[bytes]:
        self._need_file()
        if self.file.exists():
            with self.file.open("rb") as stream:
                yield from stream


class LockedChain:
    """A chain that no other program can change."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.head = _end(stream)

    def append(self, events: Iterable[tuple[str, Mapping[str, Any]]]) -> ChainHead:
        """Appends events, flushed to the disk together; returns the new head. Raises DiskFullError and appends none."""
        seq, previous = self.head
        lines = bytearray()
        for event, facts in events:
            seq += 1
            time = now()
            content = {"seq": seq, "time": time, "event": event, "facts": dict(facts), "previous": previous}
            previous = _digest(content)
            lines += _rendered(content | {"hash": previous})
        append_whole(self._stream, bytes(lines))
        self.head = ChainHead(seq, previous)
        return self.head

    def lines(self, start: int) -> Iterator[bytes]:
        """The lines from a byte offset on."""
        self._stream.seek(start)
        yield from self._stream


def entry_of(line: bytes) -> ChainEntry | None:
    """A whole line as an entry, or None if its form or its own hash is wrong."""
    try:
        content = json.loads(line)
        entry = ChainEntry(**content)
        hashed = {key: value for key, value in content.items() if key != "hash"}
        valid = _rendered(content) == line and _digest(hashed) == entry.hash
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return entry if valid else None


_OPENING = b'{"event": "'
"""The bytes with which every line begins."""


def _end(stream: BinaryIO) -> ChainHead:
    """The last whole line. A partial line after it is removed, or only gets its newline.

    Raises InputError for a partial line that no writer of chains began.
    """
    end = stream.seek(0, os.SEEK_END)
    tail, start = b"", end
    while start > 0 and tail.count(b"\n") < 2:
        step = min(_BLOCK, start)
        start -= step
        stream.seek(start)
        tail = stream.read(step) + tail
    whole, newline, torn = tail.rpartition(b"\n")
    if torn and (entry := entry_of(torn + b"\n")) is not None:
        stream.write(b"\n")
        return entry.head
    if not (torn.startswith(_OPENING) or _OPENING.startswith(torn)):
        sentence = "its last line is no entry of a chain, so this is another kind of file; nothing was written to it"
        raise InputError(
            [Problem(stream.name, None, None, f"{sentence}; name a new file, or an audit trail or ledger")]
        )
    stream.truncate(end - len(torn))
    if not newline:
        return NO_LINES
    last = whole.rpartition(b"\n")[2] + newline
    if (entry := entry_of(last)) is not None:
        return entry.head
    stream.seek(0)
    return ChainHead(sum(1 for _ in stream), hashlib.sha256(last).hexdigest())


def _rendered(content: Mapping[str, Any]) -> bytes:
    """A line as bytes. Any other bytes for the same content are a fault."""
    return (json.dumps(content, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n").encode()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_rendered(content)).hexdigest()
