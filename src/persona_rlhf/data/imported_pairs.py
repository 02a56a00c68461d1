"""The file of preference pairs that an import writes: where it may stand, and whose pairs are in it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, MutableMapping
from itertools import chain
from pathlib import Path
from typing import Any

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_path


def need_pairs_file(out: Path, src: Path) -> None:
    """Raises InputError unless `out` is a .jsonl file other than the source, and in another folder than its files."""
    if out.is_dir() or out.suffix != ".jsonl":
        raise InputError([Problem(str(out), None, None, "the output is one file of JSON lines; name it *.jsonl")])
    if (out.exists() and out.samefile(src)) or (src.is_dir() and out.exists() and out.parent.samefile(src)):
        raise InputError([Problem(str(out), None, None, "the output would replace its source; name another file")])


def write_pairs(
    src: Path, out: Path, rows: Iterable[Mapping[str, Any]], min_pairs: int, left_out: MutableMapping[str, int]
) -> Counter[str]:
    """Writes `out` whole or not at all, row by row, without the users who have fewer than `min_pairs` rows.

    Returns the number of rows written by user. The other rows are counted in `left_out`. Raises InputError, and leaves
    `out` as it was, if no row is left of `src`.
    """
    counts: Counter[str] = Counter()
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        raise InputError([Problem(str(src), None, None, _nothing(left_out))])
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as temporary:
        with temporary.open("wb") as stream:
            for row in chain([first], rows):
                counts[row["user_id"]] += 1
                stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        few = {user: counts.pop(user) for user, count in list(counts.items()) if count < min_pairs}
        if few:
            left_out[f"of a user with fewer than {min_pairs} pairs"] = sum(few.values())
        if not counts:
            raise InputError([Problem(str(src), None, None, _nothing(left_out))])
        if few:
            _remove_users(temporary, few.keys())
    return counts


def _nothing(left_out: Mapping[str, int]) -> str:
    reasons = sorted(left_out.items(), key=lambda item: -item[1])
    shown = "; ".join(f"{reason} ({count:,})" for reason, count in reasons[:3])
    return f"no pair is left, so nothing is written{f': {shown}' if shown else ''}"


def _remove_users(file: Path, users: Iterable[str]) -> None:
    """Removes the rows of some users in place: what is written never overtakes what was read."""
    removed = frozenset(users)
    with file.open("rb") as source, file.open("r+b") as target:
        for line in source:
            if json.loads(line)["user_id"] not in removed:
                target.write(line)
        target.truncate()
