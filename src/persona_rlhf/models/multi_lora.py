"""MultiLoRALinear: stacked A and B for all users; which layers are adapted."""

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
from persona_rlhf.models.base import Fp8Linear, dense, is_linear, is_quantized
from persona_rlhf.models.model_split import decoder_layers, layer_number

# ----------------------------------------------------------------------------------------------------
# Stacked LoRA: one frozen linear layer, and the low-rank adapters of all users of a cohort, as one batched product.
# ----------------------------------------------------------------------------------------------------


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
        self.siblings = SharedInputLayers([self])

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


class SharedInputLayers:
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
    for group in map(SharedInputLayers, readers.values()):
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


# ----------------------------------------------------------------------------------------------------
# Which layers of a base get adapters, and which of them cannot.
# ----------------------------------------------------------------------------------------------------


class Targets(NamedTuple):
    """Names of the layers to adapt, in the order of the model; the number of the first decoder layer among them; and
    one sentence on those that `all-linear` would mean but that cannot be adapted, None where there are none."""

    names: list[str]
    first: int
    notice: str | None


def targets(model: PreTrainedModel, lora: LoraSettings) -> Targets:
    """What `lora` means in this model. Raises InputError for names that mean nothing in it, or cannot be adapted."""
    stack, first = "", 0
    found = decoder_layers(model)
    if lora.layers != "all" and found is not None:
        stack, first = found[0], len(found[1]) - max(1, round(lora.layers.top * len(found[1])))

    def meant(name: str) -> bool:
        number = layer_number(name, stack)
        return first == 0 or (number is not None and number >= first)

    names = [name for name in adaptable_layers(model, lora.target_modules) if meant(name)]
    if lora.target_modules != "all-linear":
        return Targets(names, first, None)
    hindered = {(re.sub(r"\.\d+\.", ".*.", name), why) for name, why in obstacles(model).items() if meant(name)}
    told = ", ".join(f"{name} ({why})" for name, why in sorted(hindered))
    return Targets(names, first, f"Layers without adapters, which stay as the base has them: {told}" if told else None)


def adaptable_layers(model: PreTrainedModel, target_modules: str | Sequence[str]) -> list[str]:
    """Names of the linear layers to adapt, in the order of the model.

    `all-linear` means what PEFT means by it: every linear layer but the output head. Names are matched as PEFT does,
    whole or by their last parts. Raises InputError where a name matches nothing, or a layer cannot be adapted.
    """
    base, head, hindered = model.name_or_path or "the base", model.get_output_embeddings(), obstacles(model)
    linear = [name for name, m in model.named_modules() if is_linear(m) and m is not head and name not in hindered]
    if target_modules == "all-linear":
        if not linear:
            raise InputError([Problem(base, None, None, "the base has no linear layer to adapt")])
        return linear
    wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    named = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    problems, chosen = [], set()
    for target in wanted:
        found = [name for name in named if name == target or name.endswith("." + target)]
        bad = [name for name in found if name not in linear]
        if not found:
            leaves = sorted({name.rsplit(".", 1)[-1] for name in linear})
            sentence = f"`{target}` names no layer of the base; its linear layers are {', '.join(leaves)}"
            problems.append(Problem(base, None, "lora.target_modules", sentence))
        elif bad:
            why = hindered.get(bad[0], "it is no plain linear layer within the decoder")
            sentence = f"`{bad[0]}` cannot be adapted: {why}; leave `{target}` out, or name the layers you mean in full"
            problems.append(Problem(base, None, "lora.target_modules", sentence))
        chosen.update(found)
    if problems:
        raise InputError(problems)
    return [name for name in linear if name in chosen]


def obstacles(model: PreTrainedModel) -> dict[str, str]:
    """The layers with matrices that no adapter can be put on, and why; embeddings and the output head are not meant."""
    head = model.get_output_embeddings()
    layers = [(n, m) for n, m in model.named_modules() if m is not head and not isinstance(m, nn.Embedding)]
    odd = {
        name: f"a {type(module).__name__} is no plain linear layer"
        for name, module in layers
        if not is_linear(module) and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    }
    mistaken = _taken_for_experts(model, {name.rsplit(".", 1)[-1] for name, module in layers if is_linear(module)})
    lost = {name: "PEFT would take it for a fused expert" for name, _ in layers if name.rsplit(".", 1)[-1] in mistaken}
    return lost | odd


def _taken_for_experts(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Of the last names of linear layers those that PEFT reads as experts of a mixture, which became fused since."""
    if all(parameter.dim() < 3 for parameter in model.parameters()):
        return set()
    from peft import LoraConfig

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # an older PEFT takes names as they are
        return set()
    mistaken = set()
    for name in names:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # it is one of two that must be named together
            mistaken.add(name)
        else:
            mistaken |= {name} - set(config.target_modules or ())
    return mistaken
