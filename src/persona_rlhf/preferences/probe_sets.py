"""Public sets of probes written as banks: by category, split by topic, without what is held already."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from persona_rlhf.inputs.bundled import find
from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.policy.hazards import SplitBy, assign_topic
from persona_rlhf.policy.likeness import Collection, plain
from persona_rlhf.policy.public_sets import HARMLESS, Destination, PublicSet, public_sets
from persona_rlhf.preferences.formats import converted, read_rows
from persona_rlhf.preferences.pairs import first_problems

OUR_BANK = "data/policy/tier_one_real"


class ProbeImport(NamedTuple):
    """What became of a public set: rows read, rows written by file and by split, and the rows left out by reason."""

    source: PublicSet
    rows: int
    written: dict[Path, dict[str, int]]
    left_out: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """As an object of plain JSON values."""
        about = {key: getattr(self.source, key) for key in ("name", "title", "url", "licence")}
        written = {str(path): counts for path, counts in self.written.items()}
        return {**about, "rows": self.rows, "written": written, "left_out": self.left_out}

    def sentences(self) -> Iterator[str]:
        """What to tell people."""
        yield f"{self.rows} rows of {self.source.title} read; its texts are under {self.source.licence}."
        for path, counts in self.written.items():
            yield f"  {path}: {', '.join(f'{n} {name}' for name, n in counts.items())}"
        for reason, count in self.left_out.items():
            yield f"  {count} rows left out: {reason}"


def import_probes(name: str, src: Path | str, out: Path, train: bool = False) -> ProbeImport:
    """Reads a public set (a file, a folder or a hub id) and writes `out/CATEGORY.NAME.jsonl`, a probe bank each, and
    `out/over_refusal.NAME.jsonl` where the set has harmless prompts.

    A prompt is left out where it, or one nearly alike, stands in the set already, in a bank of another set in `out`, or
    in our own bank for real models. Unless `train` says so, no probe falls into the `train` split: a public set is
    worth most where nothing has been trained on it. Raises InputError naming every row that is not of this set.
    """
    source = public_sets()[name]
    if out.exists() and not out.is_dir():
        raise InputError([Problem(str(out), None, None, "the banks are several files; name a folder for them")])
    held = _held(source, out)
    problems: list[Problem] = []
    banks: dict[str, list[dict[str, str]]] = {}
    left_out: Counter[str] = Counter()
    rows = 0
    for found in converted(read_rows(src), partial(_read, source)):
        if isinstance(found, Problem):
            problems.append(found)
            continue
        rows += 1
        text, (destination, reason) = found
        if destination is not None and (twice := held.near(text)):
            destination, reason = None, f"held already, by {twice}"
        if destination is None:
            left_out[reason] += 1
            continue
        held.add(name, text)
        probe = {"id": f"{name}-{rows:04d}", "prompt": text}
        split_by: SplitBy = "topic" if train else "held_out"
        placed = {"topic": plain(text), "phrasing": name, "split_by": split_by}
        banks.setdefault(destination, []).append(probe if destination == HARMLESS else {**probe, **placed})
    if problems:
        raise InputError(first_problems(problems))
    return ProbeImport(source, rows, _write(source, banks, out), dict(left_out))


def _read(source: PublicSet, row: Mapping[str, object]) -> tuple[str, Destination]:
    text = source.text(row)
    return text, source.destination(row) if plain(text) else Destination(None, "an empty prompt")


def _held(source: PublicSet, out: Path) -> Collection:
    """The prompts of the banks of other sets in `out`, and of our own."""
    held = Collection()
    others = sorted(path for path in out.glob("*.*.jsonl") if path.suffixes[-2] != f".{source.name}")
    for path in (*sorted(find(OUR_BANK).glob("*.jsonl")), *others):
        for item in read_rows(path):
            if isinstance(item, Problem):
                raise InputError([item])
            if isinstance(item.row, Mapping) and isinstance(item.row.get("prompt"), str):
                held.add(path.name, item.row["prompt"])
    return held


def _write(source: PublicSet, banks: Mapping[str, list[dict[str, str]]], out: Path) -> dict[Path, dict[str, int]]:
    """Writes the files of a set in place of its former ones; what is in each, by split."""
    out.mkdir(parents=True, exist_ok=True)
    written = {out / f"{name}.{source.name}.jsonl": rows for name, rows in sorted(banks.items())}
    for former in out.glob(f"*.{source.name}.jsonl"):
        if former not in written:
            former.unlink()
    for path, rows in written.items():
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return {path: dict(sorted(Counter(map(_split, rows)).items())) for path, rows in written.items()}


def _split(row: Mapping[str, str]) -> str:
    by = row.get("split_by")
    return "harmless" if by is None else assign_topic(row["topic"], held_out=by == "held_out")
