"""A model and its tokenizer from their files: a transformers folder, or a `.gguf` file of llama.cpp.

A `.gguf` file is read by transformers with the package `gguf`. Its numbers are data: nothing of it is run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils.logging import disable_progress_bar

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import GGUF_REMEDY
from persona_rlhf.models.base_folder import cannot_load

_MAGIC = b"GGUF"
_SAFE = {"local_files_only": True, "trust_remote_code": False}


class ReadModel(NamedTuple):
    """A model, and the names of its weights that the files lack."""

    model: PreTrainedModel
    missing: Collection[str]


def read_model(name: str, place: Path, dtype: torch.dtype, storage: Mapping[str, Any]) -> ReadModel:
    """The model of a folder or of a `.gguf` file. `storage` are transformers' options of quantized storage.

    Raises InputError for files that transformers cannot load.
    """
    disable_progress_bar()
    if place.is_file():
        return _dequantized(name, place, dtype, storage)
    options = {"dtype": dtype, "use_safetensors": True, **storage}
    return _loaded(name, place, options)


def _loaded(name: str, folder: Path, options: Mapping[str, Any]) -> ReadModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **_SAFE, **options)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as fault:  # any other exception of transformers is caused by the files
        raise cannot_load(name, fault) from fault
    return ReadModel(loaded[0], loaded[1]["missing_keys"])


def _dequantized(name: str, file: Path, dtype: torch.dtype, storage: Mapping[str, Any]) -> ReadModel:
    """The model of a `.gguf` file, dequantized in float32 and rounded once to `dtype`.

    transformers marks such a model as quantized and refuses to save it. So its weights go into a model that is made
    of the config alone.
    """
    if storage:
        sentence = "a .gguf file cannot be stored as nf4; name a transformers folder, such as `base get` writes"
        raise InputError([Problem("config", None, "base.quantization", sentence)])
    _check_gguf(name, file)
    with _without_bar():
        read, missing = _loaded(name, file.parent, {"dtype": torch.float32, "gguf_file": file.name})
    model: Any = AutoModelForCausalLM.from_config(_unquantized(read.config), dtype=dtype, trust_remote_code=False)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return ReadModel(model, missing)


@contextmanager
def _without_bar() -> Iterator[None]:
    """Switches off the bar of dequantizing, which `disable_progress_bar` leaves on."""
    reader: Any = modeling_gguf_pytorch_utils
    bar = reader.tqdm
    reader.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        reader.tqdm = bar


def read_tokenizer(name: str, place: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or of a `.gguf` file, with its chat template. Raises as `read_model` does."""
    options = dict[str, str]()
    if place.is_file():
        _check_gguf(name, place)
        place, options = place.parent, {"gguf_file": place.name}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, **_SAFE, **options)
    except Exception as fault:  # as above
        raise cannot_load(name, fault) from fault
    return tokenizer


def gguf_config(name: str, file: Path) -> PreTrainedConfig:
    """The shape of the model in a `.gguf` file, without its weights. Raises InputError as `read_model` does."""
    _check_gguf(name, file)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, **_SAFE)
    except Exception as fault:  # as above
        raise cannot_load(name, fault) from fault
    return _unquantized(config)


def _unquantized(config: PreTrainedConfig) -> PreTrainedConfig:
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _check_gguf(name: str, file: Path) -> None:
    """Raises InputError without the package `gguf`, and for a file that is no GGUF."""
    if find_spec("gguf") is None:
        raise InputError([Problem(name, None, "base.model", GGUF_REMEDY)])
    with file.open("rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            sentence = "this is no GGUF file, since it does not begin with the letters GGUF; download it again"
            raise InputError([Problem(name, None, "base.model", sentence)])
