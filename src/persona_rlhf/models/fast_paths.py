"""Optional equivalents of norms, rotary, last layer; each verified against the model before use."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel

from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.base import Base, is_linear
from persona_rlhf.models.model_split import decoder_layers, with_states
from persona_rlhf.models.multi_lora import FleetLinear
from persona_rlhf.models.packing import Batch, DeterministicGather, collate

# ----------------------------------------------------------------------------------------------------
# Keeps freed memory for the next step: on Linux, glibc gives big blocks back at once and every step faults them in.
# ----------------------------------------------------------------------------------------------------

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_BYTES = 1 << 30


def keep_large_blocks() -> bool:
    """Tells glibc's malloc to hold on to blocks of up to 1 GiB; True where it listened.

    A step of the bundled tiny base takes 4.0 CPU-seconds for a user's 60 steps with it, and 5.2 without.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(libc.mallopt(_MMAP_THRESHOLD, _BYTES)) and bool(libc.mallopt(_TRIM_THRESHOLD, _BYTES))
    except (OSError, AttributeError):
        return False


# ----------------------------------------------------------------------------------------------------
# Other ways to compute what a model computes, put in its place for a while.
# ----------------------------------------------------------------------------------------------------

ROTARY = "apply_rotary_pos_emb"
"""The function by which attention rotates queries and keys, in the Python module of the model's kind."""


class ForwardPatch:
    """While it is `on`, these modules' `forward` is another one, and so is the rotary function of these Python modules.
    Outside, the model is as it was. Whether it still gives its logits has to be tried out before this is used."""

    def __init__(
        self, forwards: Mapping[nn.Module, Callable[..., Any]], rotations: Mapping[ModuleType, Callable[..., Any]]
    ) -> None:
        self._forwards, self._rotations = forwards, rotations

    @contextmanager
    def on(self) -> Iterator[None]:
        with ExitStack() as before:
            for place, rotation in self._rotations.items():
                before.callback(setattr, place, ROTARY, getattr(place, ROTARY))
                setattr(place, ROTARY, rotation)
            for module, forward in self._forwards.items():
                before.callback(delattr, module, "forward")  # of the instance: its class has the model's own
                module.forward = forward
            yield


def rotating(model: PreTrainedModel) -> list[ModuleType]:
    """The Python modules whose rotary function a model's attention calls."""
    kinds = sorted({type(m).__module__ for m in model.modules() if "Attention" in type(m).__name__})
    return [sys.modules[kind] for kind in kinds if hasattr(sys.modules[kind], ROTARY)]


# ----------------------------------------------------------------------------------------------------
# A model's own norms, rotations and gated activations as one kernel each, where a tensor is large enough for it.
#
# The formulas of `transformers` go over their input five to ten times, a compiled one once. But a call of it costs its
# host about a tenth of a millisecond (measured on a CPU), and a device of four terabytes a second goes over 2^24
# elements
# in bfloat16 in 17 microseconds: below that nothing is compiled, and nothing waited for.
# ----------------------------------------------------------------------------------------------------

_LARGE = 1 << 24  # elements
_OPTIONS: dict[str, Any] = {"deterministic": True, "emulate_precision_casts": True}
"""The same bits in every process, and rounded where the formula rounds."""
_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")


class Compiled:
    """A function that is compiled when it is first given something large, for tensors of any size.

    It is tried on those very arguments, there and back: where a compiler is missing or fails, or the results differ,
    the function stays as it is. `learning`: the places of the arguments that gradients are asked for, all of one size.
    """

    def __init__(self, plain: Callable[..., Any], learning: Sequence[int], large: int) -> None:
        self._plain, self._learning, self._large = plain, learning, large
        self.chosen: Callable[..., Any] | None = None

    def __call__(self, *given: Any) -> Any:
        if given[self._learning[0]].numel() < self._large:
            return self._plain(*given)
        if self.chosen is None:
            self.chosen = self._tried(given)
        try:
            return self.chosen(*given)
        except TorchDynamoException:  # it is compiled anew where a gradient is not asked for, and then failed
            self.chosen = self._plain
            return self._plain(*given)

    def _tried(self, given: Sequence[Any]) -> Callable[..., Any]:
        try:
            made: Callable[..., Any] = torch.compile(self._plain, dynamic=True, options=_OPTIONS)
            wanted, found = (self._both_ways(function, given) for function in (self._plain, made))
        except torch.OutOfMemoryError:
            raise  # the caller takes fewer tokens, and this is tried again
        except Exception:  # whatever a compiler says: there is another way
            return self._plain
        most = 1e-5 if given[self._learning[0]].dtype in (torch.float32, torch.float64) else 1e-2
        close = all((own - other).norm() <= most * own.norm() for own, other in zip(wanted, found, strict=True))
        return made if close else self._plain

    def _both_ways(self, function: Callable[..., Any], given: Sequence[Any]) -> list[Tensor]:
        """Results, and the gradients of the sum of their squares."""
        with torch.enable_grad():
            given = [own.detach().requires_grad_() if n in self._learning else own for n, own in enumerate(given)]
            made = function(*given)
            results = [made] if isinstance(made, Tensor) else list(made)
            squares = torch.stack([own.float().square().sum() for own in results]).sum()
            slopes = torch.autograd.grad(squares, [given[n] for n in self._learning])
            return [own.detach().float() for own in (*results, *slopes)]


def compiled(model: PreTrainedModel, large: int = _LARGE) -> ForwardPatch:
    """All such of a model. An MLP that does more than to gate is found out where the whole is tried out."""
    norms: list[Any] = [m for m in model.modules() if "RMSNorm" in type(m).__name__]
    formulas = {kind: Compiled(kind.forward, [1], large) for kind in {type(norm) for norm in norms}}
    gate, gated = Compiled(_gate, [0, 1], large), [m for m in model.modules() if all(hasattr(m, n) for n in _GATED)]
    forwards: dict[nn.Module, Callable[..., Any]] = {norm: partial(formulas[type(norm)], norm) for norm in norms}
    forwards |= {mlp: partial(_mlp, mlp, gate) for mlp in gated}
    return ForwardPatch(forwards, {place: Compiled(getattr(place, ROTARY), [0, 1], large) for place in rotating(model)})


def _gate(gates: Tensor, ups: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    return activation(gates) * ups


def _mlp(mlp: Any, gate: Compiled, x: Tensor) -> Any:
    return mlp.down_proj(gate(mlp.gate_proj(x), mlp.up_proj(x), mlp.act_fn))


# ----------------------------------------------------------------------------------------------------
# Norms and rotary embeddings with their gradients written down: half as many passes over memory as the formulas of
# `transformers` take, and a tenth of a step of a small model.
# ----------------------------------------------------------------------------------------------------


def written_down(model: PreTrainedModel) -> ForwardPatch:
    """A model's norms and rotary embeddings as they are computed here. One that rotates in some other way gives wrong
    values with it."""
    norms = {m: own for m in model.modules() if (own := _as_normed(m)) is not None}
    return ForwardPatch(norms, dict.fromkeys(rotating(model), rotated))


def normed(
    weight: Float[Tensor, " width"], epsilon: float, hidden_states: Float[Tensor, "*rows width"]
) -> Float[Tensor, "*rows width"]:
    """`weight * x / sqrt(mean(x^2) + epsilon)` over the last dimension (Zhang & Sennrich 2019, equation 4). No gradient
    comes to the weight, which is frozen."""
    found: Tensor = _Normed.apply(hidden_states, weight, epsilon)  # type: ignore[no-untyped-call]
    return found


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        mean: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        factor = mean.add_(epsilon).rsqrt_()
        scaled = x * factor
        ctx.save_for_backward(scaled, factor, weight)
        return scaled * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        scaled, factor, weight = ctx.saved_tensors
        found = gradient * weight
        along = torch.linalg.vecdot(found, scaled).unsqueeze(-1).div_(-scaled.shape[-1])
        return found.addcmul_(scaled, along).mul_(factor), None, None


def _as_normed(norm: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What computes a norm: `normed` with its weight or (Gemma's way) one plus its weight, whichever equals it on some
    made-up rows; None for any other module."""
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if "RMSNorm" not in type(norm).__name__ or weight is None or weight.dim() != 1 or epsilon is None:
        return None
    rows = 3 * torch.randn(2, 3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    for factor in (weight.detach(), 1 + weight):
        found = partial(normed, factor, epsilon)
        with torch.no_grad():
            if torch.allclose(found(rows), norm(rows), rtol=1e-5, atol=1e-6):
                return found
    return None


def rotated(
    q: Float[Tensor, "lines heads width size"],
    k: Float[Tensor, "lines groups width size"],
    cos: Float[Tensor, "#lines width size"],
    sin: Float[Tensor, "#lines width size"],
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """`x cos + turned(x) sin` of queries and keys, where `turned` puts the second half of a head, negative, before its
    first (Su et al. 2021, equation 34, by halves). Both halves of `cos`, and of `sin`, must be the same."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotated.apply(q, cos, sin), _Rotated.apply(k, cos, sin)  # type: ignore[no-untyped-call]


class _Rotated(torch.autograd.Function):
    """A rotation; its gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    found, half = x * cos, x.shape[-1] // 2
    (first, second), (left, right), angle = x.split(half, -1), found.split(half, -1), sin[..., :half]
    left.addcmul_(second, angle, value=-sign)
    right.addcmul_(first, angle, value=sign)
    return found


# ----------------------------------------------------------------------------------------------------
# The last decoder layer, where only the tokens whose logits are read need more than keys and values.
# ----------------------------------------------------------------------------------------------------


class LastLayerPruning:
    """What comes after the attention of the last layer, for some tokens only.

    The layer is given these tokens, and its first part (a norm, or the attention itself) all of them; what attention
    puts out is cut to these tokens before its output projection. A layer that is built in some other way than that
    gives wrong values or none, so this must be tried out before it is used.
    """

    def __init__(self, layer: nn.Module, attention: nn.Module, output: nn.Module) -> None:
        """`output`: the linear layer that `attention` ends with."""
        self._layer, self._output = layer, output
        before = set(attention.modules()) - {output}
        self._narrowed = [m for m in layer.modules() if isinstance(m, FleetLinear) and m not in before]

    @contextmanager
    def to(self, read: DeterministicGather, shares: Sequence[int]) -> Iterator[None]:
        """Inside, the model's decoder gives the hidden states of the tokens of `read`, `[1, tokens, hidden]`, of which
        the u-th user's are `shares[u]`."""
        given: list[Tensor] = []

        def cut(x: Tensor) -> Tensor:
            return read(x.flatten(0, 1))[None]

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given.append(args[0] if args else kwargs["hidden_states"])
            for module in self._narrowed:
                module.shares = shares
            sight = kwargs.get("sight")
            if sight is not None and sight.last is not None:
                kwargs = {**kwargs, "sight": sight.last}
            return with_states(args, kwargs, cut(given[0]))

        def first(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return with_states(args, kwargs, given.pop()) if given else None

        def leave(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            return (cut(args[0]),)

        with ExitStack() as hooks:
            hooks.callback(self._layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            for part in self._layer.children():
                hooks.callback(part.register_forward_pre_hook(first, with_kwargs=True).remove)
            hooks.callback(self._output.register_forward_pre_hook(leave).remove)
            yield


def narrowing(model: PreTrainedModel, probe: Callable[[], object]) -> LastLayerPruning | None:
    """A narrowing of the model's last layer that is still to be tried out; `probe` runs the model once."""
    found = decoder_layers(model)
    layer = found[1][-1] if found and len(found[1]) else None
    attention = next((m for m in layer.modules() if "Attention" in type(m).__name__), None) if layer else None
    if layer is None or attention is None:
        return None
    called: list[nn.Module] = []
    frozen = {id(m.frozen) for m in attention.modules() if isinstance(m, FleetLinear)}
    with ExitStack() as hooks:
        for module in attention.modules():
            if (isinstance(module, FleetLinear) or is_linear(module)) and id(module) not in frozen:
                hooks.callback(module.register_forward_pre_hook(lambda m, _: called.append(m)).remove)
        probe()
    return LastLayerPruning(layer, attention, called[-1]) if called else None


# ----------------------------------------------------------------------------------------------------
# Shortcuts through a model are tried out before they are used, on made-up rows, against the model without them.
# ----------------------------------------------------------------------------------------------------


class EquivalenceCheck:
    """Rows with a shared prompt and unequal lengths; however they are laid out, the tokens that are read are no
    multiple of a line."""

    def __init__(self, base: Base) -> None:
        ids = [n % base.model.config.get_text_config().vocab_size for n in range(3, 23)]
        self.rows = [
            Row(tuple(ids[:7]), tuple(ids[7:12])),
            Row(tuple(ids[:7]), tuple(ids[9:])),
            Row(tuple(ids[4:6]), tuple(ids[1:3])),
        ]
        self._base = base

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(row.length for row in self.rows)

    def collated(self, rows: list[Row]) -> Batch:
        """One line a row."""
        return collate(rows, self._base.pad_id, self._base.device)

    @torch.no_grad()
    def expect(self, plain: Callable[[Batch], Tensor]) -> None:
        """Takes the model's logits, one row after the other, for what every shortcut must give."""
        self._wanted = torch.cat([plain(self.collated([row])) for row in self.rows]).float()

    @torch.no_grad()
    def passes(self, shortcut: Callable[[list[Row]], Tensor]) -> bool:
        """Whether a shortcut gives the expected logits."""
        try:
            tried = shortcut(self.rows).float()
        except (NotImplementedError, TypeError, ValueError, RuntimeError):
            return False
        exact = self._base.model.dtype in (torch.float32, torch.float64)
        return bool((tried - self._wanted).norm() <= (1e-4 if exact else 5e-2) * self._wanted.norm())
