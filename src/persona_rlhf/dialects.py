"""DPO configs of TRL and Axolotl as ours: what has a counterpart is written out, what has none is named."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from persona_rlhf.config import Config
from persona_rlhf.foreign_keys import AXOLOTL, TRL, Dialect, NoCounterpart, as_name, reason
from persona_rlhf.inputs.bundled import is_hub_id
from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.inputs.section import check_section, in_order
from persona_rlhf.inputs.yaml_text import Document, KeyPath, Place, Tree, parse_yaml, read_yaml

_POLICY = "configs/policy/tier_one.yaml"
_FILES = ("base.model", "users.path")  # what may be missing still: the config is ours all the same


class Imported(NamedTuple):
    """Our config as YAML text, and one line for each key of theirs that it has no place for."""

    text: str
    left_out: list[str]


class _Entry(NamedTuple):
    """A value of ours, the place in their file that it comes from, and what is said beside it."""

    value: Tree
    place: Place
    comment: str


def import_config(path: Path) -> Imported:
    """Reads a DPO config of TRL or Axolotl. Raises InputError where it is neither, or a value in it is impossible."""
    document = read_yaml(path)
    if document.problems:
        raise InputError(document.problems)
    assert isinstance(document.tree, dict)
    theirs = {key: value for key, value in document.tree.items() if value is not None}
    dialect = _dialect(document.name, theirs)
    entries, left_out = _translated(document, theirs, dialect)
    problems = _check(document.name, entries)
    missing = [problem for problem in problems if problem.key in _FILES and isinstance(entries[problem.key].value, str)]
    if len(missing) < len(problems):
        raise InputError(in_order([problem for problem in problems if problem not in missing]))
    for key, sentence in ((str(problem.key), problem.sentence) for problem in missing):
        hub = key == "users.path" and is_hub_id(str(entries[key].value))
        comment = f"{entries[key].comment}; {'download it from the hub first' if hub else sentence}"
        entries[key] = entries[key]._replace(comment=comment)
    lines = [f"# {path.name}, a DPO config of {dialect.title}. Beside each value stands the key that it comes from."]
    lines += _yaml(entries)
    if left_out:
        lines += ["", f"# Keys of {path.name} without a counterpart:", *(f"#   {_one_line(line)}" for line in left_out)]
    return Imported("\n".join(lines) + "\n", left_out)


def write_new(text: str, out: Path) -> None:
    """Writes a text to a file that is not there yet. Raises InputError where it is."""
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        sentence = "there is something here already, and nothing is overwritten; name a new file"
        raise InputError([Problem(str(out), None, None, sentence)]) from None
    except (FileNotFoundError, NotADirectoryError):
        raise InputError([Problem(str(out), None, None, "there is no such folder; make it first")]) from None


def _dialect(name: str, theirs: Mapping[str, Tree]) -> Dialect:
    """Whose config it is. Raises InputError where it is neither's."""
    if "model_name_or_path" in theirs:
        return TRL
    if "base_model" not in theirs:
        wanted = "`model_name_or_path` (TRL), nor `base_model` and `rl: dpo` (Axolotl)"
        raise InputError([Problem(name, None, None, f"no DPO config of TRL or Axolotl: it has neither {wanted}")])
    if theirs.get("rl") not in ("dpo", "ipo"):
        said = f"`rl: {theirs['rl']}`" if "rl" in theirs else "no `rl`"
        raise InputError([Problem(name, None, "rl", f"this Axolotl config has {said}; `rl: dpo` or ipo can be read")])
    return AXOLOTL


def _translated(
    document: Document, theirs: Mapping[str, Tree], dialect: Dialect
) -> tuple[dict[str, _Entry], list[str]]:
    """Entries by our keys, in the order of our config, and what is said of their keys without a counterpart."""
    found, left_out = dict(_of_many_keys(document, theirs, dialect)), dict[str, str]()
    known = {*dialect.keys, *dialect.batch, *_datasets_in_one(theirs)}
    for key, value in theirs.items():
        if key not in known and value not in dialect.same.get(key, ()):
            left_out[key] = reason(key)
    for key, (ours, read) in dialect.keys.items():
        if key in theirs:
            try:
                value = read(theirs[key])
            except NoCounterpart as why:
                left_out[key] = str(why)
                continue
            found.setdefault(ours, _Entry(value, document.place((key,)), key))
    if "users.path" not in found:
        sentence = "no data set is named, so there are no preference pairs; write one in"
        raise InputError([Problem(document.name, None, dialect.dataset, sentence)])
    here = document.place(())
    output = str(theirs.get("output_dir") or Path(document.name).stem)
    found.setdefault("name", _Entry(as_name(output.rstrip("/").split("/")[-1]), here, "names the run"))
    found["policy.documents"] = _Entry([_POLICY], here, "theirs names no policy; this is the shipped tier one")
    unread = {ours for key, (ours, _) in dialect.keys.items() if key in left_out}
    for ours in dialect.defaults.keys() - unread:
        found.setdefault(ours, _Entry(dialect.defaults[ours], here, f"default of {dialect.title}"))
    if not theirs.get(dialect.adapter) and "dpo.learning_rate" in found:
        rate = found["dpo.learning_rate"]
        comment = f"{rate.comment}; theirs trains whole models, and LoRA wants about ten times that"
        found["dpo.learning_rate"] = rate._replace(comment=comment)
    users = found["users.path"]
    found["users.path"] = users._replace(comment=f"{users.comment}; its rows need a `user_id`")
    ordered = {key: found[key] for key in _our_keys() if key in found}
    return ordered, [f"{key}: {left_out[key]}" for key in theirs if key in left_out]


def _our_keys() -> Iterator[str]:
    """The keys of our config, in its order."""
    for name, field in Config.model_fields.items():
        section = getattr(field.annotation, "model_fields", {})
        yield from [f"{name}.{key}" for key in section] or [name]


def _of_many_keys(document: Document, theirs: Mapping[str, Tree], dialect: Dialect) -> Iterator[tuple[str, _Entry]]:
    """What no single plain key of theirs says: the pairs of a step, and the first of several data sets."""
    counts = {key: theirs.get(key, default) for key, default in dialect.batch.items()}
    wrong = [key for key, count in counts.items() if type(count) is not int]
    product = counts[wrong[0]] if wrong else math.prod(counts.values())  # type: ignore[arg-type]
    comment = " x ".join(f"{key} {count}" for key, count in counts.items())
    yield "dpo.pairs_per_step", _Entry(product, document.place(tuple(wrong[:1] or counts)[:1]), comment)
    sets = theirs.get("datasets")
    if isinstance(sets, list) and sets and isinstance(sets[0], dict) and "path" in sets[0]:
        first = sets[0]
        field = "data_files" if isinstance(first.get("data_files"), str) else "path"
        yield "users.path", _Entry(first[field], document.place(("datasets", 0, field)), f"datasets[0].{field}")


def _datasets_in_one(theirs: Mapping[str, Tree]) -> list[str]:
    """`datasets`, where it says nothing but one path."""
    sets = theirs.get("datasets")
    plain = isinstance(sets, list) and len(sets) == 1 and isinstance(sets[0], dict) and set(sets[0]) == {"path"}
    return ["datasets"] if plain else []


def _check(name: str, entries: Mapping[str, _Entry]) -> list[Problem]:
    """What our config says of these values, with the lines of theirs."""
    tree: dict[str, Tree] = {}
    places: dict[KeyPath, Place] = {(): Place(name, None)}
    for key, entry in entries.items():
        section, _, field = key.rpartition(".")
        at = tree.setdefault(section, {}) if section else tree
        assert isinstance(at, dict)
        at[field] = entry.value
        places[tuple(key.split("."))] = entry.place
    return check_section(Config, Document(name, tree, places, []))[1]


def _yaml(entries: Mapping[str, _Entry]) -> Iterator[str]:
    """The config as YAML."""
    last = ""
    for key, (value, _, comment) in entries.items():
        section, _, field = key.rpartition(".")
        if section and section != last:
            yield f"{section}:"
        last, indent = section, "  " if section else ""
        if isinstance(value, list):
            yield f"{indent}{field}: # {_one_line(comment)}"
            yield from (f"{indent}  - {_scalar(item)}" for item in value)
        else:
            yield f"{indent}{field}: {_scalar(value)} # {_one_line(comment)}"


def _one_line(comment: str) -> str:
    return " ".join(comment.split())


def _scalar(value: Tree) -> str:
    """A value on one line; a text without quotes where YAML reads it back as it is."""
    if isinstance(value, str) and value:
        try:
            if parse_yaml(f"- {value} #", "").tree == [value]:
                return value
        except InputError:
            pass
    return json.dumps(value, ensure_ascii=False)
