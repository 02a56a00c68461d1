"""`ledger.jsonl`: preferences that people gave after a run was trained. Rows are added and never changed."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from persona_rlhf.inputs.problems import InputError
from persona_rlhf.preferences.messages import Message
from persona_rlhf.preferences.pairs import PreferencePair, parse_row

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
        stream.flush()
        os.fsync(stream.fileno())
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
