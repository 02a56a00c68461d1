"""One user's rows taken out of preference files, whatever the kind; everybody else's stay, in their order."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.preferences.formats import files_of
from persona_rlhf.release.folder import write_lines

His = Callable[[object], bool]
"""Whether a `user_id` is that of the user."""


def files_with_rows(path: Path) -> list[Path]:
    """The files that rows can be taken out of, in a path of preferences; none for a hub data set or a saved one."""
    if path.is_dir():
        try:
            return [file for file in files_of(path) if erasable(file)]
        except InputError:
            return []
    return [path] if path.is_file() and erasable(path) else []


def erasable(file: Path) -> bool:
    """Whether `erase` knows this kind of file."""
    name = file.name.casefold().removesuffix(".gz")
    return name.endswith((".jsonl", ".ndjson", ".json", ".csv", ".parquet"))


def rows_of(file: Path, his: His, torn: bool = False) -> int:
    """How many rows of a file are the user's; `torn`: so are lines that cannot be read, as a kill leaves them."""
    name = file.name.casefold()
    if name.endswith(".parquet"):
        return sum(map(his, _column(file)))
    if name.endswith(".csv"):
        return sum(his(row.get("user_id")) for row in _table(file)[1])
    return sum(_is_his(line, his, torn) for line in _lines(file))


def erase(file: Path, his: His, torn: bool = False) -> None:
    """Writes the file without the user's rows, whole or not at all; the others' lines stay as they are, byte by byte.

    A table (CSV, Parquet) is written anew, with the same columns and the others' values.
    """
    name = file.name.casefold()
    if name.endswith(".parquet"):
        write_lines(file, [_parquet_without(file, his)])
    elif name.endswith(".csv"):
        write_lines(file, [_csv_without(file, his)])
    else:
        kept = (line for line in _lines(file) if not _is_his(line, his, torn))
        write_lines(file, [gzip.compress(b"".join(kept), mtime=0)] if name.endswith(".gz") else kept)


def _lines(file: Path) -> Iterator[bytes]:
    with gzip.open(file) if file.name.casefold().endswith(".gz") else file.open("rb") as stream:
        yield from stream


def _is_his(line: bytes, his: His, torn: bool) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return torn and bool(line.strip())
    return isinstance(row, dict) and his(row.get("user_id"))


def _table(file: Path) -> tuple[list[str], list[dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        table = csv.DictReader(stream)
        return list(table.fieldnames or ()), list(table)


def _csv_without(file: Path, his: His) -> bytes:
    names, rows = _table(file)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for row in rows if not his(row.get("user_id")))
    return text.getvalue().encode()


def _column(file: Path) -> list[object]:
    from pyarrow import ArrowException, parquet

    try:
        if "user_id" not in parquet.read_schema(file).names:
            return []
        found: list[object] = parquet.read_table(file, columns=["user_id"])["user_id"].to_pylist()
    except ArrowException as fault:
        raise InputError([Problem(str(file), None, None, f"the file is not Parquet ({fault})")]) from fault
    return found


def _parquet_without(file: Path, his: His) -> bytes:
    from pyarrow import BufferOutputStream, parquet  # it comes with `datasets`

    kept = [not his(user) for user in _column(file)]
    out = BufferOutputStream()
    parquet.write_table(parquet.read_table(file).filter(kept), out)
    written: bytes = out.getvalue().to_pybytes()
    return written
