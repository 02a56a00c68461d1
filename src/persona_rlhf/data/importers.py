"""`data import`: preference files of other formats, and public probe sets, written in our formats."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from persona_rlhf.common.errors import InputError, Problem, did_you_mean
from persona_rlhf.common.files import atomic_write, find
from persona_rlhf.config.loader import read_yaml
from persona_rlhf.data.chitchat import ChitchatImport, Tell, import_chitchat
from persona_rlhf.data.columns import shown
from persona_rlhf.data.imported_pairs import need_pairs_file, write_pairs
from persona_rlhf.data.pairs import first_problems
from persona_rlhf.data.preference_import import SetChoices, SetImport, import_set
from persona_rlhf.data.preference_sets import preference_sets
from persona_rlhf.data.readers import RawRow, converted, read_file, read_rows
from persona_rlhf.policy.hazards import HARMLESS, ProbeDestination, PublicSet, SplitBy, assign_topic, public_sets
from persona_rlhf.policy.judges import NearDuplicateIndex, plain

OUR_BANK = "data/policy/tier_one_real"


class ProbeImport(NamedTuple):
    """The outcome of a probe import: rows read, rows written by file and split, rows left out by reason."""

    source: PublicSet
    rows: int
    written: dict[Path, dict[str, int]]
    left_out: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        about = {key: getattr(self.source, key) for key in ("name", "title", "url", "licence")}
        written = {str(path): counts for path, counts in self.written.items()}
        return {**about, "rows": self.rows, "written": written, "left_out": self.left_out}

    def sentences(self) -> Iterator[str]:
        """The outcome as sentences."""
        yield f"{self.rows} rows of {self.source.title} read; its texts are under {self.source.licence}."
        for path, counts in self.written.items():
            yield f"  {path}: {', '.join(f'{n} {name}' for name, n in counts.items())}"
        for reason, count in self.left_out.items():
            yield f"  {count} rows left out: {reason}"


def import_probes(name: str, src: Path | str, out: Path, train: bool = False) -> ProbeImport:
    """Reads a public set (a file, a folder or a hub id) and writes one probe bank per category to `out`.

    The banks are `CATEGORY.NAME.jsonl`; harmless prompts go to `over_refusal.NAME.jsonl`. A near-duplicate of an
    earlier prompt of the set, of another set's bank in `out` or of our bank for real models is left out. Only with
    `train` can probes fall into the `train` split: a public set is worth most if nothing was trained on it. All probes
    of a set that is kept for tests of shift are `test`. Raises InputError naming every row of another format.
    """
    source = public_sets()[name]
    if train and source.shift:
        sentence = f"`{name}` is kept for tests of shift, so none of its probes trains; leave --train out"
        raise InputError([Problem("data import", None, "--train", sentence)])
    if out.exists() and not out.is_dir():
        raise InputError([Problem(str(out), None, None, "the banks are several files; name a folder for them")])
    index = _existing_prompts(source, out)
    problems: list[Problem] = []
    banks: dict[str, list[dict[str, str]]] = {}
    left_out: Counter[str] = Counter()
    rows = 0
    for probe_row in converted(_rows(src), partial(_read, source)):
        if isinstance(probe_row, Problem):
            problems.append(probe_row)
            continue
        rows += 1
        text, (destination, reason) = probe_row
        if destination is not None and (duplicate := index.near(text)):
            destination, reason = None, f"held already, by {duplicate}"
        if destination is None:
            left_out[reason] += 1
            continue
        index.add(name, text)
        probe = {"id": f"{name}-{rows:04d}", "prompt": text}
        split_by: SplitBy = "shift" if source.shift else "topic" if train else "held_out"
        placed = {"topic": plain(text), "phrasing": name, "split_by": split_by}
        banks.setdefault(destination, []).append(probe if destination == HARMLESS else {**probe, **placed})
    if problems:
        raise InputError(first_problems(problems))
    return ProbeImport(source, rows, _write(source, banks, out), dict(left_out))


def _rows(src: Path | str) -> Iterator[RawRow | Problem]:
    """The rows of a set; PyRIT's `.prompt` file is YAML with a list of `seeds`. Raises InputError for no such list."""
    if Path(src).suffix != ".prompt":
        yield from read_rows(src)
        return
    document = read_yaml(find(src))
    seeds = document.tree.get("seeds") if isinstance(document.tree, dict) else None
    if document.problems or not isinstance(seeds, list):
        missing = Problem(str(src), None, "seeds", "there is no list of prompts; is this a seed data set of PyRIT?")
        raise InputError(document.problems or [missing])
    for number, seed in enumerate(seeds):
        yield RawRow(str(src), document.place(("seeds", number)).line or number + 1, seed)


def _read(source: PublicSet, row: Mapping[str, object]) -> tuple[str, ProbeDestination]:
    text = source.text(row)
    return text, source.destination(row) if plain(text) else ProbeDestination(None, "an empty prompt")


def _existing_prompts(source: PublicSet, out: Path) -> NearDuplicateIndex:
    """The prompts of our bank for real models, and of other sets' banks in `out`."""
    index = NearDuplicateIndex()
    others = sorted(path for path in out.glob("*.*.jsonl") if path.suffixes[-2] != f".{source.name}")
    for path in (*sorted(find(OUR_BANK).glob("*.jsonl")), *others):
        for item in read_rows(path):
            if isinstance(item, Problem):
                raise InputError([item])
            if isinstance(item.row, Mapping) and isinstance(item.row.get("prompt"), str):
                index.add(path.name, item.row["prompt"])
    return index


def _write(source: PublicSet, banks: Mapping[str, list[dict[str, str]]], out: Path) -> dict[Path, dict[str, int]]:
    """Replaces the banks of a set; returns the number of rows per file and split."""
    out.mkdir(parents=True, exist_ok=True)
    written = {out / f"{name}.{source.name}.jsonl": rows for name, rows in sorted(banks.items())}
    for former in out.glob(f"*.{source.name}.jsonl"):
        if former not in written:
            former.unlink()
    for path, rows in written.items():
        atomic_write(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return {path: dict(sorted(Counter(map(_split, rows)).items())) for path, rows in written.items()}


def _split(row: Mapping[str, str]) -> str:
    by = row.get("split_by")
    if by is None:
        return "harmless"
    return "test" if by == "shift" else assign_topic(row["topic"], held_out=by == "held_out")


Convert = Callable[[Mapping[str, object]], dict[str, str] | str]


class ImportSummary(NamedTuple):
    """The outcome of a preference import: rows read, pairs written, their users, rows left out by reason."""

    format: str
    rows: int
    pairs: int
    users: int
    left_out: dict[str, int]
    path: Path

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**self._asdict(), "path": str(self.path)}

    def sentences(self) -> Iterator[str]:
        """The outcome as sentences."""
        yield "CRAGC-25 (Gienapp et al. 2025). Licence: CC-BY-4.0."
        yield f"{self.rows} rows read, {self.pairs} pairs of {self.users} users written to {self.path}."
        for reason, count in self.left_out.items():
            yield f"  {count} rows left out: {reason}"


def format_list() -> str:
    """The names that `import_file` reads: formats of preferences, and public sets of probes."""
    names = ", ".join((*FORMATS, *preference_sets()))
    return f"Preferences: {names}. Probes: {', '.join(sorted(public_sets()))}."


def import_file(
    name: str,
    src: Path,
    out: Path,
    train: bool = False,
    min_pairs: int = 1,
    choices: SetChoices | None = None,
    tell: Tell = lambda sentence: None,
) -> ImportSummary | ChitchatImport | SetImport | ProbeImport:
    """Converts a file of a format, or a probe set, by name. Raises InputError for an unknown name or wrong rows."""
    if name in preference_sets() and not train:
        return import_set(preference_sets()[name], src, out, min_pairs, choices)
    if name in (*FORMATS, *public_sets()) and choices not in (None, SetChoices()):
        sentence = f"they go with {', '.join(preference_sets())}; the columns of `{name}` are fixed"
        raise InputError([Problem("data import", None, "--column, --user, --min-gap", sentence)])
    if name in FORMATS and not train:
        return FORMATS[name](src, out, min_pairs, tell)
    if name in public_sets():
        if min_pairs > 1:
            sentence = "probes belong to no user; --min-pairs goes with preferences"
            raise InputError([Problem("data import", None, "--min-pairs", sentence)])
        return import_probes(name, src, out, train)
    names = (*FORMATS, *preference_sets(), *public_sets())
    sentence = f"no importer reads `{name}`{did_you_mean(name, names)}; there is {', '.join(names)}"
    if name in (*FORMATS, *preference_sets()):
        sentence = f"`{name}` are preferences, whose split is `users.heldout`; --train goes with sets of probes"
    raise InputError([Problem("data import", None, "FORMAT", sentence)])


def import_cragc25(src: Path, out: Path, min_pairs: int = 1, _: Tell = lambda sentence: None) -> ImportSummary:
    """Converts CRAGC-25, the Crowd RAG Corpus 2025 (Gienapp et al., SIGIR 2025; CC-BY 4.0).

    `src` is its annotations, one judgement per line (.jsonl or .jsonl.gz), or a folder that holds
    `annotations.jsonl.gz`. The label is the forced choice between two answers in overall quality. Sex, age and country
    of the workers are personal data and are not copied. Users with fewer than `min_pairs` pairs are left out. Raises
    InputError naming every row of another format.
    """
    if src.is_dir():
        names = ("annotations.jsonl.gz", "annotations.jsonl")
        file = next((src / name for name in names if (src / name).exists()), None)
        if file is None:
            raise InputError([Problem(str(src), None, None, f"the folder holds no {names[0]}; give the file's path")])
        src = file
    return _convert("cragc25", _from_cragc25, src, out, min_pairs)


FORMATS: Mapping[str, Callable[..., ImportSummary | ChitchatImport]] = {
    "chitchat": import_chitchat,
    "cragc25": import_cragc25,
}


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


def _convert(name: str, convert: Convert, src: Path, out: Path, min_pairs: int) -> ImportSummary:
    """Converts `src` row by row and writes `out` whole, or not at all."""
    if not src.is_file():
        raise InputError([Problem(str(src), None, None, "there is no such file; check the path")])
    need_pairs_file(out, src)
    problems: list[Problem] = []
    pairs: list[dict[str, str]] = []
    left_out: Counter[str] = Counter()
    rows = 0
    for pair in converted(read_file(src), convert):
        if isinstance(pair, Problem):
            problems.append(pair)
            continue
        rows += 1
        if isinstance(pair, str):
            left_out[pair] += 1
        else:
            pairs.append(pair)
    if problems:
        raise InputError(first_problems(problems))
    users = write_pairs(src, out, pairs, min_pairs, left_out)
    return ImportSummary(name, rows, users.total(), len(users), dict(left_out), out)
