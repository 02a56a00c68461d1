"""`audit.jsonl`: what happened to a run, in order. Every line holds the hash of the line before it and its own.

A line that was changed, taken out or put in shows by itself. A chain that was written anew from some line on, or whose
tail was cut, is sound in itself: it shows against a head that was kept elsewhere (an adapter's manifest, the seal of
the run, an officer's file). Facts hold no text of a user and not his id, only `preferences.identity.pseudonym`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

AUDIT = "audit.jsonl"
_BEFORE_ALL = "0" * 64
_BLOCK = 1 << 16  # bytes


class Head(NamedTuple):
    """The end of a trail at some time: the number of its last line, and that line's hash."""

    seq: int
    hash: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"

    @staticmethod
    def parse(text: str) -> Head:
        """A head as `str` writes it. Raises ValueError for anything else."""
        seq, _, digest = text.strip().partition(":")
        if not seq.isdecimal() or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise ValueError(f"a head of the audit trail reads NUMBER:SHA256, got `{text.strip()[:80]}`")
        return Head(int(seq), digest)


class Entry(NamedTuple):
    """One line: its number from 1, when (UTC, ISO 8601), what happened, and the hash chain."""

    seq: int
    time: str
    event: str
    facts: dict[str, Any]
    previous: str
    hash: str


def append(run: Path, event: str, **facts: Any) -> Head:
    """Adds one line to the trail of a run, on the disk when this returns. `facts` are plain JSON values."""
    return append_all(run, [(event, facts)])


def append_all(run: Path, events: Iterable[tuple[str, Mapping[str, Any]]]) -> Head:
    """Adds lines, one after another and flushed to the disk together; returns the new head.

    Threads and processes take turns (a lock on the file, which goes with its process). What a killed process left of a
    line is cut off first: that line was promised to nobody. A trail that is damaged elsewhere is gone on with, for what
    happens must be written down; its damage stays to be seen (`faults`).
    """
    with (run / AUDIT).open("ab+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        seq, previous = _end(stream)
        lines = bytearray()
        for event, facts in events:
            seq += 1
            time = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
            content = {"seq": seq, "time": time, "event": event, "facts": dict(facts), "previous": previous}
            previous = _digest(content)
            lines += _rendered(content | {"hash": previous})
        stream.write(lines)
        stream.flush()
        os.fsync(stream.fileno())
    return Head(seq, previous)


def read(run: Path) -> Iterator[Entry]:
    """The sound lines of a run's trail in order; none where it has no trail. `faults` names the others."""
    for line in _lines(run):
        if (entry := _entry(line)) is not None:
            yield entry


def head(run: Path) -> Head | None:
    """The last line of a run's trail; None where it has none, or this line is damaged: it would vouch for nothing."""
    last = b""
    for line in _lines(run):
        last = line
    entry = _entry(last)
    return None if entry is None else Head(entry.seq, entry.hash)


def faults(run: Path, heads: Iterable[tuple[str, Head]] = ()) -> list[str]:
    """Where the chain breaks, by line; and every one of `heads` (who keeps it, what he keeps) that it no longer holds.

    A trail that is not there has no faults, but where somebody keeps a head of it.
    """
    wanted: dict[int, list[tuple[str, str]]] = {}
    for keeper, kept in heads:
        wanted.setdefault(kept.seq, []).append((keeper, kept.hash))
    found, held = list[str](), set[tuple[str, str]]()
    previous: str | None = _BEFORE_ALL
    number = 0
    for number, line in enumerate(_lines(run), 1):
        entry = _entry(line)
        if not line.endswith(b"\n"):
            found.append(f"{AUDIT}: line {number} is cut short; the next entry would take its place")
        elif entry is None:
            found.append(f"{AUDIT}: line {number} was changed: it is not what its own hash says")
        elif entry.seq != number or (previous is not None and entry.previous != previous):
            found.append(f"{AUDIT}: line {number} does not follow line {number - 1}: lines were taken out or put in")
        previous = None if entry is None else entry.hash  # after a damaged line, nothing can be said of the link
        held |= {kept for kept in wanted.get(number, []) if entry is not None and kept[1] == entry.hash}
    for seq in sorted(wanted):
        for keeper, digest in wanted[seq]:
            if (keeper, digest) not in held:
                why = f"it ends at line {number}" if seq > number else "that line is another one now"
                found.append(f"{AUDIT}: {keeper} keeps the head {seq}:{digest[:16]}..., which it lacks: {why}")
    return found


def _lines(run: Path) -> Iterator[bytes]:
    if (run / AUDIT).exists():
        with (run / AUDIT).open("rb") as stream:
            yield from stream


def _entry(line: bytes) -> Entry | None:
    """A whole line as an entry, where it is written as we write it and its own hash is right; else None."""
    try:
        content = json.loads(line)
        entry = Entry(**content)
        own = {key: value for key, value in content.items() if key != "hash"}
        sound = _rendered(content) == line and _digest(own) == entry.hash
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return entry if sound else None


def _end(stream: BinaryIO) -> tuple[int, str]:
    """Number and hash of the last whole line; what a killed process left after it is cut off, or ended if it is all."""
    end = stream.seek(0, os.SEEK_END)
    tail, start = b"", end
    while start > 0 and tail.count(b"\n") < 2:
        step = min(_BLOCK, start)
        start -= step
        stream.seek(start)
        tail = stream.read(step) + tail
    whole, newline, torn = tail.rpartition(b"\n")
    if torn and (entry := _entry(torn + b"\n")) is not None:
        stream.write(b"\n")
        return entry.seq, entry.hash
    stream.truncate(end - len(torn))
    if not newline:
        return 0, _BEFORE_ALL
    last = whole.rpartition(b"\n")[2] + newline
    if (entry := _entry(last)) is not None:
        return entry.seq, entry.hash
    stream.seek(0)
    return sum(1 for _ in stream), hashlib.sha256(last).hexdigest()


def _rendered(content: Mapping[str, Any]) -> bytes:
    """The one way a line is written: any other byte is a fault."""
    return (json.dumps(content, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n").encode()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_rendered(content)).hexdigest()
