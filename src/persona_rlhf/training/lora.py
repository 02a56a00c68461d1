"""Stacked LoRA: one frozen linear layer, and the low-rank adapters of all users of a cohort, as one batched product."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from persona_rlhf.training.fp8 import Fp8Linear
from persona_rlhf.training.quantized import dense, is_quantized


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

    Rows are user-major: user u owns the u-th run of them, of `shares[u]` rows, or all users own equally many where
    `shares` is None. So nothing is sorted or gathered. With no adapters set it is the frozen layer.
    """

    def __init__(self, frozen: nn.Linear | Conv1D | Fp8Linear, scale: float) -> None:
        super().__init__()
        self.frozen = frozen
        self.scale = scale
        self.a: Float[Tensor, "users rank inputs"] | None = None
        self.b: Float[Tensor, "users outputs rank"] | None = None
        self.shares: Sequence[int] | None = None

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
        rows = x.reshape(-1, x.shape[-1])
        y: Tensor = _Adapted.apply(rows, self, self.a, self.b, self.shares)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], -1)

    def product(self, x: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows outputs"]:
        """What the frozen layer makes of rows."""
        if isinstance(self.frozen, Fp8Linear):
            return self.frozen.product(x)
        return F.linear(x, self._dense(), self.frozen.bias)

    def pulled_back(self, gradient: Float[Tensor, "rows outputs"]) -> Float[Tensor, "rows inputs"]:
        """The gradient of the rows from that of the frozen layer's product."""
        if isinstance(self.frozen, Fp8Linear):
            return self.frozen.pulled_back(gradient)
        return gradient @ self._dense()

    def _dense(self) -> Float[Tensor, "outputs inputs"]:
        """The frozen weight as it is computed with; one that is stored in fewer bits is made anew each time."""
        if is_quantized(self.frozen):
            return dense(self.frozen)
        return self.weight.T if self.transposed else self.weight


class _Adapted(torch.autograd.Function):
    """The frozen product of all rows, and in place on it what each user's adapter adds; backward likewise.

    Low-rank products are written with the rank in front: so matrix libraries run them at twice to four times the speed
    of the same products with the rank behind. In bfloat16 only what is added is rounded.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: FleetLinear,
        a: Tensor,
        b: Tensor,
        shares: Sequence[int] | None,
    ) -> Tensor:
        y = layer.product(x)
        lows = []
        for down, up, rows, sums in _by_user(shares, a * layer.scale, b, x, y):
            low = torch.bmm(down, rows.to(down.dtype).transpose(1, 2))
            _add_product(sums, low.transpose(1, 2), up.transpose(1, 2))
            lows.append(low)
        ctx.save_for_backward(x, a, b, *lows)
        ctx.layer, ctx.shares = layer, shares
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, *lows = ctx.saved_tensors
        gradient = gradient.contiguous()
        for_x = ctx.layer.pulled_back(gradient) if ctx.needs_input_grad[0] else None
        for_a, for_b = [], []
        runs = _by_user(ctx.shares, a, b * ctx.layer.scale, x, gradient, x if for_x is None else for_x)
        for (down, up, rows, pull, sums), low in zip(runs, lows, strict=True):
            pull = pull.to(up.dtype)
            high = torch.bmm(up.transpose(1, 2), pull.transpose(1, 2))
            for_a.append(torch.bmm(high, rows.to(down.dtype)))
            for_b.append(torch.bmm(low, pull).transpose(1, 2))
            if for_x is not None:
                _add_product(sums, high.transpose(1, 2), down)
        return for_x, None, torch.cat(for_a), torch.cat(for_b), None


def _by_user(shares: Sequence[int] | None, a: Tensor, b: Tensor, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Adapters and their rows `[users, rows, width]` as a batched product can take them: all at once where the users
    have equally many, else one user after the other."""
    if shares is None:
        yield a, b, *(x.view(a.shape[0], -1, x.shape[-1]) for x in rows)
    else:
        parts = (x.split_with_sizes(list(shares)) for x in rows)
        for down, up, *own in zip(a.split(1), b.split(1), *parts, strict=True):
            yield down, up, *(part.unsqueeze(0) for part in own)


def _add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """`sums += left @ right` in place, in the precision of the factors."""
    if sums.dtype == left.dtype:
        sums.baddbmm_(left, right)
    else:
        sums += torch.bmm(left, right)


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
