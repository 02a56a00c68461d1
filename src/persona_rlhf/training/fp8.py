"""Frozen linear layers stored and multiplied in eight bits: float8 e4m3, a scale for each output of the weight and for
each row of what comes in (Micikevicius et al. 2022; the row-wise recipe), by torch's scaled product."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from persona_rlhf.inputs.problems import InputError, Problem

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
