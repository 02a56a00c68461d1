"""The frozen base model and its tokenizer: loading, storage in 4 (NF4) or 8 bits (FP8), and the hash of its weights."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import jinja2
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.config.training import BaseSettings
from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import render, turn_end
from persona_rlhf.models.base_folder import TOKENIZER_FILES, model_folder, weight_files
from persona_rlhf.models.model_files import read_model, read_tokenizer

_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max
_SMALLEST = 1e-12  # a row of zeros has this scale
_MULTIPLE = 16  # widths that tensor cores take
_BFLOAT16 = (8, 0)  # compute capability of the first GPUs that multiply it; older ones emulate it
_CAPABLE = (8, 9)  # compute capability of the first GPUs with such products


class Fp8Linear(nn.Module):
    """A frozen linear layer stored and multiplied in float8 e4m3: `y = x W^T + bias` in the type of x.

    Every output of W and every row of x has its own scale (Micikevicius et al. 2022, row-wise scaling). The backward
    product is in float8 too: the scales of W go to the gradient before it is rounded.
    """

    def __init__(self, layer: nn.Linear | Conv1D, device: torch.device) -> None:
        super().__init__()
        exact = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        values, scale = quantize_rows(exact.detach().to(device))
        self.out_features, self.in_features = exact.shape
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Buffer(scale)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(device), requires_grad=False)

    def forward(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        y: Tensor = _Fp8Product.apply(x.reshape(-1, self.in_features), self)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], self.out_features)

    def product(self, x: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows outputs"]:
        """The output of `forward`, outside of autograd."""
        y = _fp8_product(x, self.weight, self.scale)
        return y if self.bias is None else y.add_(self.bias)

    def input_gradient(self, gradient: Float[Tensor, "rows outputs"]) -> Float[Tensor, "rows inputs"]:
        """Gradient of x from that of y."""
        ones = torch.ones(self.in_features, 1, device=gradient.device)
        return _fp8_product(gradient * self.scale.T.to(gradient.dtype), self.weight.T.contiguous(), ones)


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Fp8Linear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.input_gradient(gradient), None


def quantize_rows(exact: Float[Tensor, "rows width"]) -> tuple[Float[Tensor, "rows width"], Float[Tensor, "rows 1"]]:
    """Rows in float8 and their scales in float32. A row's largest entry becomes the largest number of e4m3."""
    scale = exact.abs().amax(1, keepdim=True).float().clamp_min(_SMALLEST) / _LARGEST
    return (exact / scale).to(_E4M3), scale


def _fp8_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`x (scale weight)^T`. On a GPU torch's output is bfloat16 only."""
    values, row_scale = quantize_rows(x)
    output_dtype = torch.bfloat16 if x.is_cuda else x.dtype
    row_wise = F.ScalingType.RowWise
    y = F.scaled_mm(values, weight.T, row_scale, row_wise, scale.T, row_wise, output_dtype=output_dtype)
    return y.to(x.dtype)


def to_fp8(model: PreTrainedModel, device: torch.device) -> None:
    """Replaces the linear layers of the decoder by `Fp8Linear` on `device`, one after the other.

    The output head and layers with a width that is no multiple of 16 stay as they are. Raises InputError without
    hardware or a torch for float8 products, and where no layer can be stored in float8.
    """
    if not hasattr(F, "scaled_mm"):
        sentence = f"torch {torch.__version__} has no float8 products: install 2.10, or remove this key"
        raise InputError([Problem("config", None, "base.quantization", sentence)])
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _CAPABLE:
        sentence = "this GPU has no float8 products (they need compute capability 8.9): remove this key"
        raise InputError([Problem("config", None, "base.quantization", sentence)])
    head = model.get_output_embeddings()
    layers = [(name, m) for name, m in model.named_modules() if fits_fp8(m) and m is not head]
    if not layers:
        sentence = "the base has no linear layer whose widths are multiples of 16: remove this key"
        raise InputError([Problem("config", None, "base.quantization", sentence)])
    for name, layer in layers:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Fp8Linear(layer, device))


def fits_fp8(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether a module is a linear layer that can be stored in float8."""
    return (type(module) is nn.Linear or type(module) is Conv1D) and not any(
        width % _MULTIPLE for width in module.weight.shape
    )


_NF4_MAX_ERROR = 0.15
"""Largest accepted relative error of normal weights in NF4. It should be 0.09; on a CPU bitsandbytes 0.49 and
0.50 have 0.26."""


def nf4_config(dtype: torch.dtype, device: torch.device) -> BitsAndBytesConfig:
    """Settings of transformers for NF4 with double quantization (QLoRA, Dettmers et al. 2023); `dtype` is computed in.

    Raises InputError where bitsandbytes is not installed or quantizes wrongly.
    """
    if find_spec("bitsandbytes") is None:
        sentence = "bitsandbytes is not installed: pip install 'persona-rlhf[nf4]', or remove this key"
        raise InputError([Problem("config", None, "base.quantization", sentence)])
    if (error := _nf4_error(device)) > _NF4_MAX_ERROR:
        sentence = (
            f"this bitsandbytes quantizes wrongly on {device.type} (relative error {error:.2f} instead of "
            "0.09): install bitsandbytes 0.48.2, or remove this key"
        )
        raise InputError([Problem("config", None, "base.quantization", sentence)])
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _nf4_error(device: torch.device) -> float:
    """Relative error of a normal matrix after NF4 and back."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    normal = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    restored = dequantize_4bit(*quantize_4bit(normal, quant_type="nf4", compress_statistics=True))
    return float((restored - normal).norm() / normal.norm())


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D | Fp8Linear]:
    """Whether a module is a linear layer, quantized or not. Other subclasses of `nn.Linear` do not count."""
    return type(module) in (nn.Linear, Conv1D) or is_quantized(module)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a linear layer stored in NF4 or FP8."""
    return isinstance(module, Fp8Linear) or _is_nf4(module)


def _is_nf4(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).__name__ == "Linear4bit"


def dequantize(layer: nn.Module) -> Float[Tensor, "outputs inputs"]:
    """The weight of an NF4 layer in the type that it computes in."""
    from bitsandbytes.functional import dequantize_4bit

    stored: Any = layer.weight  # bitsandbytes' own parameter class
    weight: Tensor = dequantize_4bit(stored, stored.quant_state)
    return weight


def pin_nf4_kernel(model: nn.Module) -> None:
    """Keeps bitsandbytes to one kernel on a CPU.

    Otherwise it takes another kernel and weight layout in inference: the judged model would not be the trained one.
    """
    for module in model.modules():
        if _is_nf4(module):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - nn.Module types no flags


def quantized_hash(weights_hash: str, quantization: str | None) -> str:
    """Hash of a base in the given storage. Measurements on it are not valid for other storage."""
    if quantization is None:
        return weights_hash
    return hashlib.sha256(f"{weights_hash} {quantization}".encode()).hexdigest()


@dataclass(frozen=True)
class Base:
    """The shared base: a frozen causal language model and its tokenizer.

    name: `base.model` of the config
    weights_hash: sha256 over the safetensors files, and over the quantization if there is one
    context: longest input, in tokens
    """

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
        """Tokens that end an answer, first the one that ends a turn in the chat template.

        The generation config and the tokenizer may lack that one.
        """
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        listed = [configured] if isinstance(configured, int) else list(configured or [])
        tokenizer_eos = getattr(self.tokenizer, "eos_token_id", None)
        return tuple(dict.fromkeys(end for end in (self._turn_end, tokenizer_eos, *listed) if isinstance(end, int)))

    @cached_property
    def _turn_end(self) -> int | None:
        return turn_end(self.tokenizer) if getattr(self.tokenizer, "chat_template", None) else None

    @property
    def pad_id(self) -> int:
        """Token that pads rows on their right. Causal attention never reads it, so any id will do."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return pad if isinstance(pad, int) and pad < _embedding_rows(self.model) else next(iter(self.eos_ids), 0)


class BaseConditions(NamedTuple):
    """The computation of a base: type of its weights, attention, and device."""

    dtype: str
    attention: str
    device: str


def conditions_of(base: Base) -> BaseConditions:
    """The computation of a loaded base."""
    model = base.model
    attention = str(model.config._attn_implementation)
    return BaseConditions(str(model.dtype).removeprefix("torch."), attention, base.device.type)


def load_base(settings: BaseSettings) -> Base:
    """Loads `base.model`, a folder, a `.gguf` file or a hub id, frozen and in eval mode, onto `base.device`.

    Raises InputError for a missing device or model, and for a model that cannot be a base: without safetensors weights,
    chat template or end token, an adapter, quantized weights, code of its own, missing weights, or a tokenizer that
    knows more tokens than the model.
    """
    folder = model_folder(settings.model, [*TOKENIZER_FILES, "*.safetensors"])
    weights = weight_files(settings.model, folder)
    device = select_device(settings)
    dtype = select_dtype(settings, device)
    nf4 = settings.quantization == "nf4"
    storage = {"quantization_config": nf4_config(dtype, device), "device_map": {"": device}} if nf4 else {}
    tokenizer = read_tokenizer(settings.model, folder)
    model, missing = read_model(settings.model, folder, dtype, storage)
    reasons = [*_missing_weights(missing), *_tokenizer_reasons(tokenizer, model)]
    if reasons:
        raise InputError([Problem(settings.model, None, "base.model", reason) for reason in reasons])
    model.generation_config.eos_token_id = model.generation_config.eos_token_id or tokenizer.eos_token_id
    model.requires_grad_(False).eval()
    model.get_output_embeddings().register_forward_pre_hook(_contiguous_input)
    if nf4:
        pin_nf4_kernel(model)
    else:
        if settings.quantization == "fp8":
            to_fp8(model, device)
        model.to(device)  # type: ignore[arg-type]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    weights_sha256 = quantized_hash(_hash(weights), settings.quantization)
    return Base(model, tokenizer, settings.model, weights_sha256, min(int(context), sys.maxsize))


def _contiguous_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copies the hidden states of last tokens, which transformers cuts out of the whole.

    torch.nn.functional.linear of such a cut copies the weights for each row on a CPU: in bfloat16 over 49,152 tokens it
    takes hundreds of times longer, and 55 MiB a row.
    """
    return tuple(each.contiguous() for each in inputs)


def _missing_weights(missing: Collection[str]) -> Iterator[str]:
    """The reason where transformers filled weights with random numbers, since no file holds them."""
    if missing:
        sentence = f"its files lack {len(missing)} of the model's weights, such as `{min(missing)}`"
        yield f"{sentence}; name the folder of the whole model"


def _tokenizer_reasons(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Iterator[str]:
    """The reasons for which a tokenizer does not fit its model.

    A padding token alone may lie beyond the embedding: rows are padded with any token (`Base.pad_id`).
    """
    if not tokenizer.chat_template:
        yield "the tokenizer has no chat template; use a chat model, or add `chat_template` to its tokenizer files"
    if tokenizer.eos_token_id is None:
        yield "the tokenizer has no end token, so no answer would ever end; set `eos_token` in its tokenizer files"
    rows = _embedding_rows(model)
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    pad = str(tokenizer.pad_token)
    if pad in beyond and pad != tokenizer.eos_token and pad not in _example(tokenizer):
        del beyond[pad]
    if beyond:
        first = min(beyond, key=lambda token: beyond[token])
        sentence = f"the tokenizer has {len(beyond)} tokens beyond the {rows:,} rows of the model's embedding, first"
        remedy = "enlarge the model (resize_token_embeddings) and train those rows, or use its first tokenizer"
        yield f"{sentence} `{first}` (id {beyond[first]:,}); {remedy}"


def _example(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template, and a conversation that it writes: templates put some of their tokens together."""
    try:
        written = render((Message("user", "Hello"),), tokenizer, "Yes") if tokenizer.chat_template else ""
    except jinja2.TemplateError:
        written = ""
    return f"{tokenizer.chat_template}\n{written}"


def _embedding_rows(model: PreTrainedModel) -> int:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a base, a folder or a hub id, without the weights. Raises InputError where there is none."""
    return read_tokenizer(model, model_folder(model, TOKENIZER_FILES))


def select_device(settings: BaseSettings) -> torch.device:
    """The device of `base.device`: a GPU where there is one, else the CPU.

    Among several GPUs a process takes the one that its launcher numbered (`LOCAL_RANK`). Apple's GPUs are not used:
    losses and bounds are summed in float64, which they lack. Raises InputError for a missing GPU.
    """
    if settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        sentence = "torch finds no CUDA device here; write auto or cpu, or install a torch with CUDA"
        raise InputError([Problem("config", None, "base.device", sentence)])
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def select_dtype(settings: BaseSettings, device: torch.device) -> torch.dtype:
    """Type of the frozen weights: `base.dtype`, else bfloat16 on a GPU that multiplies it, else float32.

    This also sets the precision of products; see `set_product_precision`.
    """
    auto = torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    dtype: torch.dtype = auto if settings.dtype == "auto" else getattr(torch, settings.dtype)
    set_product_precision(dtype, device)
    return dtype


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device is a GPU that multiplies bfloat16."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _BFLOAT16


def set_product_precision(dtype: torch.dtype, device: torch.device) -> None:
    """On a GPU, sets the precision of float32 products, which are the adapters'.

    It is float32 over a float32 base, and TF32 over a bfloat16 base, whose hidden states have fewer bits than that.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if dtype == torch.bfloat16 else "highest")


def weights_hash(settings: BaseSettings) -> str:
    """Hash of a base's weights, without loading them. Raises InputError for a folder that cannot be a base."""
    folder = model_folder(settings.model, ["*.json", "*.safetensors"])
    return quantized_hash(_hash(weight_files(settings.model, folder)), settings.quantization)


def _hash(files: list[Path]) -> str:
    """sha256 over the names and bytes of the weight files, in their order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
