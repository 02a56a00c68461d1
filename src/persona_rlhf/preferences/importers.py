"""Other people's files, written as ours: preferences, and public sets of probes."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from persona_rlhf.inputs.problems import InputError, Problem, did_you_mean
from persona_rlhf.policy.public_sets import public_sets
from persona_rlhf.preferences.columns import shown
from persona_rlhf.preferences.formats import converted, read_file
from persona_rlhf.preferences.pairs import first_problems
from persona_rlhf.preferences.probe_sets import ProbeImport, import_probes

Convert = Callable[[Mapping[str, object]], dict[str, str] | str]


class ImportSummary(NamedTuple):
    """What became of a file: rows read, pairs written, their users, and the rows left out by reason."""

    format: str
    rows: int
    pairs: int
    users: int
    left_out: dict[str, int]
    path: Path

    def to_json(self) -> dict[str, Any]:
        """As an object of plain JSON values."""
        return {**self._asdict(), "path": str(self.path)}

    def sentences(self) -> Iterator[str]:
        """What to tell people."""
        yield f"{self.rows} rows read, {self.pairs} pairs of {self.users} users written to {self.path}."
        for reason, count in self.left_out.items():
            yield f"  {count} rows left out: {reason}"


def import_file(name: str, src: Path, out: Path, train: bool = False) -> ImportSummary | ProbeImport:
    """Converts a file of a known format or set. Raises InputError for an unknown one, and for what is wrong in it."""
    if name in FORMATS and not train:
        return FORMATS[name](src, out)
    if name in public_sets():
        return import_probes(name, src, out, train)
    known = (*FORMATS, *public_sets())
    sentence = f"no importer reads `{name}`{did_you_mean(name, known)}; there is {', '.join(known)}"
    if name in FORMATS:
        sentence = f"`{name}` are preferences, whose split is `users.heldout`; --train goes with sets of probes"
    raise InputError([Problem("data import", None, "FORMAT", sentence)])


def import_cragc25(src: Path, out: Path) -> ImportSummary:
    """Converts CRAGC-25, the Crowd RAG Corpus 2025 (Gienapp et al., SIGIR 2025; CC-BY 4.0).

    `src` is its annotations, one judgement per line (.jsonl or .jsonl.gz), or a folder that holds
    `annotations.jsonl.gz`. The label is the forced choice between two answers in overall quality. Sex, age and country
    of the workers are personal data and are not copied. Raises InputError naming every row that is not of this format.
    """
    if src.is_dir():
        names = ("annotations.jsonl.gz", "annotations.jsonl")
        found = next((src / name for name in names if (src / name).exists()), None)
        if found is None:
            raise InputError([Problem(str(src), None, None, f"the folder holds no {names[0]}; give the file's path")])
        src = found
    return _convert("cragc25", _from_cragc25, src, out)


FORMATS: Mapping[str, Callable[[Path, Path], ImportSummary]] = {"cragc25": import_cragc25}


def _from_cragc25(row: Mapping[str, object]) -> dict[str, str] | str:
    columns = ("user", "query_id", "query", "a_id", "b_id", "a", "b")
    wrong = next((name for name in columns if not isinstance(row.get(name), str)), None)
    if wrong is not None:
        raise ValueError(f"column `{wrong}` must be a text, not {shown(row.get(wrong))}; is this a CRAGC-25 file?")
    choice = row.get("choice")
    label = choice.get("quality_overall") if isinstance(choice, Mapping) else None
    if label in ("N", None):
        return "no choice in overall quality"
    if label not in ("A", "B"):
        raise ValueError(f"`choice.quality_overall` is {shown(label)}; it must be A or B")
    text = {name: str(row[name]) for name in columns}
    chosen, rejected = ("a", "b") if label == "A" else ("b", "a")
    return {
        "user_id": text["user"],
        "prompt": text["query"],
        "chosen": text[chosen],
        "rejected": text[rejected],
        "id": f"{text['query_id']}/{text[f'{chosen}_id']}/{text[f'{rejected}_id']}/{text['user']}",
        "source": "cragc25",
    }


def _convert(name: str, convert: Convert, src: Path, out: Path) -> ImportSummary:
    """Reads `src` row by row and puts `out` in place whole, or not at all."""
    if not src.is_file():
        raise InputError([Problem(str(src), None, None, "there is no such file; check the path")])
    if out.is_dir() or out.suffix != ".jsonl":
        raise InputError([Problem(str(out), None, None, "the output is one file of JSON lines; name it *.jsonl")])
    if out.exists() and out.samefile(src):
        raise InputError([Problem(str(out), None, None, "the output would replace its source; name another file")])
    problems: list[Problem] = []
    lines: list[str] = []
    users: set[str] = set()
    left_out: Counter[str] = Counter()
    rows = 0
    for pair in converted(read_file(src), convert):
        if isinstance(pair, Problem):
            problems.append(pair)
            continue
        rows += 1
        if isinstance(pair, str):
            left_out[pair] += 1
            continue
        users.add(pair["user_id"])
        lines.append(json.dumps(pair, ensure_ascii=False) + "\n")
    if problems:
        raise InputError(first_problems(problems))
    write_lines(out, lines)
    return ImportSummary(name, rows, len(lines), len(users), dict(left_out), out)


def write_lines(out: Path, lines: Iterable[str]) -> None:
    """Puts a file of these lines in place whole, or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(lines)
        Path(unfinished).replace(out)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
