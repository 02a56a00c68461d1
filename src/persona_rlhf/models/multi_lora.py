"""LoRA for many users at once: stacked A and B on frozen linear layers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from persona_rlhf.models.base import Fp8Linear, dequantize, is_quantized


class LayerSpan(NamedTuple):
    """Position of one layer's A `[rank, inputs]` and B `[outputs, rank]` in a user's flat parameter vector."""

    name: str
    inputs: int
    outputs: int
    rank: int
    start: int

    @property
    def b_start(self) -> int:
        """End of A and start of B."""
        return self.start + self.rank * self.inputs

    @property
    def stop(self) -> int:
        return self.b_start + self.outputs * self.rank


def lora_matrices(
    flat: Float[Tensor, "users params"], spans: Sequence[LayerSpan]
) -> list[tuple[Float[Tensor, "users rank inputs"], Float[Tensor, "users outputs rank"]]]:
    """Views A and B of every layer. One split gives all of them, so the gradient of `flat` is assembled in one pass."""
    users = flat.shape[0]
    parts = iter(flat.split_with_sizes([n for s in spans for n in (s.rank * s.inputs, s.outputs * s.rank)], dim=1))
    return [
        (next(parts).view(users, span.rank, span.inputs), next(parts).view(users, span.outputs, span.rank))
        for span in spans
    ]


def places_of_b(spans: Sequence[LayerSpan]) -> Bool[Tensor, " params"]:
    """The places of the flat vector that hold a B."""
    places = torch.zeros(max(span.stop for span in spans), dtype=torch.bool)
    for span in spans:
        places[span.b_start : span.stop] = True
    return places


def scaled_factors(
    flat: Float[Tensor, "users params"],
    in_b: Bool[Tensor, " params"],
    scale: float,
    alphas: Float[Tensor, " users"] | None,
) -> Float[Tensor, "users params"]:
    """Adapters with `scale` in A and each user's `alpha` in B: layers need neither then."""
    in_a, one = flat.new_full((), scale), flat.new_full((), 1.0)  # made on the device: a number would be copied to it
    factors = torch.where(in_b, one if alphas is None else alphas.to(flat)[:, None], in_a)
    scaled: Tensor = _Scaled.apply(flat, factors)  # type: ignore[no-untyped-call]
    return scaled


class _Scaled(torch.autograd.Function):
    """A product with constant factors, through which several backward passes may go, as passes of one step do."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, factors: Tensor) -> Tensor:
        ctx.factors = factors
        return flat * factors

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factors, None


class MultiLoRALinear(nn.Module):
    """A frozen linear layer with one LoRA adapter per user: `y = W x + B_u A_u x` (Hu et al. 2021, equation 3).

    The scale alpha / rank is in A, see `AdaptedModel.using`. Rows are user-major: the first rows are user 0's, the next
    ones user 1's. `rows_per_user` counts them; None means equally many for every user. So rows are neither sorted nor
    gathered. While `a` and `b` are None the layer is the frozen one.
    """

    def __init__(self, frozen: nn.Linear | Conv1D | Fp8Linear) -> None:
        super().__init__()
        self.frozen = frozen
        self.a: Float[Tensor, "users rank inputs"] | None = None
        self.b: Float[Tensor, "users outputs rank"] | None = None
        self.rows_per_user: Sequence[int] | None = None
        self.group = SharedInputLayers([self])

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for models that read a layer's dtype or device."""
        return self.frozen.weight

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs, however the weight is stored."""
        if isinstance(self.frozen, Conv1D):
            return self.weight.shape[1], self.weight.shape[0]
        return self.frozen.out_features, self.frozen.in_features

    @property
    def transposed(self) -> bool:
        """Whether the frozen weight is stored as `[inputs, outputs]`, as in GPT-2."""
        return isinstance(self.frozen, Conv1D)

    def forward(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        if self.a is None or self.b is None:
            y: Tensor = self.frozen(x)
            return y
        return self.group.output(self, x).view(*x.shape[:-1], -1)

    def end_pass(self) -> None:
        """Ends a forward pass: equal rows per user again, and no cached outputs."""
        self.rows_per_user = None
        self.group.end_pass()

    def frozen_output(self, x: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows outputs"]:
        """`W x + bias`, outside of autograd."""
        if isinstance(self.frozen, Fp8Linear):
            return self.frozen.product(x)
        return F.linear(x, self._dense_weight(), self.frozen.bias)

    def input_gradient(self, gradient: Float[Tensor, "rows outputs"]) -> Float[Tensor, "rows inputs"]:
        """Gradient of the frozen layer's input from that of its output."""
        if isinstance(self.frozen, Fp8Linear):
            return self.frozen.input_gradient(gradient)
        return gradient @ self._dense_weight()

    def add_input_gradient(self, total: Float[Tensor, "rows inputs"], gradient: Float[Tensor, "rows outputs"]) -> None:
        """Adds `input_gradient` to `total` in place."""
        if isinstance(self.frozen, Fp8Linear):
            total += self.frozen.input_gradient(gradient)
        else:
            total.addmm_(gradient, self._dense_weight())

    def _dense_weight(self) -> Float[Tensor, "outputs inputs"]:
        """The frozen weight in the type of the computation; NF4 weights are dequantized each time."""
        if is_quantized(self.frozen):
            return dequantize(self.frozen)
        return self.weight.T if self.transposed else self.weight


class SharedInputLayers:
    """Layers that read the same input, such as queries, keys and values.

    The first one called computes the outputs of all. Their A are one matrix then, and the input's gradients are summed
    in place. Without gradients that matrix is made once for all passes with the same adapters.
    """

    def __init__(self, layers: Sequence[MultiLoRALinear]) -> None:
        self.layers = layers
        self._stack: tuple[list[Tensor], list[int], Tensor] | None = None
        self._input: tuple[Tensor, int] | None = None
        self._cached: dict[MultiLoRALinear, Float[Tensor, "rows outputs"]] = {}

    def output(self, layer: MultiLoRALinear, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "rows outputs"]:
        """Output of `layer` for `x`. The other layers' outputs are kept until each is called with the same tensor."""
        version = _version(x)
        if self._input is None or self._input[0] is not x or self._input[1] != version or layer not in self._cached:
            factors: list[Any] = [factor for member in self.layers for factor in (member.a, member.b)]
            rows = x.reshape(-1, x.shape[-1])
            stack = None if torch.is_grad_enabled() else self._stacked(factors[::2])
            outputs = _MultiLoRA.apply(rows, self.layers, layer.rows_per_user, stack, *factors)  # type: ignore[no-untyped-call]
            self._input, self._cached = (x, version), dict(zip(self.layers, outputs, strict=True))
        y = self._cached.pop(layer)
        if not self._cached:
            self._input = None
        return y

    def _stacked(self, downs: list[Tensor]) -> Float[Tensor, "users ranks inputs"]:
        """All A as one matrix, which is kept while they stay the same."""
        versions = [_version(down) for down in downs]
        if (
            self._stack is None
            or versions != self._stack[1]
            or any(one is not other for one, other in zip(self._stack[0], downs, strict=True))
        ):
            self._stack = downs, versions, _side_by_side(downs)
        return self._stack[2]

    def end_pass(self) -> None:
        """Drops cached outputs."""
        self._input, self._cached = None, {}

    def clear(self) -> None:
        """Drops cached outputs and the matrix of all A."""
        self.end_pass()
        self._stack = None


def _version(x: Tensor) -> int:
    """The number of changes in place; 0 for a tensor of inference mode, which has none."""
    return 0 if x.is_inference() else x._version


def group_by_input(layers: Sequence[MultiLoRALinear], forward: Callable[[], object]) -> None:
    """Groups the layers that receive the very same tensor while `forward` runs their model once."""
    inputs: list[tuple[MultiLoRALinear, Tensor]] = []  # keeps the tensors alive, so that no two share an id
    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(lambda m, args: inputs.append((m, args[0]))).remove)
        forward()
    calls, readers = Counter(layer for layer, _ in inputs), dict[int, list[MultiLoRALinear]]()
    for layer, x in inputs:
        if calls[layer] == 1:
            readers.setdefault(id(x), []).append(layer)
    for group in map(SharedInputLayers, readers.values()):
        for layer in group.layers:
            layer.group = group


class _MultiLoRA(torch.autograd.Function):
    """Outputs of layers over one input: the frozen products of all rows, and every user's low-rank update in place.

    Low-rank products are written with the rank as the first matrix dimension. Matrix libraries run them at two to four
    times the speed of the other order. In bfloat16 only the update is rounded.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layers: Sequence[MultiLoRALinear],
        rows_per_user: Sequence[int] | None,
        stack: Tensor | None,
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        ys = [layer.frozen_output(x) for layer in layers]
        lows, ranks = [], [a.shape[1] for a in factors[::2]]
        downs = _side_by_side(factors[::2]) if stack is None else stack
        for rows, *rest in _by_user(rows_per_user, [x, *ys], [downs, *factors[1::2]]):
            outputs, (down, *ups) = rest[: len(layers)], rest[len(layers) :]
            low = down @ rows.to(down.dtype).mT
            for y, part, up in zip(outputs, low.split_with_sizes(ranks, dim=-2), ups, strict=True):
                _add_product(y, part.mT, up.mT)
            lows.append(low)
        ctx.save_for_backward(x, *factors, *lows)
        ctx.layers, ctx.rows_per_user, ctx.ranks = layers, rows_per_user, ranks
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        layers, (x, *saved) = ctx.layers, ctx.saved_tensors
        factors, lows = saved[: 2 * len(layers)], saved[2 * len(layers) :]
        grad_ys = [gradient.contiguous() for gradient in gradients]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = layers[0].input_gradient(grad_ys[0])
            for layer, grad_y in zip(layers[1:], grad_ys[1:], strict=True):
                layer.add_input_gradient(grad_x, grad_y)
        downs, ups = _side_by_side(factors[::2]), [_transposed(b) for b in factors[1::2]]
        grad_downs, grad_ups = torch.empty_like(downs), [torch.empty_like(up) for up in ups]
        users = _by_user(
            ctx.rows_per_user, [x, x if grad_x is None else grad_x, *grad_ys], [downs, grad_downs, *ups, *grad_ups]
        )
        for (rows, grad_rows, *rest), low in zip(users, lows, strict=True):
            grads = [grad_y.to(downs.dtype) for grad_y in rest[: len(layers)]]
            down, grad_down, *user_ups = rest[len(layers) :]
            grad_low = low.new_empty(low.shape)
            parts = grad_low.split_with_sizes(ctx.ranks, dim=-2)
            for part, up, grad_y in zip(parts, user_ups, grads, strict=False):
                torch.matmul(up, grad_y.mT, out=part)
            torch.matmul(grad_low, rows.to(down.dtype), out=grad_down)
            parts = low.split_with_sizes(ctx.ranks, dim=-2)
            for part, grad_y, grad_up in zip(parts, grads, user_ups[len(layers) :], strict=True):
                torch.matmul(part, grad_y, out=grad_up)
            if grad_x is not None:
                _add_product(grad_rows, grad_low.mT, down)
        grad_as = grad_downs.split_with_sizes(ctx.ranks, dim=1)
        return grad_x, None, None, None, *(grad for a, b in zip(grad_as, grad_ups, strict=True) for grad in (a, b.mT))


def _by_user(
    rows_per_user: Sequence[int] | None, rows: Sequence[Tensor], factors: Sequence[Tensor]
) -> Iterator[tuple[Tensor, ...]]:
    """Rows and factors in the shapes that one matrix product takes.

    With equally many rows per user: once, as `[users, rows, width]` with all factors. Else the matrices of one user
    after the other.
    """
    if rows_per_user is None:
        users = len(factors[0])
        yield *(x.view(users, -1, x.shape[-1]) for x in rows), *factors
    else:
        parts = (x.split_with_sizes(list(rows_per_user)) for x in rows)
        yield from zip(*parts, *(factor.unbind() for factor in factors), strict=True)


def _side_by_side(downs: Sequence[Float[Tensor, "users rank inputs"]]) -> Float[Tensor, "users ranks inputs"]:
    return downs[0] if len(downs) == 1 else torch.cat(list(downs), dim=1)


def _transposed(b: Float[Tensor, "users outputs rank"]) -> Float[Tensor, "users rank outputs"]:
    """B with the rank first. On a CPU it is a copy, since products with a transposed view take twice the time."""
    return b.mT if b.device.type == "cuda" else b.mT.contiguous()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right` in place, in the precision of the factors."""
    if total.dtype != left.dtype:
        total += left @ right
    elif total.dim() == 2:
        total.addmm_(left, right)
    else:
        total.baddbmm_(left, right)


def attach(model: PreTrainedModel, names: Sequence[str], rank: int) -> dict[str, LayerSpan]:
    """Replaces each named layer by a `MultiLoRALinear`; returns the layers' spans in the flat vector."""
    spans: dict[str, LayerSpan] = {}
    start = 0
    for name in names:
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        layer = MultiLoRALinear(getattr(parent, leaf))
        outputs, inputs = layer.shape
        setattr(parent, leaf, layer)
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
        flat[span.start : span.b_start].uniform_(-bound, bound, generator=generator)
    return flat
