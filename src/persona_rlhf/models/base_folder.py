"""The folder of a model: where it is, and the reasons for which its files cannot be a frozen base.

No file is loaded here. A base is a whole model with its own full-precision weights, whose classes are in transformers:
no code of a model is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import LFS_REMEDY, find, is_gguf, is_hub_id, is_lfs_pointer

TOKENIZER_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
_INDEX = "model.safetensors.index.json"


def model_folder(model: str, patterns: list[str], key: str = "base.model") -> Path:
    """The folder of a model: a path, a shipped folder, or a hub snapshot of the files that match `patterns`.

    A base may also be a `.gguf` file: then its path. Raises InputError for any other file, and where there is nothing.
    """
    try:
        folder = find(model)
    except InputError:
        if not is_hub_id(model):
            raise
    else:
        if folder.is_file() and not (is_gguf(folder) and key == "base.model"):
            sentence = "this is a file; name the folder of a whole model"
            raise InputError([Problem(model, None, key, sentence)])
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, OSError) as fault:
        sentence = "no such folder here, and the hub does not give it; check the id, the network and HF_TOKEN"
        raise InputError([Problem(model, None, key, sentence)]) from fault


def weight_files(model: str, folder: Path, key: str = "base.model") -> list[Path]:
    """The weights of a model, sorted by name. Raises InputError if there are none, with every reason if several."""
    if is_gguf(folder) and folder.is_file():
        return [folder]
    weights = sorted(folder.glob("*.safetensors"))
    reasons = list(_reasons(folder, weights))
    if not weights and not reasons:
        reasons = [
            f"the folder holds no .safetensors weights; only safetensors are loaded, never pickles{_below(folder)}"
        ]
    if reasons:
        raise InputError([Problem(model, None, key, reason) for reason in reasons])
    return weights


def _reasons(folder: Path, weights: list[Path]) -> Iterator[str]:
    if (folder / "adapter_config.json").is_file():
        trained_on = _json(folder / "adapter_config.json").get("base_model_name_or_path")
        remedy = "merge it into its base first (PEFT's merge_and_unload), save that, and name the new folder"
        yield f"this is an adapter over `{trained_on}`, not a whole model; {remedy}"
    for file in (*weights, *(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern))):
        if is_lfs_pointer(file):
            yield f"{file.name}: {LFS_REMEDY}"
    listed = _json(folder / _INDEX).get("weight_map")
    shards = {name for name in listed.values() if isinstance(name, str)} if isinstance(listed, dict) else set[str]()
    if absent := sorted(shards - {file.name for file in weights}):
        yield f"the folder lacks {absent[0]}, one of {len(absent)} files that {_INDEX} names; download it again"
    yield from config_reasons(_json(folder / "config.json"))


def config_reasons(config: Mapping[str, Any]) -> Iterator[str]:
    """The reasons that the content of config.json gives."""
    if stored := config.get("quantization_config"):
        method = stored.get("quant_method", "unknown") if isinstance(stored, dict) else "unknown"
        yield (
            f"its weights are stored quantized ({method}), and a base needs its full-precision weights; name the "
            "unquantized model, and set base.quantization to store it in fewer bits"
        )
    if config.get("auto_map") and config.get("model_type") not in CONFIG_MAPPING:
        yield _OWN_CODE


_OWN_CODE = (
    "this model needs Python code of its own, and no code of a model is run; take a model whose architecture is in "
    "transformers"
)


def cannot_load(model: str, fault: Exception, key: str = "base.model") -> InputError:
    """The problem of a model that transformers cannot load, in one sentence."""
    text = (str(fault).strip() or type(fault).__name__).splitlines()[0]
    if "trust_remote_code" in str(fault):
        sentence = _OWN_CODE
    elif type(fault).__name__ == "SafetensorError":
        sentence = f"a weights file is not whole ({text}); download it again"
    else:
        sentence = f"transformers cannot load it ({text})"
    return InputError([Problem(model, None, key, sentence)])


def _below(folder: Path) -> str:
    """A hint at a checkpoint inside the folder that has weights."""
    inside = next(iter(sorted(folder.glob("*/*.safetensors"))), None)
    return "" if inside is None else f"; there are some in {inside.parent.name}/"


def _json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none. A file that is wrong is transformers' to report."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
