"""Personal data of one user: its traces, and rows erased from data files of any kind."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write, pseudonym
from persona_rlhf.data.readers import files_of

_pseudonym = lru_cache(4096)(pseudonym)

IsUser = Callable[[object], bool]
"""Whether a `user_id` is that of the user."""


class Trace(NamedTuple):
    """A piece of a user's personal data: its place, a description, the number of pieces, and the act that removes it.

    `remove` is whole or not at all, and can be called again after a kill.
    """

    path: Path
    what: str
    pieces: int
    remove: Callable[[], object]


@dataclass(frozen=True, slots=True)
class DataSubject:
    """The user whose personal data is looked for, by the pseudonym: it tells the user's id from any other."""

    pseudonym: str

    def __call__(self, user_id: object) -> bool:
        return isinstance(user_id, str) and _pseudonym(user_id) == self.pseudonym

    def owns_slug(self, name: str) -> bool:
        """Whether a file or folder name ends as the user's slug does: both end with a hash of the id."""
        return name.endswith(self.pseudonym[:12])


def row_traces(files: Iterable[Path], user: DataSubject, what: str = "lines") -> Iterator[Trace]:
    """A trace for each file that has rows of the user."""
    for file in files:
        if file.is_file() and not file.is_symlink() and (count := rows_of(file, user)):
            yield Trace(file, what, count, partial(erase, file, user))


def files_with_rows(path: Path) -> list[Path]:
    """The files of preferences in a path whose rows can be erased; none for a hub data set or a saved one."""
    if path.is_dir():
        try:
            return [file for file in files_of(path) if erasable(file)]
        except InputError:
            return []
    return [path] if path.is_file() and erasable(path) else []


def erasable(file: Path) -> bool:
    """Whether `erase` supports this kind of file."""
    name = file.name.casefold().removesuffix(".gz")
    return name.endswith((".jsonl", ".ndjson", ".json", ".csv", ".parquet"))


def rows_of(file: Path, is_user: IsUser, torn: bool = False) -> int:
    """The number of the user's rows in a file; with `torn`, lines cut short by a kill count too."""
    name = file.name.casefold()
    if name.endswith(".parquet"):
        return sum(map(is_user, _column(file)))
    if name.endswith(".csv"):
        return sum(is_user(row.get("user_id")) for row in _table(file)[1])
    return sum(_matches(line, is_user, torn) for line in _lines(file))


def erase(file: Path, is_user: IsUser, torn: bool = False) -> None:
    """Writes the file without the user's rows, whole or not at all; other lines stay the same, byte by byte.

    A table (CSV, Parquet) is written anew, with the same columns and the other users' values. A file that only its
    owner may read stays so.
    """
    name, private = file.name.casefold(), file.stat().st_mode & 0o077 == 0
    if name.endswith(".parquet"):
        atomic_write(file, _parquet_without(file, is_user), private=private)
    elif name.endswith(".csv"):
        atomic_write(file, _csv_without(file, is_user), private=private)
    else:
        kept = (line for line in _lines(file) if not _matches(line, is_user, torn))
        content = [gzip.compress(b"".join(kept), mtime=0)] if name.endswith(".gz") else kept
        atomic_write(file, content, private=private)


def _lines(file: Path) -> Iterator[bytes]:
    with gzip.open(file) if file.name.casefold().endswith(".gz") else file.open("rb") as stream:
        yield from stream


def _matches(line: bytes, is_user: IsUser, torn: bool) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return torn and bool(line.strip())
    return isinstance(row, dict) and is_user(row.get("user_id"))


def _table(file: Path) -> tuple[list[str], list[dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        table = csv.DictReader(stream)
        return list(table.fieldnames or ()), list(table)


def _csv_without(file: Path, is_user: IsUser) -> bytes:
    names, rows = _table(file)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for row in rows if not is_user(row.get("user_id")))
    return text.getvalue().encode()


def _column(file: Path) -> list[object]:
    from pyarrow import ArrowException, parquet

    try:
        if "user_id" not in parquet.read_schema(file).names:
            return []
        users: list[object] = parquet.read_table(file, columns=["user_id"])["user_id"].to_pylist()
    except ArrowException as fault:
        raise InputError([Problem(str(file), None, None, f"the file is not Parquet ({fault})")]) from fault
    return users


def _parquet_without(file: Path, is_user: IsUser) -> bytes:
    from pyarrow import BufferOutputStream, parquet  # installed with `datasets`

    kept = [not is_user(user) for user in _column(file)]
    out = BufferOutputStream()
    parquet.write_table(parquet.read_table(file).filter(kept), out)
    content: bytes = out.getvalue().to_pybytes()
    return content
