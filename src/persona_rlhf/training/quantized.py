"""Frozen weights stored in fewer bits. In four: NormalFloat with double quantization (QLoRA, Dettmers et al. 2023), by
bitsandbytes; what the layers compute is in the base's own type. In eight: see fp8.py. Only linear layers inside the
decoder are."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from typing import Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.training.fp8 import Fp8Linear

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
