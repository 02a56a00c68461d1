"""Two append-only files of a run: ledger.jsonl (feedback) and reviews.jsonl (decisions about quarantined pairs)."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from persona_rlhf.common.clock import now
from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import append_whole
from persona_rlhf.common.json_lines import read_json_lines
from persona_rlhf.data.pairs import Message, PreferencePair, parse_row

LEDGER = "ledger.jsonl"
_BLOCK = 1 << 16  # bytes


def append_pair(
    run: Path, user_id: str, prompt: Sequence[Message], chosen: str, rejected: str, source: str
) -> PreferencePair:
    """Appends one preference to the ledger of a run and flushes it to the disk; `users.path` can read the file.

    A lock on the file orders threads and processes. An incomplete last line, left by a killed process, is removed
    first. Raises InputError if the row could not be read back (a lone surrogate in a text).
    """
    row = {
        "user_id": user_id,
        "prompt": [message._asdict() for message in prompt],
        "chosen": chosen,
        "rejected": rejected,
        "created_at": now(),
        "source": source,
    }
    pair = parse_row(row, str(run / LEDGER), 0)
    if isinstance(pair, list):
        raise InputError(pair)
    with (run / LEDGER).open("ab+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.truncate(_whole_lines(stream))
        append_whole(stream, json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return pair


def _whole_lines(stream: BinaryIO) -> int:
    """The number of bytes up to the end of the last complete line."""
    offset = stream.seek(0, os.SEEK_END)
    while offset > 0:
        start = max(0, offset - _BLOCK)
        stream.seek(start)
        end = stream.read(offset - start).rfind(b"\n")
        if end >= 0:
            return start + end + 1
        offset = start
    return 0


REVIEWS = "reviews.jsonl"
Decision = Literal["accept", "reject"]


class Review(NamedTuple):
    """One decision about a quarantined pair, without its text. `pair` is its `mark_of`; `at` is a time in UTC."""

    user_id: str
    pair: str
    decision: Decision
    reason: str
    reviewer: str
    at: str


def mark_of(pair: PreferencePair) -> str:
    """The key of a pair in reviews: a hash of its user and all its texts, which no other pair has."""
    content = [pair.user_id, pair.prompt, pair.chosen, pair.rejected]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def decide(file: Path, pair: PreferencePair, decision: Decision, reason: str, reviewer: str) -> Review:
    """Appends a decision to the file and flushes it to the disk; the last decision about a pair counts."""
    review = Review(pair.user_id, mark_of(pair), decision, reason, reviewer, now())
    with file.open("ab") as stream:
        append_whole(stream, json.dumps(review._asdict()).encode() + b"\n")
    return review


def read_reviews(file: Path) -> dict[str, Review]:
    """The last decision about each pair, by `mark_of`. Raises InputError naming every line that is not a decision."""
    sentence = f"a line is an object with texts {', '.join(Review._fields)}, `decision` being accept or reject"
    return {review.pair: review for review in read_json_lines(file, Review, sentence)}


def accepted_by(reviews: Mapping[str, Review], pair: PreferencePair) -> Review | None:
    """The decision that accepts a quarantined pair for training, or None."""
    review = reviews.get(mark_of(pair)) if reviews else None
    return review if review is not None and review.decision == "accept" else None
