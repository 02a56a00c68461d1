"""The first data set that a config of another trainer names, for `config import`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from persona_rlhf.config.loader import KeyPath, Tree, YamlDocument


class NamedDataSet(NamedTuple):
    """A path or hub id, the keys that name it, and the comment beside it.

    `whole` are keys of which nothing is left out: they name this data set alone.
    """

    path: Tree
    place: KeyPath
    comment: str
    whole: Sequence[str]


def data_set(document: YamlDocument, theirs: Mapping[str, Tree]) -> NamedDataSet | None:
    """The first data set of `datasets`, `dataset_mixture`, `dataset_mixer` or LLaMA-Factory's `dataset`; else None."""
    sets, mixture, mixer = theirs.get("datasets"), theirs.get("dataset_mixture"), theirs.get("dataset_mixer")
    if isinstance(sets, list) and sets and isinstance(sets[0], dict) and "path" in sets[0]:
        first = sets[0]
        field = "data_files" if isinstance(first.get("data_files"), str) else "path"
        whole = ["datasets"] if len(sets) == 1 and set(first) == {"path"} else []
        return NamedDataSet(first[field], ("datasets", 0, field), f"datasets[0].{field}", whole)
    if isinstance(mixture, dict) and isinstance(listed := mixture.get("datasets"), list) and listed:
        first = listed[0]
        if isinstance(first, dict) and "id" in first:
            whole = ["dataset_mixture"] if len(listed) == len(first) == len(mixture) == 1 else []
            place: KeyPath = ("dataset_mixture", "datasets", 0, "id")
            return NamedDataSet(first["id"], place, "dataset_mixture.datasets[0].id", whole)
    if isinstance(mixer, dict) and mixer:
        name = next(iter(mixer))
        whole = ["dataset_mixer"] if len(mixer) == 1 and mixer[name] == 1 else []
        return NamedDataSet(name, ("dataset_mixer", name), "dataset_mixer", whole)
    return _of_llama_factory(theirs)


_COLUMNS = {  # of dataset_info.json, with the names that rows are read by
    "prompt": ("prompt", "instruction", "question"),
    "query": ("input",),
    "messages": ("conversations", "messages"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "system": ("system",),
    "history": ("history",),
}


def _of_llama_factory(theirs: Mapping[str, Tree]) -> NamedDataSet | None:
    """The file or hub id of a name in `dataset_dir`/dataset_info.json; the name itself if that file is not here."""
    names = theirs.get("dataset")
    listed = names.split(",") if isinstance(names, str) else names
    if not isinstance(listed, list) or not listed:
        return None
    name, folder = str(listed[0]).strip(), Path(str(theirs.get("dataset_dir", "data")))
    whole = ["dataset_dir", *(["dataset"] if len(listed) == 1 else [])]
    if theirs.get("dataset_dir") == "ONLINE":
        return NamedDataSet(name, ("dataset",), "dataset", whole)
    info = folder / "dataset_info.json"
    try:
        entry = json.loads(info.read_text(encoding="utf-8"))[name]
        path = entry["hf_hub_url"] if "hf_hub_url" in entry else str(folder / entry["file_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return NamedDataSet(name, ("dataset",), f"dataset, a name in {info}; write the path of its file here", whole)
    renamed = ", ".join(_renamed(entry.get("columns")))
    remedy = f"; rename its columns {renamed}" if renamed else ""
    return NamedDataSet(path, ("dataset",), f"dataset `{name}` of {info}{remedy}", whole)


def _renamed(columns: Any) -> list[str]:
    """The columns that rows are not read by under their names, each with the name to give them."""
    pairs = columns.items() if isinstance(columns, dict) else ()
    return [f"`{name}` to `{_COLUMNS[ours][0]}`" for ours, name in pairs if name not in _COLUMNS.get(ours, (name,))]
