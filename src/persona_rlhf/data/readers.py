"""Rows with line numbers from JSONL, CSV, Parquet, `datasets` folders and the hub; checks of their columns."""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date, datetime
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from persona_rlhf.common.errors import InputError, Problem, did_you_mean
from persona_rlhf.common.files import find, is_hub_id

REQUIRED = ("user_id", "prompt", "chosen", "rejected")
OPTIONAL = ("id", "created_at", "source", "weight", "split", "clean_choice")
KNOWN = REQUIRED + OPTIONAL
LONGEST_USER_ID = 128  # characters

_ALIASES: Mapping[str, tuple[str, ...]] = {  # names in other files; did_you_mean catches misspellings
    "user_id": ("user", "uid", "annotator", "annotator_id", "worker", "worker_id", "username", "author"),
    "prompt": ("question", "query", "instruction", "input", "messages", "context"),
    "chosen": ("accepted", "accept", "preferred", "winner", "better", "response_chosen", "chosen_response"),
    "rejected": ("reject", "declined", "dispreferred", "loser", "worse", "response_rejected", "rejected_response"),
}


class ColumnFault(NamedTuple):
    """A mistake in one column; the row's reader adds the file and the line."""

    key: str
    sentence: str


def shown(value: object) -> str:
    """A value as an error message shows it: on one line, and short."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def columns_of(row: object) -> Mapping[str, object]:
    """A row as named columns. Raises ValueError if it is something else."""
    if not isinstance(row, Mapping):
        raise ValueError(f"a row is an object with named columns, not {shown(row)}")
    return row


def missing(column: str, present: Iterable[str]) -> ColumnFault:
    """The fault of a missing required column, with the column that is probably meant."""
    unknown = [name for name in present if name not in KNOWN]
    alias = next((name for name in unknown if name.casefold() in _ALIASES[column]), None)
    if alias is None:
        alias = next((name for name in unknown if did_you_mean(name, KNOWN) == f" (did you mean `{column}`?)"), None)
    if alias is not None:
        return ColumnFault(column, f"the column is missing, but there is `{alias}`: rename it to `{column}`")
    return ColumnFault(column, f"the column is missing; a row needs {', '.join(f'`{name}`' for name in REQUIRED)}")


def text_fault(column: str, value: object) -> ColumnFault | None:
    """The fault of a value that is no text, or one that cannot be encoded."""
    if not isinstance(value, str):
        return ColumnFault(column, f"must be a text, not {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        return ColumnFault(
            column, f"holds half a character (a lone surrogate): {shown(value)}; write the whole character"
        )
    return None


def user_id_fault(value: object) -> ColumnFault | None:
    """The fault of a user id that is not a text of 1 to 128 characters."""
    if isinstance(value, int) and not isinstance(value, bool):
        return ColumnFault("user_id", f'must be a text, not the number {value}: write "{value}"')
    if (fault := text_fault("user_id", value)) is not None:
        return fault
    assert isinstance(value, str)
    if not 1 <= len(value) <= LONGEST_USER_ID:
        return ColumnFault("user_id", f"has {len(value)} characters; an id has 1 to {LONGEST_USER_ID}")
    return None


def _weight_fault(value: object) -> ColumnFault | None:
    """The fault of a weight that is not a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ColumnFault("weight", f"must be a number, not {shown(value)}")
    if not 0 < value < math.inf:  # false for NaN too
        return ColumnFault("weight", f"is {value}; a weight is a finite number above 0 (remove the row to ignore it)")
    return None


def moment(value: str | date) -> str:
    """A time as ISO 8601 text, from a text or a Parquet timestamp. Raises ValueError for anything else."""
    if isinstance(value, str):
        datetime.fromisoformat(value)
        return value
    return value.isoformat()


def _created_at_fault(value: object) -> ColumnFault | None:
    if isinstance(value, str | date):  # a datetime is a date
        try:
            moment(value)
            return None
        except ValueError:
            pass
    return ColumnFault("created_at", f"is {shown(value)}; write ISO 8601, such as 2026-11-01T12:30:00Z")


def _split_fault(value: object) -> ColumnFault | None:
    """The fault of a split that is not `train` or `heldout`."""
    if value in ("train", "heldout"):
        return None
    hint = " (did you mean `heldout`?)" if value in ("test", "eval", "validation", "held_out", "dev") else ""
    return ColumnFault("split", f"is {shown(value)}; it must be `train` or `heldout`{hint}")


def _id_fault(value: object) -> ColumnFault | None:
    return None if isinstance(value, int) and not isinstance(value, bool) else text_fault("id", value)


def _source_fault(value: object) -> ColumnFault | None:
    return text_fault("source", value)


def _clean_choice_fault(value: object) -> ColumnFault | None:
    return (
        None if isinstance(value, bool) else ColumnFault("clean_choice", f"must be true or false, not {shown(value)}")
    )


CHECKS: Mapping[str, Callable[[object], ColumnFault | None]] = {  # of the optional columns
    "id": _id_fault,
    "created_at": _created_at_fault,
    "source": _source_fault,
    "weight": _weight_fault,
    "split": _split_fault,
    "clean_choice": _clean_choice_fault,
}


_T = TypeVar("_T")

_SAVED = ("dataset_info.json", "dataset_dict.json")  # files that `Dataset.save_to_disk` writes


class RawRow(NamedTuple):
    """A parsed row before any check; `line` is the row's number (from 1) in formats without lines."""

    file: str
    line: int
    row: object


def read_rows(path: Path | str) -> Iterator[RawRow | Problem]:
    """All rows of a file, a folder or a hub data set, in order; a row that cannot be parsed is a Problem.

    A folder is read file by file, sorted by name, or as a `datasets` folder. Raises InputError if there is nothing to
    read.
    """
    if is_hub_id(str(path)) and not Path(path).exists() and _reader(Path(path)) is None:
        yield from _hub(str(path))
        return
    source = find(path)
    if not source.is_dir():
        yield from read_file(source)
    elif any((source / name).exists() for name in _SAVED):
        yield from _saved(source)
    else:
        for file in files_of(source):
            yield from read_file(file)


def converted(
    items: Iterable[RawRow | Problem], convert: Callable[[Mapping[str, object]], _T]
) -> Iterator[_T | Problem]:
    """Every row converted; a Problem if it could not be read or `convert` raises ValueError."""
    for item in items:
        if isinstance(item, Problem):
            yield item
            continue
        try:
            yield convert(columns_of(item.row))
        except ValueError as fault:
            yield Problem(item.file, item.line, None, str(fault))


def files_of(folder: Path) -> list[Path]:
    """The readable files of a folder, sorted by name. Raises InputError if there are none."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and _reader(file) is not None)
    if not files:
        raise InputError([Problem(str(folder), None, None, f"the folder holds no preferences; put {_KINDS} here")])
    return files


def read_file(path: Path) -> Iterator[RawRow | Problem]:
    """The rows of one file; a file without any is a Problem."""
    reader = _reader(path)
    if reader is None:
        near = did_you_mean(path.suffix, _READERS)
        raise InputError([Problem(str(path), None, None, f"`{path.suffix}` cannot be read{near}; use {_KINDS}")])
    empty = True
    for item in reader(path):
        empty = False
        yield item
    if empty:
        yield Problem(str(path), None, None, "the file is empty; write one preference per row")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key `{repeated}` occurs twice")
    return row


def _bytes_of(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path) if path.suffix.casefold() == ".gz" else path.open("rb")


def _json_lines(path: Path) -> Iterator[RawRow | Problem]:
    number = 0
    try:
        with _bytes_of(path) as lines:
            for number, line in enumerate(lines, 1):
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if not text.strip():
                    continue
                try:
                    row = json.loads(text.decode(), object_pairs_hook=_object)
                except UnicodeDecodeError:
                    yield Problem(str(path), number, None, "the line is not UTF-8 text; save the file as UTF-8")
                except (ValueError, RecursionError) as fault:
                    if text.lstrip().startswith(b"["):
                        yield _one_list(path, number)
                        return
                    reason = getattr(fault, "msg", str(fault))
                    yield Problem(str(path), number, None, f"the line is not JSON ({reason}): {_start(text)}")
                else:
                    if isinstance(row, list):
                        yield _one_list(path, number)
                        return
                    yield RawRow(str(path), number, row)
    except (OSError, EOFError, zlib.error) as fault:
        yield Problem(str(path), number + 1, None, f"the file cannot be read from here on ({fault})")


def _start(line: bytes) -> str:
    text = repr(line.decode().strip())
    return text if len(text) <= 60 else text[:57] + "..."


def _one_list(path: Path, line: int) -> Problem:
    return Problem(str(path), line, None, "this is a JSON list; write one object per line, without brackets around")


def _csv(path: Path) -> Iterator[RawRow | Problem]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            table = csv.DictReader(lines, restkey="", strict=True)
            line = 2  # of the row's first line; a quoted text may run over several
            for row in table:
                if "" in row:
                    yield Problem(str(path), line, None, "there are more cells than column names; quote the texts")
                else:
                    yield RawRow(str(path), line, {name: _cell(name, cell) for name, cell in row.items()})
                line = table.line_num + 1
    except UnicodeDecodeError:
        yield Problem(str(path), None, None, "the file is not UTF-8 text; save it as UTF-8")
    except (csv.Error, OSError) as fault:
        yield Problem(str(path), None, None, f"the file is not CSV ({fault})")


def _cell(name: str, cell: str | None) -> object:
    """The value of a CSV cell: an empty optional one is absent; `weight` and `clean_choice` are parsed."""
    if name in ("user_id", "prompt", "chosen", "rejected") or cell is None:
        return cell
    if name == "clean_choice":
        return {"": None, "true": True, "false": False}.get(cell.casefold(), cell)
    if name == "weight" and cell:
        try:
            return float(cell)
        except ValueError:
            return cell
    return cell or None


def _numbered(file: str, rows: Iterable[Any]) -> Iterator[RawRow]:
    for number, row in enumerate(rows, 1):
        yield RawRow(file, number, row)


def _parquet(path: Path) -> Iterator[RawRow | Problem]:
    import glob

    import datasets

    try:
        files = glob.escape(str(path.resolve()))  # `datasets` expands patterns
        rows = datasets.load_dataset("parquet", data_files=[files], split="train", streaming=True)
        yield from _numbered(str(path), rows)
    except Exception as fault:  # any exception of the reader is caused by the file
        yield Problem(str(path), None, None, f"the file is not Parquet ({_first_line(fault)})")


def _saved(folder: Path) -> Iterator[RawRow | Problem]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as fault:  # as above
        problem = Problem(str(folder), None, None, f"`datasets` cannot load the folder ({_first_line(fault)})")
        raise InputError([problem]) from fault
    parts = saved if isinstance(saved, dict) else {"": saved}
    for name, rows in parts.items():
        yield from _numbered(str(folder / name), rows)


def _hub(name: str) -> Iterator[RawRow | Problem]:
    import datasets
    import huggingface_hub

    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)  # fails at once; `datasets` retries first
        for part, rows in datasets.load_dataset(name, streaming=True).items():
            yield from _numbered(f"{name}:{part}", rows)
    except Exception as fault:  # no network, no such id, no access: one remedy
        remedy = "check the id and the network (and `hf auth login` if it is private), or give the path of a local file"
        sentence = f"the hub data set `{name}` cannot be read ({_first_line(fault)}); {remedy}"
        raise InputError([Problem(name, None, None, sentence)]) from fault


def _first_line(fault: Exception) -> str:
    text = str(fault).strip().splitlines()
    return f"{type(fault).__name__}: {text[0][:120]}" if text else type(fault).__name__


_READERS: dict[str, Callable[[Path], Iterator[RawRow | Problem]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_lines,
    ".jsonl.gz": _json_lines,
    ".ndjson.gz": _json_lines,
    ".json.gz": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
}
_KINDS = ".jsonl, .jsonl.gz, .csv or .parquet files"


def _reader(path: Path) -> Callable[[Path], Iterator[RawRow | Problem]] | None:
    name = path.name.casefold()
    return next((reader for suffix, reader in _READERS.items() if name.endswith(suffix)), None)
