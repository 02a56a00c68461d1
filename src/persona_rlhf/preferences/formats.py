"""Rows of any supported file, one at a time, with the line each stands on."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from persona_rlhf.inputs.bundled import find, is_hub_id
from persona_rlhf.inputs.problems import InputError, Problem, did_you_mean
from persona_rlhf.preferences.columns import columns_of

_T = TypeVar("_T")

_SAVED = ("dataset_info.json", "dataset_dict.json")  # what `Dataset.save_to_disk` leaves in its folder


class RawRow(NamedTuple):
    """A row as it was parsed, not yet looked at; `line` is the row's number in formats without lines (from 1)."""

    file: str
    line: int
    row: object


def read_rows(path: Path | str) -> Iterator[RawRow | Problem]:
    """All rows of a file, a folder or a hub data set, in order; what cannot be parsed comes as a Problem.

    A folder is read file by file, sorted by name, or as the `datasets` folder it is. Raises InputError where there is
    nothing to read.
    """
    if is_hub_id(str(path)) and not Path(path).exists() and _reader(Path(path)) is None:
        yield from _hub(str(path))
        return
    place = find(path)
    if not place.is_dir():
        yield from read_file(place)
    elif any((place / name).exists() for name in _SAVED):
        yield from _saved(place)
    else:
        for file in files_of(place):
            yield from read_file(file)


def converted(
    items: Iterable[RawRow | Problem], convert: Callable[[Mapping[str, object]], _T]
) -> Iterator[_T | Problem]:
    """What `convert` makes of every row; the problem of one that could not be read or that it raises ValueError for."""
    for item in items:
        if isinstance(item, Problem):
            yield item
            continue
        try:
            yield convert(columns_of(item.row))
        except ValueError as fault:
            yield Problem(item.file, item.line, None, str(fault))


def files_of(folder: Path) -> list[Path]:
    """The files of a folder that can be read, sorted by name; raises InputError where there are none."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and _reader(file) is not None)
    if not files:
        raise InputError([Problem(str(folder), None, None, f"the folder holds no preferences; put {_KINDS} here")])
    return files


def read_file(path: Path) -> Iterator[RawRow | Problem]:
    """The rows of one file; a file without any is a Problem."""
    reader = _reader(path)
    if reader is None:
        near = did_you_mean(path.suffix, _READERS)
        raise InputError([Problem(str(path), None, None, f"`{path.suffix}` is no kind we read{near}; use {_KINDS}")])
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
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"`{twice}` stands in it twice")
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
    """CSV has only texts: an empty optional cell is absent, and the two columns that are no texts are read."""
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
    except Exception as fault:  # whatever the reader raises, the file is the cause
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
        huggingface_hub.HfApi().dataset_info(name, timeout=10)  # says at once what `datasets` says after many retries
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
