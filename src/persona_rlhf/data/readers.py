"""Rows with line numbers from JSON, CSV, Parquet, `datasets` folders and the hub."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BufferedIOBase, BufferedReader
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from persona_rlhf.common.errors import InputError, Problem, did_you_mean
from persona_rlhf.common.files import LFS_REMEDY, find, is_hub_data_set, is_lfs_pointer
from persona_rlhf.data.columns import COLUMN_NAMES, columns_of
from persona_rlhf.data.json_blocks import BLOCK, JsonBlocks

_T = TypeVar("_T")

_SAVED = ("dataset_info.json", "dataset_dict.json")  # files that `Dataset.save_to_disk` writes


Part = Literal["train", "heldout", "unclear"]


class RawRow(NamedTuple):
    """A parsed row before any check; `line` is the row's number (from 1) in formats without lines.

    `part` is the split that the name of its file, or of its split in a data set, states (see `parts_by_name`).
    """

    file: str
    line: int
    row: object
    part: Part | None = None


def read_rows(path: Path | str) -> Iterator[RawRow | Problem]:
    """All rows of a file, a folder or a hub data set, in order; a row that cannot be parsed is a Problem.

    A folder is read file by file, sorted by name, or as a `datasets` folder. Raises InputError if there is nothing to
    read.
    """
    if is_hub_data_set(str(path)):
        yield from _hub(str(path))
        return
    source = find(path)
    if not source.is_dir():
        yield from read_file(source)
    elif any((source / name).exists() for name in _SAVED):
        yield from _saved(source)
    else:
        files = files_of(source)
        for file, part in zip(files, parts_by_name([file.name for file in files]), strict=True):
            yield from _in_part(read_file(file), part)


_TRAIN_NAMES = frozenset({"train", "training"})
_HELDOUT_NAMES = frozenset({"test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev", "heldout"})


def parts_by_name(names: Iterable[str]) -> list[Part | None]:
    """The splits that the names of files, or of the splits of a data set, state together.

    A name states a split by a word of the `datasets` library (`train`, `test`, `validation` and their like). Names
    count only where one of them says `train` and another one says what is held out. A file of held-out pairs beside
    files without such a word is `unclear`.
    """
    stated = [_part_by_name(name) for name in names]
    if "heldout" not in stated or set(stated) == {"heldout"}:
        return [None] * len(stated)
    if "train" in stated:
        return list(stated)
    return ["unclear" if part == "heldout" else None for part in stated]


def _part_by_name(name: str) -> Part | None:
    words = set(re.split(r"[^a-z]+", name.casefold()))
    train, heldout = bool(words & _TRAIN_NAMES), bool(words & _HELDOUT_NAMES)
    return None if train == heldout else "train" if train else "heldout"


def _in_part(rows: Iterable[RawRow | Problem], part: Part | None) -> Iterator[RawRow | Problem]:
    return (item._replace(part=part) if isinstance(item, RawRow) else item for item in rows)


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
    if is_lfs_pointer(path):
        yield Problem(str(path), None, None, LFS_REMEDY)
        return
    empty = True
    for item in reader(path):
        empty = False
        yield item
    if empty:
        yield Problem(str(path), None, None, "the file is empty; write one preference per row")


class _Objects:
    """A decoder of JSON rows; an object that holds a key twice becomes a Problem."""

    def __init__(self, path: Path) -> None:
        self._file = str(path)
        self._repeated: str | None = None
        self.decoder = json.JSONDecoder(object_pairs_hook=self._dict)

    def _dict(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        row = dict(pairs)
        if len(row) < len(pairs) and self._repeated is None:
            names = [name for name, _ in pairs]
            self._repeated = next(name for name in names if names.count(name) > 1)
        return row

    def item(self, line: int, row: object) -> RawRow | Problem:
        """The row that the decoder read last."""
        repeated, self._repeated = self._repeated, None
        if repeated is None:
            return RawRow(self._file, line, row)
        return Problem(self._file, line, None, f"the key `{repeated}` occurs twice; remove one of them")


_BOM = b"\xef\xbb\xbf"


def _bytes_of(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path) if path.suffix.casefold() == ".gz" else path.open("rb")


def _json(path: Path) -> Iterator[RawRow | Problem]:
    """The rows of JSON lines, of one JSON list, or of JSON objects that run over several lines."""
    number = 0
    try:
        with _bytes_of(path) as lines:
            parts = iter(lambda: lines.readline(BLOCK).removeprefix(_BOM), b"")  # a list may be one line of gigabytes
            first = next((part for part in parts if part.strip()), b"")
            if first.lstrip().startswith(b"{") and not first.endswith(b"\n"):
                first += lines.readline()
        with _bytes_of(path) as lines:
            if first.lstrip().startswith(b"[") or _breaks_off(first):
                yield from _json_document(path, lines)
                return
            objects = _Objects(path)
            for number, line in enumerate(lines, 1):
                text = line.removeprefix(_BOM) if number == 1 else line
                if not text.strip():
                    continue
                try:
                    yield objects.item(number, objects.decoder.decode(text.decode()))
                except UnicodeDecodeError:
                    yield Problem(str(path), number, None, "the line is not UTF-8 text; save the file as UTF-8")
                except (ValueError, RecursionError) as fault:
                    reason = getattr(fault, "msg", str(fault))
                    yield Problem(str(path), number, None, f"the line is not JSON ({reason}): {_start(text)}")
    except (OSError, EOFError, zlib.error) as fault:
        yield Problem(str(path), number + 1, None, f"the file cannot be read from here on ({fault})")


def _breaks_off(line: bytes) -> bool:
    """Whether a line is the beginning of a JSON object that runs over several lines."""
    try:
        text = line.decode().rstrip()
        json.loads(text)
    except json.JSONDecodeError as fault:
        return text.lstrip().startswith("{") and fault.pos >= len(text)
    except (ValueError, RecursionError):
        pass
    return False


def _json_document(path: Path, stream: BufferedIOBase) -> Iterator[RawRow | Problem]:
    """The rows of one JSON list, or of JSON objects with white space between them; a row's line is its first one."""
    objects = _Objects(path)
    blocks = JsonBlocks(stream)
    try:
        for line, row in blocks.values(objects.decoder):
            yield objects.item(line, row)
    except UnicodeDecodeError as fault:
        yield Problem(str(path), blocks.line_of(fault), None, "the line is not UTF-8 text; save the file as UTF-8")
    except (ValueError, RecursionError) as fault:
        reason = getattr(fault, "msg", str(fault))
        yield Problem(str(path), blocks.line_of(fault), None, f"the JSON cannot be read from here on ({reason})")


def _start(line: bytes) -> str:
    text = repr(line.decode().strip())
    return text if len(text) <= 60 else text[:57] + "..."


_SEPARATORS = ",;\t|"
_LARGEST_CELL = 2**31 - 1  # characters; csv's own limit is 131,072
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\s*')  # a first line of Excel


def _csv(path: Path) -> Iterator[RawRow | Problem]:
    csv.field_size_limit(_LARGEST_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            header = lines.readline()
            if hint := _SEPARATOR_LINE.fullmatch(header):
                separator = hint[1]
            else:
                separator = "\t" if path.suffix.casefold() == ".tsv" else _separator(header)
                lines.seek(0)
            yield from _cells(path, csv.reader(lines, delimiter=separator, strict=True), 1 if hint else 0)
    except UnicodeDecodeError:
        yield Problem(str(path), None, None, "the file is not UTF-8 text; save it as UTF-8")
    except OSError as fault:
        yield Problem(str(path), None, None, f"the file cannot be read ({fault})")


def _separator(header: str) -> str:
    """The separator of a CSV file: the one by which the header names most columns that are read here.

    Without any such name it is the one that gives most columns; a comma, if two give equally many.
    """

    def columns(separator: str) -> tuple[int, int]:
        try:
            [names] = csv.reader([header], delimiter=separator)
        except (csv.Error, ValueError):
            return (0, 0)
        return sum(name.strip() in COLUMN_NAMES for name in names), len(names)

    ranks = {separator: columns(separator) for separator in _SEPARATORS}
    best = [separator for separator, rank in ranks.items() if rank == max(ranks.values())]
    return best[0] if len(best) == 1 else ","


def _cells(path: Path, table: Any, skipped: int) -> Iterator[RawRow | Problem]:
    """The rows of a table in cells; `skipped` lines of the file stand before its header."""
    line = 1 + skipped  # of the row's first line; a quoted text may run over several
    try:
        names = [name.strip() for name in next(table, [])]
        if repeated := next((name for name in names if name and names.count(name) > 1), None):
            yield Problem(str(path), line, repeated, "two columns have this name; rename or remove one of them")
            return
        while True:
            line = skipped + table.line_num + 1
            if (cells := next(table, None)) is None:
                return
            if not cells:
                continue
            if any(cells[len(names) :]):
                yield Problem(str(path), line, None, "there are more cells than column names; quote the texts")
                continue
            nameless = [column for column, name in enumerate(names) if not name and any(cells[column : column + 1])]
            if any(column or not cells[column].isdecimal() for column in nameless):
                sentence = (
                    f"column {nameless[-1] + 1} has no name, but holds text; name it in the first line, or remove it"
                )
                yield Problem(str(path), line, None, sentence)
                continue
            values = {
                name: _cell(name, cell) for name, cell in zip(names, [*cells, *[None] * len(names)], strict=False)
            }
            yield RawRow(str(path), line, values)
    except csv.Error as fault:
        remedy = "a quotation mark opens here and is never closed" if "unexpected end" in str(fault) else str(fault)
        yield Problem(
            str(path), line, None, f"the row is not CSV ({remedy}); double every quotation mark in a quoted text"
        )


def _cell(name: str, cell: str | None) -> object:
    """The value of a CSV cell: an empty optional one is absent; `weight` and truth values are parsed."""
    if name in ("user_id", "prompt", "chosen", "rejected") or cell is None:
        return cell
    if name in ("clean_choice", "tie"):
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
    data = saved if isinstance(saved, dict) else {"": saved}
    for (name, rows), part in zip(data.items(), parts_by_name(data), strict=True):
        yield from _in_part(_numbered(str(folder / name), rows), part)


def _hub(name: str) -> Iterator[RawRow | Problem]:
    import datasets
    import huggingface_hub

    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)  # fails at once; `datasets` retries first
        data = datasets.load_dataset(name, streaming=True)
        for (split, rows), part in zip(data.items(), parts_by_name(data), strict=True):
            yield from _in_part(_numbered(f"{name}:{split}", rows), part)
    except Exception as fault:  # no network, no such id, no access: one remedy
        remedy = "check the id and the network (and `hf auth login` if it is private), or give the path of a local file"
        sentence = f"the hub data set `{name}` cannot be read ({_first_line(fault)}); {remedy}"
        raise InputError([Problem(name, None, None, sentence)]) from fault


def _first_line(fault: Exception) -> str:
    text = str(fault).strip().splitlines()
    return f"{type(fault).__name__}: {text[0][:120]}" if text else type(fault).__name__


_READERS: dict[str, Callable[[Path], Iterator[RawRow | Problem]]] = {
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
    ".jsonl.gz": _json,
    ".ndjson.gz": _json,
    ".json.gz": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
_KINDS = ".jsonl, .json, .csv, .tsv or .parquet files"


def _reader(path: Path) -> Callable[[Path], Iterator[RawRow | Problem]] | None:
    name = path.name.casefold()
    return next((reader for suffix, reader in _READERS.items() if name.endswith(suffix)), None)
