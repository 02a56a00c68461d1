"""Conversion of DPO configs of TRL, the alignment-handbook, Axolotl and LLaMA-Factory, for `config import`.

Keys with a counterpart are written out; every other key is named with the reason. The tables are in `dialects.yaml`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write
from persona_rlhf.config.data_sets import data_set
from persona_rlhf.config.experiment import Config
from persona_rlhf.config.loader import (
    KeyPath,
    Section,
    SourceLocation,
    Tree,
    YamlDocument,
    check_section,
    in_order,
    parse_yaml,
    read_section,
    read_yaml,
)


class NoCounterpart(Exception):  # noqa: N818 - no fault: the key is named, and the reading goes on
    """A value without a counterpart here; the message is the reason."""


class Dialect(Section):
    """The config keys of another trainer; `dialects.yaml` says what each field holds."""

    title: str
    adapter: str
    dataset: str
    keys: dict[str, str]
    batch: dict[str, int]
    same: dict[str, list[str | bool]]
    defaults: dict[str, str | int | float]
    values: dict[str, dict[str, str]]
    alpha_per_rank: int | None = None


class _Dialects(Section):
    trl: Dialect
    axolotl: Dialect
    llama_factory: Dialect
    values: dict[str, dict[str, str]]
    reasons: dict[str, str]


@cache
def dialects() -> _Dialects:
    """The tables of all trainers."""
    return read_section(_Dialects, read_yaml(Path(__file__).with_name("dialects.yaml")))


def _reason(key: str) -> str:
    """The reason why a key has no counterpart."""
    reasons = dialects().reasons.items()
    return next((why for pattern, why in reasons if re.fullmatch(pattern, key)), "nothing here does this")


def _as_name(value: Tree) -> Tree:
    """A text as the name of an experiment, which also names a folder."""
    return re.sub(r"[^\w.-]+", "-", str(value)).lstrip(".-") or "imported"


def _whole(value: Tree) -> Tree:
    if isinstance(value, float) and not value.is_integer():
        raise NoCounterpart("the number of epochs is a whole number")
    return int(value) if isinstance(value, float) else value


def _number(value: Tree) -> Tree:
    """A number, also in quotes: readers of YAML 1.1 take 5e-6 for a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _share(value: Tree) -> Tree:
    if isinstance(value, int | float) and value >= 1:
        raise NoCounterpart("is a count; this key is a share of each user's pairs or steps")
    return value


def _clip(value: Tree) -> Tree:
    if value in (0, 0.0):
        raise NoCounterpart("a gradient is always clipped")
    return value


def _modules(value: Tree) -> Tree:
    if value is False:
        raise NoCounterpart("lora.target_modules is all-linear, or names the layers")
    if value is True or value in ("all-linear", ["all-linear"], "all"):
        return "all-linear"
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


_READERS: Mapping[str, Callable[[Tree], Tree]] = {
    "name": _as_name,
    "users.heldout": _share,
    "lora.alpha": _whole,
    "lora.target_modules": _modules,
    "dpo.beta": _number,
    "dpo.epochs": _whole,
    "dpo.learning_rate": _number,
    "dpo.warmup": _share,
    "dpo.max_grad_norm": _clip,
    "dpo.weight_decay": _number,
    "dpo.label_smoothing": _number,
}


def _read(ours: str, value: Tree, dialect: Dialect) -> Tree:
    """A value of another trainer as the value of our key. Raises NoCounterpart with the reason."""
    names = (dialects().values | dialect.values).get(ours)
    if names is None:
        return _READERS[ours](value) if ours in _READERS else value
    alone = value[0] if isinstance(value, list) and len(value) == 1 else value
    name = str(alone).lower() if isinstance(alone, bool) else str(alone)
    if name not in names:
        raise NoCounterpart(f"{ours} is {', '.join(dict.fromkeys(names.values()))}")
    return names[name]


_POLICY = "configs/policy/real/tier_one.yaml"
_BUNDLED = {"data/base": "configs/policy/tier_one.yaml"}  # the tiny base has probes in words that it knows
_FILES = ("base.model", "users.path")  # files that may still be missing


class ImportedConfig(NamedTuple):
    """Our config as YAML text, and one line for each key without a counterpart."""

    text: str
    left_out: list[str]


class _Entry(NamedTuple):
    """A value of our config, its place in the other file, and the comment beside it."""

    value: Tree
    place: SourceLocation
    comment: str


def import_config(path: Path) -> ImportedConfig:
    """Reads a DPO config of another trainer. Raises InputError if it is of none, or has an impossible value."""
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
        entries[key] = entries[key]._replace(comment=f"{entries[key].comment}; {sentence}")
    lines = [f"# {path.name}, a DPO config of {dialect.title}. A comment names the key that each value comes from."]
    lines += _yaml(entries)
    if left_out:
        lines += ["", f"# Keys of {path.name} without a counterpart:", *(f"#   {_one_line(line)}" for line in left_out)]
    return ImportedConfig("\n".join(lines) + "\n", left_out)


def write_new(text: str, out: Path) -> None:
    """Writes a text to a new file. Raises InputError if it exists, or its folder does not."""
    write_all_new({out: text})


def write_all_new(texts: Mapping[Path, str]) -> None:
    """Writes texts to new files. Raises InputError, and writes none, naming each that exists or lacks its folder."""
    problems = []
    for out in texts:
        if out.exists():
            sentence = "this file exists already and is not overwritten; name a new file"
            problems.append(Problem(str(out), None, None, sentence))
        elif not out.parent.is_dir():
            problems.append(Problem(str(out), None, None, "this folder does not exist; make it first"))
    if problems:
        raise InputError(problems)
    for out, text in texts.items():
        atomic_write(out, text)


_LLAMA_FACTORY = frozenset({"stage", "finetuning_type", "pref_beta", "pref_loss"})


def _dialect(name: str, theirs: Mapping[str, Tree]) -> Dialect:
    """The trainer that a config is for. Raises InputError if it is for none, or not for DPO."""
    if theirs.keys() & _LLAMA_FACTORY:
        _need(name, theirs, "stage", ("dpo",), "LLaMA-Factory")
        return dialects().llama_factory
    if "model_name_or_path" in theirs:
        return dialects().trl
    if "base_model" not in theirs:
        wanted = "`model_name_or_path` (TRL, LLaMA-Factory), nor `base_model` and `rl: dpo` (Axolotl)"
        sentence = f"no DPO config of TRL, Axolotl or LLaMA-Factory: it has neither {wanted}"
        raise InputError([Problem(name, None, None, sentence)])
    _need(name, theirs, "rl", ("dpo", "ipo"), "Axolotl")
    return dialects().axolotl


def _need(name: str, theirs: Mapping[str, Tree], key: str, values: Sequence[str], title: str) -> None:
    """Raises InputError unless a key says that the config is for DPO."""
    if theirs.get(key) not in values:
        value = f"`{key}: {theirs[key]}`" if key in theirs else f"no `{key}`"
        sentence = f"this {title} config has {value}; `{key}: {'` or `'.join(values)}` can be read"
        raise InputError([Problem(name, None, key, sentence)])


def _translated(
    document: YamlDocument, theirs: Mapping[str, Tree], dialect: Dialect
) -> tuple[dict[str, _Entry], list[str]]:
    """Entries by our keys, in the order of our config, and one line for each key without a counterpart."""
    entries, left_out = dict(_of_many_keys(document, theirs, dialect)), dict[str, str]()
    data = data_set(document, theirs)
    if data is not None:
        entries["users.path"] = _Entry(data.path, document.place(data.place), data.comment)
    handled = {*dialect.keys, *dialect.batch, *(data.whole if data is not None else ())}
    for key, value in theirs.items():
        if key not in handled and value not in dialect.same.get(key, ()):
            left_out[key] = _reason(key)
    for key, ours in dialect.keys.items():
        if key in theirs:
            try:
                value = _read(ours, theirs[key], dialect)
            except NoCounterpart as why:
                left_out[key] = str(why)
                continue
            entries.setdefault(ours, _Entry(value, document.place((key,)), key))
    if "users.path" not in entries:
        sentence = "no data set is named, so there are no preference pairs; write one in"
        raise InputError([Problem(document.name, None, dialect.dataset, sentence)])
    here = document.place(())
    output = str(theirs.get("output_dir") or Path(document.name).stem)
    entries.setdefault("name", _Entry(_as_name(output.rstrip("/").split("/")[-1]), here, "names the run"))
    policy = _BUNDLED.get(str(theirs.get("model_name_or_path", theirs.get("base_model"))), _POLICY)
    entries["policy.documents"] = _Entry([policy], here, "theirs names no policy; this is the shipped tier one")
    unread = {ours for key, ours in dialect.keys.items() if key in left_out}
    for ours in dialect.defaults.keys() - unread:
        entries.setdefault(ours, _Entry(dialect.defaults[ours], here, f"default of {dialect.title}"))
    if not theirs.get(dialect.adapter) and "dpo.learning_rate" in entries:
        rate = entries["dpo.learning_rate"]
        comment = f"{rate.comment}; theirs trains whole models, and LoRA wants about ten times that"
        entries["dpo.learning_rate"] = rate._replace(comment=comment)
    users = entries["users.path"]
    entries["users.path"] = users._replace(comment=f"{users.comment}; its rows need a `user_id`")
    ordered = {key: entries[key] for key in _our_keys() if key in entries}
    return ordered, [f"{key}: {left_out[key]}" for key in theirs if key in left_out]


def _our_keys() -> Iterator[str]:
    """The keys of our config, in its order."""
    for name, field in Config.model_fields.items():
        section = getattr(field.annotation, "model_fields", {})
        yield from [f"{name}.{key}" for key in section] or [name]


def _of_many_keys(document: YamlDocument, theirs: Mapping[str, Tree], dialect: Dialect) -> Iterator[tuple[str, _Entry]]:
    """Entries that several keys decide: the pairs of a step, and `lora.alpha` as a multiple of the rank."""
    counts = {key: theirs.get(key, default) for key, default in dialect.batch.items()}
    wrong = [key for key, count in counts.items() if type(count) is not int]
    product = counts[wrong[0]] if wrong else math.prod(counts.values())  # type: ignore[arg-type]
    comment = " x ".join(f"{key} {count}" for key, count in counts.items())
    yield "dpo.pairs_per_step", _Entry(product, document.place(tuple(wrong[:1] or counts)[:1]), comment)
    theirs_of = {ours: key for key, ours in dialect.keys.items()}
    rank = theirs.get(theirs_of["lora.rank"], dialect.defaults.get("lora.rank"))
    if dialect.alpha_per_rank is not None and theirs_of["lora.alpha"] not in theirs and isinstance(rank, int):
        comment = f"default of {dialect.title}: {dialect.alpha_per_rank} x rank"
        yield "lora.alpha", _Entry(dialect.alpha_per_rank * rank, document.place(()), comment)


def _check(name: str, entries: Mapping[str, _Entry]) -> list[Problem]:
    """Problems of these values in our config, with the lines of the other file."""
    tree: dict[str, Tree] = {}
    places: dict[KeyPath, SourceLocation] = {(): SourceLocation(name, None)}
    for key, entry in entries.items():
        section, _, field = key.rpartition(".")
        at = tree.setdefault(section, {}) if section else tree
        assert isinstance(at, dict)
        at[field] = entry.value
        places[tuple(key.split("."))] = entry.place
    return check_section(Config, YamlDocument(name, tree, places, []))[1]


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
    """A value on one line; a text has no quotes if YAML reads it back unchanged."""
    if isinstance(value, str) and value:
        try:
            if parse_yaml(f"- {value} #", "").tree == [value]:
                return value
        except InputError:
            pass
    return json.dumps(value, ensure_ascii=False)
