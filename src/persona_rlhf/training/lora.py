"""Stacked LoRA: one frozen linear layer, and the low-rank adapters of all users of a cohort, as one batched product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


class LayerSpan(NamedTuple):
    """Where one layer's A `[rank, inputs]` and B `[outputs, rank]` lie in a user's flat parameter vector."""

    name: str
    inputs: int
    outputs: int
    rank: int
    start: int

    @property
    def middle(self) -> int:
        return self.start + self.rank * self.inputs

    @property
    def stop(self) -> int:
        return self.middle + self.outputs * self.rank


def matrices(
    flat: Float[Tensor, "users params"], spans: Sequence[LayerSpan]
) -> list[tuple[Float[Tensor, "users rank inputs"], Float[Tensor, "users outputs rank"]]]:
    """Views A and B of every layer; one split, so that the gradient of `flat` is put together in one pass."""
    users = flat.shape[0]
    parts = iter(flat.split([n for s in spans for n in (s.rank * s.inputs, s.outputs * s.rank)], dim=1))
    return [
        (next(parts).view(users, span.rank, span.inputs), next(parts).view(users, span.outputs, span.rank))
        for span in spans
    ]


class FleetLinear(nn.Module):
    """`y = W x + scale B_u A_u x` for the rows of every user u at once (Hu et al. 2021, LoRA, equation 3).

    Rows are user-major: the batch is `users * rows_per_user` long and user u owns the u-th run of rows, so a plain
    batched product serves and nothing is sorted or gathered. With no adapters set it is the frozen layer.
    """

    def __init__(self, frozen: nn.Linear | Conv1D, scale: float) -> None:
        super().__init__()
        self.frozen = frozen
        self.scale = scale
        self.a: Float[Tensor, "users rank inputs"] | None = None
        self.b: Float[Tensor, "users outputs rank"] | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for models that look at a layer's dtype or device."""
        return self.frozen.weight

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs; the weight may be stored in another form."""
        if isinstance(self.frozen, Conv1D):
            return self.weight.shape[1], self.weight.shape[0]
        return self.frozen.out_features, self.frozen.in_features

    @property
    def transposed(self) -> bool:
        """Whether the frozen weight is stored as `[inputs, outputs]`, as in GPT-2."""
        return isinstance(self.frozen, Conv1D)

    def forward(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        if self.a is None or self.b is None:
            frozen: Tensor = self.frozen(x)
            return frozen
        users = self.a.shape[0]
        rows = x.reshape(users, -1, x.shape[-1])
        weight: Tensor = self.weight.T if self.transposed else self.weight
        bias: Tensor | None = getattr(self.frozen, "bias", None)
        if x.dtype == weight.dtype == self.a.dtype and rows.shape[1] >= _MERGING * self.a.shape[1]:
            merged: Tensor = _Merged.apply(rows, weight, self.a, self.b, self.scale)  # type: ignore[no-untyped-call]
            return (merged if bias is None else merged + bias).view(*x.shape[:-1], -1)
        y: Tensor = self.frozen(x)
        low = torch.bmm(rows.to(self.a.dtype), self.a.transpose(1, 2))
        high = y.reshape(users, -1, y.shape[-1])
        if y.dtype == self.b.dtype:
            return torch.baddbmm(high, low, self.b.transpose(1, 2), alpha=self.scale).view(y.shape)
        return (high + self.scale * torch.bmm(low, self.b.transpose(1, 2)).to(y.dtype)).view(y.shape)


_MERGING = 8
"""Rows a user for each rank, from which on it pays to add the adapters to the weight and not to every row's result."""


class _Merged(torch.autograd.Function):
    """`y = (W + scale B_u A_u) x`: rows that are many pass memory once forward and once back.

    Only where the weight is as precise as the adapters: in bfloat16 a sum would swallow them. Gradients of A and B are
    the low-rank ones, never that of a whole weight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)  # a whole weight a user and layer would be too much to keep
        ctx.scale = scale
        return torch.bmm(x, _merge(weight, a, b, scale).transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        x, weight, a, b = ctx.saved_tensors
        needed = ctx.needs_input_grad
        for_x = torch.bmm(gradient, _merge(weight, a, b, ctx.scale)) if needed[0] else None
        for_a = torch.bmm(torch.bmm(gradient, b).mul_(ctx.scale).transpose(1, 2), x) if needed[2] else None
        low = torch.bmm(x, a.transpose(1, 2)).mul_(ctx.scale) if needed[3] else None
        for_b = torch.bmm(gradient.transpose(1, 2), low) if low is not None else None
        return for_x, None, for_a, for_b, None


def _merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Every user's own weight, `[users, outputs, inputs]`."""
    return torch.baddbmm(weight.expand(a.shape[0], -1, -1), b, a, alpha=scale)


def attach(model: PreTrainedModel, names: Sequence[str], rank: int, scale: float) -> dict[str, LayerSpan]:
    """Puts a FleetLinear in the place of each named layer; returns where each lies in the flat vector."""
    spans: dict[str, LayerSpan] = {}
    start = 0
    for name in names:
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        layer = getattr(parent, leaf)
        fleet = FleetLinear(layer, scale)
        outputs, inputs = fleet.shape
        setattr(parent, leaf, fleet)
        spans[name] = LayerSpan(name, inputs, outputs, rank, start)
        start = spans[name].stop
    return spans


def detach(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Puts the frozen layers back: the model is as it was before `attach`."""
    for name in names:
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        setattr(parent, leaf, getattr(parent, leaf).frozen)


def fresh_adapter(spans: Sequence[LayerSpan], generator: torch.Generator) -> Float[Tensor, " params"]:
    """A new adapter on the CPU: A uniform in +-1/sqrt(inputs) as PEFT draws it (Kaiming, a = sqrt 5), B zero."""
    flat = torch.zeros(spans[-1].stop)
    for span in spans:
        bound = 1 / math.sqrt(span.inputs)
        flat[span.start : span.middle].uniform_(-bound, bound, generator=generator)
    return flat
