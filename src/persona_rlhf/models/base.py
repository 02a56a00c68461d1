"""Load the frozen base; NF4 and FP8 storage; weight hash."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import disable_progress_bar

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import find, is_hub_id
from persona_rlhf.config.training import BaseSettings
from persona_rlhf.data.tokenize import turn_end

# ----------------------------------------------------------------------------------------------------
# Frozen linear layers stored and multiplied in eight bits: float8 e4m3, a scale for each output of the weight and for
# each row of what comes in (Micikevicius et al. 2022; the row-wise recipe), by torch's scaled product.
# ----------------------------------------------------------------------------------------------------

_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max
_SMALLEST = 1e-12  # a row of zeros has this scale
_MULTIPLE = 16  # widths that tensor cores take
_CAPABLE = (8, 9)  # compute capability of the first GPUs with such products


class Fp8Linear(nn.Module):
    """`y = x W^T + bias` with W and x rounded to eight bits; what it gives has the type of x.

    The way back is a product in eight bits too: the weight's scales go to the gradient before that is rounded.
    """

    def __init__(self, layer: nn.Linear | Conv1D, device: torch.device) -> None:
        super().__init__()
        exact = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        values, scale = rounded(exact.detach().to(device))
        self.out_features, self.in_features = exact.shape
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Buffer(scale)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(device), requires_grad=False)

    def forward(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        y: Tensor = _Product.apply(x.reshape(-1, self.in_features), self)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], self.out_features)

    def product(self, x: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows outputs"]:
        """What `forward` computes, without a gradient."""
        y = _product(x, self.weight, self.scale)
        return y if self.bias is None else y.add_(self.bias)

    def pulled_back(self, gradient: Float[Tensor, "rows outputs"]) -> Float[Tensor, "rows inputs"]:
        """The gradient of x from that of y."""
        ones = torch.ones(self.in_features, 1, device=gradient.device)
        return _product(gradient * self.scale.T.to(gradient.dtype), self.weight.T.contiguous(), ones)

    def dense(self) -> Float[Tensor, "outputs inputs"]:
        """The weight as it is stored, in float32."""
        return self.weight.float() * self.scale


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Fp8Linear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.pulled_back(gradient), None


def rounded(exact: Float[Tensor, "rows width"]) -> tuple[Float[Tensor, "rows width"], Float[Tensor, "rows 1"]]:
    """Each row over its scale, in eight bits, and the scales in float32: a row's largest entry is e4m3's largest."""
    scale = exact.abs().amax(1, keepdim=True).float().clamp_min(_SMALLEST) / _LARGEST
    return (exact / scale).to(_E4M3), scale


def _product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`x (scale weight)^T`. On a GPU torch gives bfloat16 only."""
    values, own = rounded(x)
    given = torch.bfloat16 if x.is_cuda else x.dtype
    row = F.ScalingType.RowWise
    y = F.scaled_mm(values, weight.T, own, row, scale.T, row, output_dtype=given)
    return y.to(x.dtype)


def to_fp8(model: PreTrainedModel, device: torch.device) -> None:
    """Stores the linear layers of the decoder so, on `device`, one after the other: all but the output head and those
    with a width that is no multiple of 16.

    Raises InputError on a GPU or with a torch without such products, and where no layer can be stored so.
    """
    if not hasattr(F, "scaled_mm"):
        sentence = f"torch {torch.__version__} has no products in eight bits: install 2.10, or leave this key away"
        raise InputError([Problem("config", None, "base.quantization", sentence)])
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _CAPABLE:
        sentence = "this GPU has no products in eight bits (compute capability 8.9 and up have): leave this key away"
        raise InputError([Problem("config", None, "base.quantization", sentence)])
    head = model.get_output_embeddings()
    found = [(name, m) for name, m in model.named_modules() if fits(m) and m is not head]
    if not found:
        sentence = "the base has no linear layer whose widths are multiples of 16: leave this key away"
        raise InputError([Problem("config", None, "base.quantization", sentence)])
    for name, layer in found:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Fp8Linear(layer, device))


def fits(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether this is a linear layer that can be stored so."""
    return (type(module) is nn.Linear or type(module) is Conv1D) and not any(
        width % _MULTIPLE for width in module.weight.shape
    )


# ----------------------------------------------------------------------------------------------------
# Frozen weights stored in fewer bits. In four: NormalFloat with double quantization (QLoRA, Dettmers et al. 2023), by
# bitsandbytes; what the layers compute is in the base's own type. In eight: see fp8.py. Only linear layers inside the
# decoder are.
# ----------------------------------------------------------------------------------------------------

_MOST = 0.15
"""Relative error of normal weights in NormalFloat; it should be 0.09. bitsandbytes 0.49 and 0.50 make 0.26 on a CPU."""


def nf4(dtype: torch.dtype, device: torch.device) -> BitsAndBytesConfig:
    """How transformers is asked for it. Raises InputError where bitsandbytes is not installed, or stores wrongly."""
    if find_spec("bitsandbytes") is None:
        sentence = "bitsandbytes is not installed: pip install 'persona-rlhf[nf4]', or leave this key away"
        raise InputError([Problem("config", None, "base.quantization", sentence)])
    if (error := _error(device)) > _MOST:
        sentence = (
            f"this bitsandbytes stores weights wrongly on {device.type} (relative error {error:.2f}, and not "
            "0.09): install bitsandbytes 0.48.2, or leave this key away"
        )
        raise InputError([Problem("config", None, "base.quantization", sentence)])
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _error(device: torch.device) -> float:
    """What storing a normal matrix changes, relative to it."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    normal = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    back = dequantize_4bit(*quantize_4bit(normal, quant_type="nf4", compress_statistics=True))
    return float((back - normal).norm() / normal.norm())


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D | Fp8Linear]:
    """Whether this is a linear layer, however its weights are stored, and not one of a kind of its own."""
    return type(module) in (nn.Linear, Conv1D) or is_quantized(module)


def is_quantized(module: nn.Module) -> bool:
    """Whether this is a linear layer whose weights are stored in fewer bits."""
    return isinstance(module, Fp8Linear) or _is_nf4(module)


def _is_nf4(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).__name__ == "Linear4bit"


def dense(layer: nn.Module) -> Float[Tensor, "outputs inputs"]:
    """The weight of a layer in four bits as it computes with it; one in eight multiplies as it is stored."""
    from bitsandbytes.functional import dequantize_4bit

    stored: Any = layer.weight  # bitsandbytes' own kind of parameter, which knows how to be read
    weight: Tensor = dequantize_4bit(stored, stored.quant_state)
    return weight


def one_kernel(model: nn.Module) -> None:
    """On a CPU bitsandbytes would change to another kernel, and its weights with it, where no gradient is asked for:
    what is judged is to be what was trained."""
    for module in model.modules():
        if _is_nf4(module):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - nn.Module types no flags


def hash_as(weights_hash: str, quantization: str | None) -> str:
    """The hash of a base that is used as stored so: what was measured on it holds of no other."""
    if quantization is None:
        return weights_hash
    return hashlib.sha256(f"{weights_hash} {quantization}".encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------
# The shared base: a frozen causal language model, its tokenizer, and the hash of its weights.
# ----------------------------------------------------------------------------------------------------


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
