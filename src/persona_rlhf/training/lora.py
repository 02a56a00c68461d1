"""Stacked LoRA: one frozen linear layer, and the low-rank adapters of all users of a cohort, as one batched product."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
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
    parts = iter(flat.split_with_sizes([n for s in spans for n in (s.rank * s.inputs, s.outputs * s.rank)], dim=1))
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
        self.siblings = Siblings([self])

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
        return self.siblings.of(self, x).view(*x.shape[:-1], -1)

    def finish(self) -> None:
        """Ends a pass of the model: all users own equally many rows again, and nothing of the pass is kept."""
        self.shares = None
        self.siblings.forget()

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

    def add_pulled_back(self, sums: Float[Tensor, "rows inputs"], gradient: Float[Tensor, "rows outputs"]) -> None:
        """Adds that gradient to what others gave, in place."""
        if isinstance(self.frozen, Fp8Linear):
            sums += self.frozen.pulled_back(gradient)
        else:
            sums.addmm_(gradient, self._dense())

    def _dense(self) -> Float[Tensor, "outputs inputs"]:
        """The frozen weight as it is computed with; one that is stored in fewer bits is made anew each time."""
        if is_quantized(self.frozen):
            return dense(self.frozen)
        return self.weight.T if self.transposed else self.weight


class Siblings:
    """Layers that read the same input, such as queries, keys and values: with adapters on, whichever is called first
    computes for all of them, so that their A are one matrix, and the gradients of the input are added up in place."""

    def __init__(self, layers: Sequence[FleetLinear]) -> None:
        self.layers = layers
        self._input: tuple[Tensor, int] | None = None
        self._waiting: dict[FleetLinear, Float[Tensor, "rows outputs"]] = {}

    def of(self, layer: FleetLinear, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "rows outputs"]:
        """What `layer` makes of `x`; the others' are kept until they are asked for with the same tensor, unchanged."""
        version = 0 if x.is_inference() else x._version
        if self._input is None or self._input[0] is not x or self._input[1] != version or layer not in self._waiting:
            factors = [factor for own in self.layers for factor in (own.a, own.b)]
            made = _Adapted.apply(x.reshape(-1, x.shape[-1]), self.layers, layer.shares, *factors)  # type: ignore[no-untyped-call]
            self._input, self._waiting = (x, version), dict(zip(self.layers, made, strict=True))
        found = self._waiting.pop(layer)
        if not self._waiting:
            self._input = None
        return found

    def forget(self) -> None:
        """Drops what nobody asked for."""
        self._input, self._waiting = None, {}


def join(layers: Sequence[FleetLinear], probe: Callable[[], object]) -> None:
    """Makes siblings of those layers that `probe`, which runs their model once, gives the very same tensor."""
    given: list[tuple[FleetLinear, Tensor]] = []  # holds on to the tensors, so that no two of them have one id
    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(lambda m, args: given.append((m, args[0]))).remove)
        probe()
    times, readers = Counter(layer for layer, _ in given), dict[int, list[FleetLinear]]()
    for layer, x in given:
        if times[layer] == 1:
            readers.setdefault(id(x), []).append(layer)
    for group in map(Siblings, readers.values()):
        for layer in group.layers:
            layer.siblings = group


class _Adapted(torch.autograd.Function):
    """The frozen products of all rows, and in place on each what every user's adapter adds; backward likewise.

    Low-rank products are written with the rank in front: so matrix libraries run them at twice to four times the speed
    of the same products with the rank behind. In bfloat16 only what is added is rounded.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: Sequence[FleetLinear], shares: Sequence[int] | None, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        ys = [layer.product(x) for layer in layers]
        lows, ranks = [], [a.shape[1] for a in factors[::2]]
        downs = torch.cat([a * layer.scale for a, layer in zip(factors[::2], layers, strict=True)], dim=1)
        for rows, *rest in _by_user(shares, [x, *ys], [downs, *factors[1::2]]):
            sums, (down, *ups) = rest[: len(layers)], rest[len(layers) :]
            low = down @ rows.to(down.dtype).mT
            for own, part, up in zip(sums, low.split_with_sizes(ranks, dim=-2), ups, strict=True):
                _add_product(own, part.mT, up.mT)
            lows.append(low)
        ctx.save_for_backward(x, *factors, *lows)
        ctx.layers, ctx.shares, ctx.ranks = layers, shares, ranks
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        layers, (x, *saved) = ctx.layers, ctx.saved_tensors
        factors, lows = saved[: 2 * len(layers)], saved[2 * len(layers) :]
        pulls = [gradient.contiguous() for gradient in gradients]
        for_x = None
        if ctx.needs_input_grad[0]:
            for_x = layers[0].pulled_back(pulls[0])
            for layer, pull in zip(layers[1:], pulls[1:], strict=True):
                layer.add_pulled_back(for_x, pull)
        downs = torch.cat(factors[::2], dim=1)
        ups = [_scaled(b.mT, layer.scale) for b, layer in zip(factors[1::2], layers, strict=True)]
        for_downs, for_ups = torch.empty_like(downs), [torch.empty_like(up) for up in ups]
        runs = _by_user(ctx.shares, [x, x if for_x is None else for_x, *pulls], [downs, for_downs, *ups, *for_ups])
        for (rows, sums, *rest), low in zip(runs, lows, strict=True):
            own, (down, for_down, *rest) = [pull.to(downs.dtype) for pull in rest[: len(layers)]], rest[len(layers) :]
            high = low.new_empty(low.shape)
            for part, up, pull in zip(high.split_with_sizes(ctx.ranks, dim=-2), rest, own, strict=False):
                torch.matmul(up, pull.mT, out=part)
            torch.matmul(high, rows.to(down.dtype), out=for_down)
            for part, pull, for_up in zip(
                low.split_with_sizes(ctx.ranks, dim=-2), own, rest[len(layers) :], strict=True
            ):
                torch.matmul(part, pull, out=for_up)
            if for_x is not None:
                _add_product(sums, high.mT, down)
        for_a = for_downs.split_with_sizes(ctx.ranks, dim=1)
        return for_x, None, None, *(made for a, b in zip(for_a, for_ups, strict=True) for made in (a, b.mT))


def _by_user(
    shares: Sequence[int] | None, rows: Sequence[Tensor], factors: Sequence[Tensor]
) -> Iterator[tuple[Tensor, ...]]:
    """Rows and the users' factors as one product can take them: `[users, rows, width]` and all factors at once where
    the users have equally many rows, else the matrices of one user after the other."""
    if shares is None:
        users = len(factors[0])
        yield *(x.view(users, -1, x.shape[-1]) for x in rows), *factors
    else:
        parts = (x.split_with_sizes(list(shares)) for x in rows)
        yield from zip(*parts, *(factor.unbind() for factor in factors), strict=True)


def _scaled(b: Float[Tensor, "users rank outputs"], scale: float) -> Float[Tensor, "users rank outputs"]:
    """`b * scale`, row by row in memory, whatever `b` is a view of: products with it are twice as fast then."""
    return torch.mul(b, scale, out=torch.empty(b.shape, dtype=b.dtype, device=b.device))


def _add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """`sums += left @ right` in place, in the precision of the factors."""
    if sums.dtype != left.dtype:
        sums += left @ right
    elif sums.dim() == 2:
        sums.addmm_(left, right)
    else:
        sums.baddbmm_(left, right)


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
