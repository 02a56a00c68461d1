"""LoRA for many users at once: stacked A and B on frozen linear layers, and the choice of layers that get them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.config.training import LoraSettings
from persona_rlhf.models.base import Fp8Linear, dequantize, is_linear, is_quantized
from persona_rlhf.models.model_split import decoder_layers, layer_number


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


class MultiLoRALinear(nn.Module):
    """A frozen linear layer with one LoRA adapter per user: `y = W x + scale B_u A_u x` (Hu et al. 2021, equation 3).

    Rows are user-major: the first rows are user 0's, the next ones user 1's. `rows_per_user` counts them; None means
    equally many for every user. So rows are neither sorted nor gathered. While `a` and `b` are None the layer is the
    frozen one.
    """

    def __init__(self, frozen: nn.Linear | Conv1D | Fp8Linear, scale: float) -> None:
        super().__init__()
        self.frozen = frozen
        self.scale = scale
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
        self.group.clear()

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
    in place.
    """

    def __init__(self, layers: Sequence[MultiLoRALinear]) -> None:
        self.layers = layers
        self._input: tuple[Tensor, int] | None = None
        self._cached: dict[MultiLoRALinear, Float[Tensor, "rows outputs"]] = {}

    def output(self, layer: MultiLoRALinear, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "rows outputs"]:
        """Output of `layer` for `x`. The other layers' outputs are kept until each is called with the same tensor."""
        version = 0 if x.is_inference() else x._version
        if self._input is None or self._input[0] is not x or self._input[1] != version or layer not in self._cached:
            factors = [factor for member in self.layers for factor in (member.a, member.b)]
            rows = x.reshape(-1, x.shape[-1])
            outputs = _MultiLoRA.apply(rows, self.layers, layer.rows_per_user, *factors)  # type: ignore[no-untyped-call]
            self._input, self._cached = (x, version), dict(zip(self.layers, outputs, strict=True))
        y = self._cached.pop(layer)
        if not self._cached:
            self._input = None
        return y

    def clear(self) -> None:
        """Drops cached outputs."""
        self._input, self._cached = None, {}


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
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        ys = [layer.frozen_output(x) for layer in layers]
        lows, ranks = [], [a.shape[1] for a in factors[::2]]
        downs = torch.cat([a * layer.scale for a, layer in zip(factors[::2], layers, strict=True)], dim=1)
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
        downs = torch.cat(factors[::2], dim=1)
        ups = [_scaled_copy(b.mT, layer.scale) for b, layer in zip(factors[1::2], layers, strict=True)]
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
        return grad_x, None, None, *(grad for a, b in zip(grad_as, grad_ups, strict=True) for grad in (a, b.mT))


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


def _scaled_copy(b: Float[Tensor, "users rank outputs"], scale: float) -> Float[Tensor, "users rank outputs"]:
    """`b * scale`, contiguous although `b` is a transposed view: products with it are twice as fast."""
    return torch.mul(b, scale, out=torch.empty(b.shape, dtype=b.dtype, device=b.device))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right` in place, in the precision of the factors."""
    if total.dtype != left.dtype:
        total += left @ right
    elif total.dim() == 2:
        total.addmm_(left, right)
    else:
        total.baddbmm_(left, right)


def attach(model: PreTrainedModel, names: Sequence[str], rank: int, scale: float) -> dict[str, LayerSpan]:
    """Replaces each named layer by a `MultiLoRALinear`; returns the layers' spans in the flat vector."""
    spans: dict[str, LayerSpan] = {}
    start = 0
    for name in names:
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        layer = MultiLoRALinear(getattr(parent, leaf), scale)
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


class TargetLayers(NamedTuple):
    """Layers to adapt.

    names: module names, in the order of the model
    first: number of the lowest decoder layer that is adapted
    notice: a sentence on layers that `all-linear` covers but that cannot be adapted; None without such layers
    """

    names: list[str]
    first: int
    notice: str | None


def target_layers(model: PreTrainedModel, lora: LoraSettings) -> TargetLayers:
    """Layers of this model that `lora` selects. Raises InputError for names that match nothing or cannot be adapted."""
    stack, first = "", 0
    decoder = decoder_layers(model)
    if lora.layers != "all" and decoder is not None:
        stack, first = decoder[0], len(decoder[1]) - max(1, round(lora.layers.top * len(decoder[1])))

    def selected(name: str) -> bool:
        number = layer_number(name, stack)
        return first == 0 or (number is not None and number >= first)

    names = [name for name in adaptable_layers(model, lora.target_modules) if selected(name)]
    if lora.target_modules != "all-linear":
        return TargetLayers(names, first, None)
    reasons = unadaptable_layers(model).items()
    skipped = {(re.sub(r"\.\d+\.", ".*.", name), reason) for name, reason in reasons if selected(name)}
    listed = ", ".join(f"{name} ({reason})" for name, reason in sorted(skipped))
    notice = f"Layers without adapters, which stay as the base has them: {listed}" if skipped else None
    return TargetLayers(names, first, notice)


def adaptable_layers(model: PreTrainedModel, target_modules: str | Sequence[str]) -> list[str]:
    """Names of the linear layers to adapt, in the order of the model.

    `all-linear` has PEFT's meaning: every linear layer but the output head. Names match as in PEFT, whole or by their
    last parts. Raises InputError for a name that matches nothing, or a layer that cannot be adapted.
    """
    base, head, unadaptable = model.name_or_path or "the base", model.get_output_embeddings(), unadaptable_layers(model)
    linear = [name for name, m in model.named_modules() if is_linear(m) and m is not head and name not in unadaptable]
    if target_modules == "all-linear":
        if not linear:
            raise InputError([Problem(base, None, None, "the base has no linear layer to adapt")])
        return linear
    targets = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    problems, chosen = [], set()
    for target in targets:
        matches = [name for name in names if name == target or name.endswith("." + target)]
        bad = [name for name in matches if name not in linear]
        if not matches:
            leaves = sorted({name.rsplit(".", 1)[-1] for name in linear})
            sentence = f"`{target}` names no layer of the base; its linear layers are {', '.join(leaves)}"
            problems.append(Problem(base, None, "lora.target_modules", sentence))
        elif bad:
            reason = unadaptable.get(bad[0], "it is no plain linear layer within the decoder")
            sentence = (
                f"`{bad[0]}` cannot be adapted: {reason}; leave `{target}` out, or name the layers you mean in full"
            )
            problems.append(Problem(base, None, "lora.target_modules", sentence))
        chosen.update(matches)
    if problems:
        raise InputError(problems)
    return [name for name in linear if name in chosen]


def unadaptable_layers(model: PreTrainedModel) -> dict[str, str]:
    """Layers with weight matrices that can carry no adapter, each with the reason.

    Embeddings and the output head are left out.
    """
    head = model.get_output_embeddings()
    layers = [(n, m) for n, m in model.named_modules() if m is not head and not isinstance(m, nn.Embedding)]
    nonlinear = {
        name: f"a {type(module).__name__} is no plain linear layer"
        for name, module in layers
        if not is_linear(module) and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    }
    experts = _read_as_experts(model, {name.rsplit(".", 1)[-1] for name, module in layers if is_linear(module)})
    misread = {
        name: "PEFT would take it for a fused expert" for name, _ in layers if name.rsplit(".", 1)[-1] in experts
    }
    return misread | nonlinear


def _read_as_experts(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Last names of linear layers that PEFT takes for experts of a mixture, which newer models fuse."""
    if all(parameter.dim() < 3 for parameter in model.parameters()):
        return set()
    from peft import LoraConfig

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # an older PEFT takes names as they are
        return set()
    experts = set()
    for name in names:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # it is one of two that must be named together
            experts.add(name)
        else:
            experts |= {name} - set(config.target_modules or ())
    return experts
