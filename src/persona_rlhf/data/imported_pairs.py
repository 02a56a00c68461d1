"""The file of preference pairs that an import writes: where it may stand, and whose pairs are in it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write


def need_pairs_file(out: Path, src: Path) -> None:
    """Raises InputError unless `out` is a .jsonl file other than the source."""
    if out.is_dir() or out.suffix != ".jsonl":
        raise InputError([Problem(str(out), None, None, "the output is one file of JSON lines; name it *.jsonl")])
    if out.exists() and out.samefile(src):
        raise InputError([Problem(str(out), None, None, "the output would replace its source; name another file")])


def write_pairs(
    out: Path, rows: Sequence[Mapping[str, Any]], min_pairs: int, left_out: MutableMapping[str, int]
) -> list[Mapping[str, Any]]:
    """Writes `out` whole or not at all, without the users who have fewer than `min_pairs` rows; returns its rows.

    The other rows are counted in `left_out`.
    """
    counts = Counter(row["user_id"] for row in rows)
    written = [row for row in rows if counts[row["user_id"]] >= min_pairs]
    if len(written) < len(rows):
        left_out[f"of a user with fewer than {min_pairs} pairs"] = len(rows) - len(written)
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, (json.dumps(row, ensure_ascii=False) + "\n" for row in written))
    return written
