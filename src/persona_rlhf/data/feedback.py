"""Ledger.jsonl (feedback) and reviews.jsonl (quarantine decisions)."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, get_args

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import flush
from persona_rlhf.data.erasure import DataSubject, Trace, row_traces
from persona_rlhf.data.pairs import Message, PreferencePair, parse_row

# ----------------------------------------------------------------------------------------------------
# `ledger.jsonl`: preferences that people gave after a run was trained. Rows are added and never changed.
# ----------------------------------------------------------------------------------------------------

LEDGER = "ledger.jsonl"
_BLOCK = 1 << 16  # bytes


def append_pair(
    run: Path, user_id: str, prompt: Sequence[Message], chosen: str, rejected: str, source: str
) -> PreferencePair:
    """Adds one preference to the ledger of a run, on the disk when this returns; `users.path` reads the file.

    Threads and processes take turns (a lock on the file). What a killed process left of a line is cut off first: nobody
    was told that it was saved. Raises InputError where the row could not be read back (half a character in a text).
    """
    row = {
        "user_id": user_id,
        "prompt": [message._asdict() for message in prompt],
        "chosen": chosen,
        "rejected": rejected,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "source": source,
    }
    pair = parse_row(row, str(run / LEDGER), 0)
    if isinstance(pair, list):
        raise InputError(pair)
    with (run / LEDGER).open("ab+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.truncate(_whole_lines(stream))
        stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        flush(stream)
    return pair


def _whole_lines(stream: BinaryIO) -> int:
    """Bytes up to the end of the last whole line."""
    place = stream.seek(0, os.SEEK_END)
    while place > 0:
        start = max(0, place - _BLOCK)
        stream.seek(start)
        end = stream.read(place - start).rfind(b"\n")
        if end >= 0:
            return start + end + 1
        place = start
    return 0


# ----------------------------------------------------------------------------------------------------
# What a person decided about quarantined pairs: a file of decisions, with reasons, that a later run is given.
# ----------------------------------------------------------------------------------------------------

REVIEWS = "reviews.jsonl"
Decision = Literal["accept", "reject"]


class Review(NamedTuple):
    """One decision: of whose pair, which one (`mark_of`), what, why, by whom and when (UTC); no text of the pair."""

    user_id: str
    pair: str
    decision: Decision
    reason: str
    reviewer: str
    at: str


def mark_of(pair: PreferencePair) -> str:
    """What a pair is called in reviews: a hash of whose it is and of all its texts, so that no other pair passes."""
    told = [pair.user_id, pair.prompt, pair.chosen, pair.rejected]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def decide(file: Path, pair: PreferencePair, decision: Decision, reason: str, reviewer: str) -> Review:
    """Adds a decision to the file; on the disk when this returns. A later one about the same pair goes before it."""
    at = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    review = Review(pair.user_id, mark_of(pair), decision, reason, reviewer, at)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(review._asdict()) + "\n")
        flush(stream)
    return review


def traces(run: Path, user: DataSubject) -> Iterator[Trace]:
    """The user's feedback, and decisions about the user's quarantined pairs."""
    return row_traces([run / LEDGER, run / REVIEWS], user)


def read_reviews(file: Path) -> dict[str, Review]:
    """The last decision about each pair, by its mark. Raises InputError naming every line that is none."""
    found: dict[str, Review] = {}
    problems: list[Problem] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            review = Review(**row)
            sound = all(isinstance(value, str) for value in review) and review.decision in get_args(Decision)
        except (json.JSONDecodeError, TypeError):
            sound = False
        if sound:
            found[review.pair] = review
        else:
            sentence = f"a line is an object with texts {', '.join(Review._fields)}, `decision` being accept or reject"
            problems.append(Problem(str(file), number, None, sentence))
    if problems:
        raise InputError(problems)
    return found


def accepted_by(reviews: Mapping[str, Review], pair: PreferencePair) -> Review | None:
    """The decision that lets a quarantined pair be trained on; None where there is none."""
    review = reviews.get(mark_of(pair)) if reviews else None
    return review if review is not None and review.decision == "accept" else None
