"""Conversion of DPO configs of TRL and Axolotl to ours, for `config import`.

Keys with a counterpart are written out; every other key is named with the reason.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import is_hub_id
from persona_rlhf.config.experiment import Config
from persona_rlhf.config.loader import (
    KeyPath,
    Scalar,
    SourceLocation,
    Tree,
    YamlDocument,
    check_section,
    in_order,
    parse_yaml,
    read_yaml,
)


class NoCounterpart(Exception):  # noqa: N818 - no fault: the key is named, and the reading goes on
    """A value without a counterpart here; the message is the reason."""


class Dialect(NamedTuple):
    """The config keys of another trainer.

    `keys` maps each key to ours and to the reader of its value; earlier keys win. `batch` holds the keys whose product
    is `dpo.pairs_per_step`, with their defaults. `same` holds values that change nothing here, `defaults` the trainer's
    defaults by our keys. `adapter` is the key that switches adapters on, `dataset` the key of the pairs.
    """

    title: str
    keys: Mapping[str, tuple[str, Callable[[Tree], Tree]]]
    batch: Mapping[str, int]
    same: Mapping[str, tuple[Scalar, ...]]
    defaults: Mapping[str, Tree]
    adapter: str
    dataset: str


def reason(key: str) -> str:
    """The reason why a key has no counterpart."""
    return next((why for pattern, why in _REASONS.items() if re.fullmatch(pattern, key)), "nothing here does this")


def as_name(value: Tree) -> Tree:
    """A text as the name of an experiment, which also names a folder."""
    return re.sub(r"[^\w.-]+", "-", str(value)).lstrip(".-") or "imported"


def _as_it_is(value: Tree) -> Tree:
    return value


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
    if value is True or value in ("all-linear", ["all-linear"]):
        return "all-linear"
    return [value] if isinstance(value, str) else value


def _one_of(ours: str, names: Mapping[Scalar, str]) -> Callable[[Tree], Tree]:
    """A reader of values by their names here; a list of one value is that value."""

    def read(value: Tree) -> Tree:
        alone = value[0] if isinstance(value, list) and len(value) == 1 else value
        if isinstance(alone, list | dict) or alone not in names:
            raise NoCounterpart(f"{ours} is {', '.join(dict.fromkeys(names.values()))}")
        return names[alone]

    return read


_SCHEDULE = _one_of(
    "dpo.schedule",
    {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"},
)
_LOSS = _one_of("dpo.loss", {kind: kind for kind in ("sigmoid", "ipo", "hinge", "robust", "sigmoid_norm")})
_DTYPE = _one_of(
    "base.dtype",
    {"auto": "auto", "bfloat16": "bfloat16", "float32": "float32", True: "bfloat16", False: "float32"},
)

TRL = Dialect(
    title="TRL",
    keys={
        "run_name": ("name", as_name),
        "seed": ("seed", _as_it_is),
        "model_name_or_path": ("base.model", _as_it_is),
        "dtype": ("base.dtype", _DTYPE),
        "torch_dtype": ("base.dtype", _DTYPE),
        "bf16": ("base.dtype", _DTYPE),
        "dataset_name": ("users.path", _as_it_is),
        "lora_r": ("lora.rank", _as_it_is),
        "lora_alpha": ("lora.alpha", _whole),
        "lora_target_modules": ("lora.target_modules", _modules),
        "loss_type": ("dpo.loss", _LOSS),
        "beta": ("dpo.beta", _number),
        "num_train_epochs": ("dpo.epochs", _whole),
        "learning_rate": ("dpo.learning_rate", _number),
        "warmup_ratio": ("dpo.warmup", _share),
        "warmup_steps": ("dpo.warmup", _share),
        "lr_scheduler_type": ("dpo.schedule", _SCHEDULE),
        "max_grad_norm": ("dpo.max_grad_norm", _clip),
        "weight_decay": ("dpo.weight_decay", _number),
        "label_smoothing": ("dpo.label_smoothing", _number),
        "output_dir": ("run.dir", _as_it_is),
    },
    batch={"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    same={
        "use_peft": (True,),
        "optim": ("adamw_torch", "adamw_torch_fused"),
        "disable_dropout": (True,),
        "lora_task_type": ("CAUSAL_LM",),
    },
    defaults={
        "seed": 42,
        "dpo.beta": 0.1,
        "dpo.epochs": 3,
        "dpo.learning_rate": 1e-6,
        "dpo.warmup": 0.0,
        "dpo.schedule": "linear",
    },
    adapter="use_peft",
    dataset="dataset_name",
)

AXOLOTL = Dialect(
    title="Axolotl",
    keys={
        "seed": ("seed", _as_it_is),
        "base_model": ("base.model", _as_it_is),
        "bf16": ("base.dtype", _DTYPE),
        "bfloat16": ("base.dtype", _DTYPE),
        "val_set_size": ("users.heldout", _share),
        "lora_r": ("lora.rank", _as_it_is),
        "lora_alpha": ("lora.alpha", _whole),
        "lora_target_modules": ("lora.target_modules", _modules),
        "lora_target_linear": ("lora.target_modules", _modules),
        "rl": ("dpo.loss", _one_of("dpo.loss", {"dpo": "sigmoid", "ipo": "ipo"})),
        "rl_beta": ("dpo.beta", _number),
        "dpo_beta": ("dpo.beta", _number),
        "num_epochs": ("dpo.epochs", _whole),
        "learning_rate": ("dpo.learning_rate", _number),
        "warmup_ratio": ("dpo.warmup", _share),
        "warmup_steps": ("dpo.warmup", _share),
        "lr_scheduler": ("dpo.schedule", _SCHEDULE),
        "max_grad_norm": ("dpo.max_grad_norm", _clip),
        "weight_decay": ("dpo.weight_decay", _number),
        "dpo_label_smoothing": ("dpo.label_smoothing", _number),
        "output_dir": ("run.dir", _as_it_is),
    },
    batch={"micro_batch_size": 1, "gradient_accumulation_steps": 1},
    same={"adapter": ("lora",), "optimizer": ("adamw_torch", "adamw_torch_fused")},
    defaults={"dpo.beta": 0.1, "dpo.epochs": 1, "dpo.schedule": "cosine"},
    adapter="adapter",
    dataset="datasets",
)

_REASONS = {
    "use_peft|adapter": "a user is a LoRA adapter over a frozen base",
    "gradient_checkpointing.*|activation_offloading|auto_find_batch_size": (
        "memory is bounded by fleet.slots and fleet.tokens_per_step"
    ),
    "deepspeed|fsdp.*|ddp_.*|parallelism_config|context_parallel_size|tensor_parallel_size": (
        "each process holds the whole base; fleet.processes says how many there are"
    ),
    "fp16|float16|tf32|half_precision_backend": "base.dtype is auto, bfloat16 or float32",
    "max_steps": "each user is trained for dpo.epochs passes over the user's pairs",
    "max_length|max_prompt_length|max_completion_length|truncation_mode|sequence_len|pad_to_.*|excess_length_.*": (
        "pairs are never cut; a pair longer than the base's context is left out and named"
    ),
    "lora_dropout|disable_dropout": "there is no dropout",
    "use_rslora|use_dora|peft_.*|peft|lora_.*|loraplus_.*": "adapters are plain LoRA on linear layers",
    "load_in_[48]bit|bnb_.*|use_bnb_.*|gptq|qlora_.*": "a base can be stored in four bits with base.quantization: nf4",
    "precompute_ref_.*|ref_model.*|sync_ref_model": "the reference is the frozen base, computed once for all users",
    "optim|optimizer|optim_.*|adam_.*": "the optimizer is AdamW with betas 0.9 and 0.999 and epsilon 1e-8",
    "lr_scheduler_kwargs|cosine_.*": "dpo.schedule has no further settings",
    "report_to|wandb_.*|mlflow_.*|comet_.*|trackio_.*|use_tensorboard|logging_.*|log_.*": (
        "every step is in RUN/metrics.jsonl, and the report shows the rest"
    ),
    "save_.*|saves_per_epoch|resume_from_checkpoint|auto_resume_.*|load_best_model_at_end": (
        "slots are saved every fleet.checkpoint_every steps; train --resume goes on"
    ),
    "(per_device_)?eval_.*|evals_per_epoch|do_eval|dataset_test_split|test_datasets|dataset_train_split": (
        "users.heldout, or `split` in a row, says which pairs are held out"
    ),
    "datasets": "users.path takes the first data set; put several files into one folder",
    "dataset_config|dataset_streaming|dataset_.*|dataloader_.*|shuffle_.*|remove_unused_columns": (
        "users.path is read once, row by row"
    ),
    "chat_template.*|special_tokens|tokenizer.*|pad_token|model_type|tokens|added_tokens.*": (
        "the base's tokenizer and chat template are used"
    ),
    "hub_.*|push_to_hub.*": "nothing leaves the machine",
    "trust_remote_code": "no code of a model is run",
    "attn_implementation|.*_attention|sample_packing.*|padding_free|group_by_length|.*liger_.*|plugins": (
        "the fleet packs rows itself"
    ),
    "model_revision|revision_of_model": "name a folder that holds that revision",
    "loss_weights|f_divergence_type|f_alpha_.*|ld_alpha|use_weighting|rpo_alpha|dpo_.*|discopop_tau": (
        "dpo.loss is sigmoid, ipo, hinge, robust or sigmoid_norm, alone"
    ),
}


_POLICY = "configs/policy/tier_one.yaml"
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
    """Reads a DPO config of TRL or Axolotl. Raises InputError if it is neither, or has an impossible value."""
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
    lines = [f"# {path.name}, a DPO config of {dialect.title}. A comment names the key that each value comes from."]
    lines += _yaml(entries)
    if left_out:
        lines += ["", f"# Keys of {path.name} without a counterpart:", *(f"#   {_one_line(line)}" for line in left_out)]
    return ImportedConfig("\n".join(lines) + "\n", left_out)


def write_new(text: str, out: Path) -> None:
    """Writes a text to a new file. Raises InputError if it exists, or its folder does not."""
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        sentence = "this file exists already and is not overwritten; name a new file"
        raise InputError([Problem(str(out), None, None, sentence)]) from None
    except (FileNotFoundError, NotADirectoryError):
        raise InputError([Problem(str(out), None, None, "this folder does not exist; make it first")]) from None


def _dialect(name: str, theirs: Mapping[str, Tree]) -> Dialect:
    """The trainer that a config is for. Raises InputError if it is neither TRL nor Axolotl."""
    if "model_name_or_path" in theirs:
        return TRL
    if "base_model" not in theirs:
        wanted = "`model_name_or_path` (TRL), nor `base_model` and `rl: dpo` (Axolotl)"
        raise InputError([Problem(name, None, None, f"no DPO config of TRL or Axolotl: it has neither {wanted}")])
    if theirs.get("rl") not in ("dpo", "ipo"):
        value = f"`rl: {theirs['rl']}`" if "rl" in theirs else "no `rl`"
        raise InputError([Problem(name, None, "rl", f"this Axolotl config has {value}; `rl: dpo` or ipo can be read")])
    return AXOLOTL


def _translated(
    document: YamlDocument, theirs: Mapping[str, Tree], dialect: Dialect
) -> tuple[dict[str, _Entry], list[str]]:
    """Entries by our keys, in the order of our config, and one line for each key without a counterpart."""
    entries, left_out = dict(_of_many_keys(document, theirs, dialect)), dict[str, str]()
    handled = {*dialect.keys, *dialect.batch, *_datasets_in_one(theirs)}
    for key, value in theirs.items():
        if key not in handled and value not in dialect.same.get(key, ()):
            left_out[key] = reason(key)
    for key, (ours, read) in dialect.keys.items():
        if key in theirs:
            try:
                value = read(theirs[key])
            except NoCounterpart as why:
                left_out[key] = str(why)
                continue
            entries.setdefault(ours, _Entry(value, document.place((key,)), key))
    if "users.path" not in entries:
        sentence = "no data set is named, so there are no preference pairs; write one in"
        raise InputError([Problem(document.name, None, dialect.dataset, sentence)])
    here = document.place(())
    output = str(theirs.get("output_dir") or Path(document.name).stem)
    entries.setdefault("name", _Entry(as_name(output.rstrip("/").split("/")[-1]), here, "names the run"))
    entries["policy.documents"] = _Entry([_POLICY], here, "theirs names no policy; this is the shipped tier one")
    unread = {ours for key, (ours, _) in dialect.keys.items() if key in left_out}
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
    """Entries that several keys decide: the pairs of a step, and the first of several data sets."""
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
    """`datasets`, if it only names one path."""
    sets = theirs.get("datasets")
    plain = isinstance(sets, list) and len(sets) == 1 and isinstance(sets[0], dict) and set(sets[0]) == {"path"}
    return ["datasets"] if plain else []


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
