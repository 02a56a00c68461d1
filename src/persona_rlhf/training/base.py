"""The shared base: a frozen causal language model, its tokenizer, and the hash of its weights."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from persona_rlhf.inputs.bundled import find, is_hub_id
from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.preferences.template import turn_end
from persona_rlhf.training.fp8 import to_fp8
from persona_rlhf.training.quantized import hash_as, nf4, one_kernel
from persona_rlhf.training.settings import BaseSettings


@dataclass(frozen=True)
class Base:
    """`name` is what the config calls it; `weights_hash` the sha256 over its safetensors files, and over how they are
    stored in memory where that changes them; `context` in tokens."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    weights_hash: str
    context: int

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, first the one that the chat template ends a turn with: generation config and
        tokenizer need not know of it."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        known = [configured] if isinstance(configured, int) else list(configured or [])
        own = getattr(self.tokenizer, "eos_token_id", None)
        return tuple(dict.fromkeys(end for end in (self._turn_end, own, *known) if isinstance(end, int)))

    @cached_property
    def _turn_end(self) -> int | None:
        return turn_end(self.tokenizer) if getattr(self.tokenizer, "chat_template", None) else None

    @property
    def pad_id(self) -> int:
        """Fills rows to their right, where nothing looks: any id will do, so a tokenizer without one is no problem."""
        own = getattr(self.tokenizer, "pad_token_id", None)
        return own if isinstance(own, int) else next(iter(self.eos_ids), 0)


def load_base(settings: BaseSettings) -> Base:
    """Loads `base.model`, a folder or a hub id, frozen and in eval mode, onto `base.device`.

    Raises InputError where there is no such device or model, no safetensors weights, no chat template or no end token.
    """
    folder = _folder(settings.model, [*_TOKENIZER, "*.safetensors"])
    problems = []
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise _no_weights(settings.model)
    device = device_of(settings)
    dtype = precision(settings, device)
    packed = settings.quantization == "nf4"
    stored = {"quantization_config": nf4(dtype, device), "device_map": {"": device}} if packed else {}
    disable_progress_bar()
    tokenizer = _tokenizer(settings.model, folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, **stored
        )
    except (OSError, ValueError, KeyError, SafetensorError) as fault:
        raise _not_loaded(settings.model, fault) from fault
    model.generation_config.eos_token_id = model.generation_config.eos_token_id or tokenizer.eos_token_id
    if not tokenizer.chat_template:
        sentence = "the tokenizer has no chat template; use a chat model, or add `chat_template` to its tokenizer files"
        problems.append(Problem(settings.model, None, "base.model", sentence))
    if tokenizer.eos_token_id is None:
        sentence = "the tokenizer has no end token, so no answer would ever end; set `eos_token` in its tokenizer files"
        problems.append(Problem(settings.model, None, "base.model", sentence))
    if problems:
        raise InputError(problems)
    model.requires_grad_(False).eval()
    if packed:
        one_kernel(model)
    else:
        if settings.quantization == "fp8":
            to_fp8(model, device)
        model.to(device)  # type: ignore[arg-type]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    weights_sha256 = hash_as(_hash(weights), settings.quantization)
    return Base(model, tokenizer, settings.model, weights_sha256, min(int(context), sys.maxsize))


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a base, a folder or a hub id, without its weights. Raises InputError where there is none."""
    return _tokenizer(model, _folder(model, _TOKENIZER))


def _tokenizer(model: str, folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as fault:
        raise _not_loaded(model, fault) from fault
    return tokenizer


def _not_loaded(model: str, fault: Exception) -> InputError:
    sentence = f"transformers cannot load it ({str(fault).splitlines()[0]})"
    return InputError([Problem(model, None, "base.model", sentence)])


def device_of(settings: BaseSettings) -> torch.device:
    """The GPU where there is one; of several, the one with the number that a launcher of processes gave to this one.

    Apple's GPUs count as none: losses and bounds are added up in float64, which they do not have. Raises InputError
    where a GPU is asked for and there is none.
    """
    if settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        sentence = "torch finds no CUDA device here; write auto or cpu, or install a torch with CUDA"
        raise InputError([Problem("config", None, "base.device", sentence)])
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def precision(settings: BaseSettings, device: torch.device) -> torch.dtype:
    """The type of the frozen weights. On a GPU it also says what float32 products are made in, which are the adapters':
    in TF32 over a bfloat16 base, whose states have fewer bits than that, and in float32 over a float32 base."""
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = auto if settings.dtype == "auto" else getattr(torch, settings.dtype)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if dtype == torch.bfloat16 else "highest")
    return dtype


def weights_hash(settings: BaseSettings) -> str:
    """The hash of a base's weights, without loading them. Raises InputError where it has none."""
    weights = sorted(_folder(settings.model, ["*.safetensors"]).glob("*.safetensors"))
    if not weights:
        raise _no_weights(settings.model)
    return hash_as(_hash(weights), settings.quantization)


def _no_weights(model: str) -> InputError:
    sentence = "the folder holds no .safetensors weights; only safetensors are loaded, never pickles"
    return InputError([Problem(model, None, "base.model", sentence)])


_TOKENIZER = ["*.json", "*.jinja", "*.model", "*.txt"]


def _folder(model: str, wanted: list[str]) -> Path:
    """The folder of a model: a path, a shipped folder, or a hub snapshot of the files `wanted`."""
    try:
        return find(model)
    except InputError:
        if not is_hub_id(model):
            raise
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, OSError) as fault:
        sentence = "no such folder here, and the hub does not give it; check the id, the network and HF_TOKEN"
        raise InputError([Problem(model, None, "base.model", sentence)]) from fault


def _hash(files: list[Path]) -> str:
    """sha256 over the names and bytes of the weight files, in their order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
