"""Optional equivalents of parts of a model, each verified against the model before use.

`EquivalenceCheck` holds the plain model's logits. A fast path is used only where it reproduces them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel

from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.base import Base
from persona_rlhf.models.packing import Batch, collate


class EquivalenceCheck:
    """Rows whose logits every fast path must reproduce: a shared prompt, shared first tokens, unequal lengths, odd
    numbers of tokens.

    Their tokens lie an eighth into the vocabulary, where most are ordinary. The first ones are often control tokens,
    for which 16-bit logits depend on the order of roundings.
    """

    def __init__(self, base: Base) -> None:
        vocabulary = base.model.config.get_text_config().vocab_size
        ids = [n % vocabulary for n in range(vocabulary // 8 + 3, vocabulary // 8 + 23)]
        self.rows = [
            Row(tuple(ids[:11]), tuple(ids[11:16])),
            Row(tuple(ids[:11]), tuple(ids[13:])),
            Row(tuple(ids[:9] + ids[4:6]), tuple(ids[1:3])),
        ]
        self._base = base

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(row.length for row in self.rows)

    def collated(self, rows: list[Row]) -> Batch:
        """A batch with one row per line."""
        return collate(rows, self._base.pad_id, self._base.device)

    @torch.no_grad()
    def expect(self, logits: Callable[[Batch], Tensor]) -> None:
        """Stores the plain model's logits, computed row by row, as the expected ones."""
        self._expected = torch.cat([logits(self.collated([row])) for row in self.rows]).float()

    @torch.no_grad()
    def passes(self, logits: Callable[[list[Row]], Tensor]) -> bool:
        """Whether a fast path runs and gives the expected logits, within rounding."""
        try:
            actual = logits(self.rows).float()
        except (NotImplementedError, TypeError, ValueError, RuntimeError):
            return False
        exact = self._base.model.dtype in (torch.float32, torch.float64)
        return bool((actual - self._expected).norm() <= (1e-4 if exact else 5e-2) * self._expected.norm())


ROTARY = "apply_rotary_pos_emb"
"""Name of the function that rotates queries and keys, in the Python module of a model's attention."""


class ForwardPatch:
    """Other `forward` functions of layers and other rotary functions of Python modules, in effect inside `on`."""

    def __init__(
        self, forwards: Mapping[nn.Module, Callable[..., Any]], rotary: Mapping[ModuleType, Callable[..., Any]]
    ) -> None:
        self._forwards, self._rotary = forwards, rotary

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, the replacements are in effect; afterwards the model is as before."""
        with ExitStack() as undo:
            for module, rotate in self._rotary.items():
                undo.callback(setattr, module, ROTARY, getattr(module, ROTARY))
                setattr(module, ROTARY, rotate)
            for layer, forward in self._forwards.items():
                undo.callback(delattr, layer, "forward")  # of the instance: the class has the model's own
                layer.forward = forward
            yield


def rotary_modules(model: PreTrainedModel) -> list[ModuleType]:
    """The Python modules whose rotary function a model's attention calls."""
    names = sorted({type(m).__module__ for m in model.modules() if "Attention" in type(m).__name__})
    return [sys.modules[name] for name in names if hasattr(sys.modules[name], ROTARY)]


_LARGE = 1 << 24
"""Elements of a tensor from which on compiling pays off.

Eager formulas read their input five to ten times, a compiled one once. A compiled call costs its host about 0.1 ms
(measured on a CPU). A device of four terabytes per second reads 2^24 elements in bfloat16 in 17 microseconds.
"""
_OPTIONS: dict[str, Any] = {"deterministic": True, "emulate_precision_casts": True}
"""The same bits in every process, with roundings as in the formula."""
_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")


class CompiledFunction:
    """A function that is compiled at its first call with a large tensor, for tensors of any size.

    Values and gradients of the compiled function are compared with the original's on that call's arguments. The
    original stays where a compiler is missing or fails, or the results differ.

    differentiable: positions of the arguments that get gradients, all of one size
    large: elements from which on a tensor is large
    small: an equivalent for smaller tensors; None means the original
    """

    def __init__(
        self,
        original: Callable[..., Any],
        differentiable: Sequence[int],
        large: int,
        small: Callable[..., Any] | None = None,
    ) -> None:
        self._original, self._differentiable, self._large = original, differentiable, large
        self._small = small or original
        self.chosen: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if args[self._differentiable[0]].numel() < self._large:
            return self._small(*args)
        if self.chosen is None:
            self.chosen = self._compile(args)
        try:
            return self.chosen(*args)
        except TorchDynamoException:  # compiling again, for a call without gradients, has failed
            self.chosen = self._original
            return self._original(*args)

    def _compile(self, args: Sequence[Any]) -> Callable[..., Any]:
        try:
            compiled: Callable[..., Any] = torch.compile(self._original, dynamic=True, options=_OPTIONS)
            expected, actual = (self._values_and_gradients(f, args) for f in (self._original, compiled))
        except torch.OutOfMemoryError:
            raise  # the caller retries with fewer tokens
        except Exception:  # any failure of a compiler
            return self._original
        tolerance = 1e-5 if args[self._differentiable[0]].dtype in (torch.float32, torch.float64) else 1e-2
        close = all((x - y).norm() <= tolerance * x.norm() for x, y in zip(expected, actual, strict=True))
        return compiled if close else self._original

    def _values_and_gradients(self, function: Callable[..., Any], args: Sequence[Any]) -> list[Tensor]:
        """Outputs, and the gradients of the sum of their squares."""
        with torch.enable_grad():
            args = [x.detach().requires_grad_() if n in self._differentiable else x for n, x in enumerate(args)]
            output = function(*args)
            outputs = [output] if isinstance(output, Tensor) else list(output)
            loss = torch.stack([x.float().square().sum() for x in outputs]).sum()
            gradients = torch.autograd.grad(loss, [args[n] for n in self._differentiable])
            return [x.detach().float() for x in (*outputs, *gradients)]


def compiled_patch(model: PreTrainedModel, large: int = _LARGE) -> ForwardPatch:
    """A model's norms by torch's own kernel; rotary embeddings and gated activations, each compiled to one kernel.

    Norms that torch's kernel does not compute, such as Gemma's, are compiled too. An MLP with further steps, or another
    rotation, gives other logits; the equivalence check of the whole patch rejects it.
    """
    fused = {m: forward for m in model.modules() if (forward := _rms_norm_of(m, torch_rms_norm)) is not None}
    norms: list[Any] = [m for m in model.modules() if "RMSNorm" in type(m).__name__ and m not in fused]
    by_class = {kind: CompiledFunction(kind.forward, [1], large) for kind in {type(norm) for norm in norms}}
    gate = CompiledFunction(_gate, [0, 1], large)
    mlps = [m for m in model.modules() if all(hasattr(m, name) for name in _GATED)]
    forwards: dict[nn.Module, Callable[..., Any]] = {norm: partial(by_class[type(norm)], norm) for norm in norms}
    forwards |= fused | {mlp: partial(_mlp, mlp, gate) for mlp in mlps}
    rotary = {place: CompiledFunction(getattr(place, ROTARY), [0, 1], large, rotate) for place in rotary_modules(model)}
    return ForwardPatch(forwards, rotary)


def _gate(gates: Tensor, ups: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    return activation(gates) * ups


def _mlp(mlp: Any, gate: CompiledFunction, x: Tensor) -> Any:
    return mlp.down_proj(gate(mlp.gate_proj(x), mlp.up_proj(x), mlp.act_fn))


def handwritten_patch(model: PreTrainedModel) -> ForwardPatch:
    """A model's norms and rotary embeddings with hand-written gradients: half as many passes over memory.

    A model that rotates in another way gives other logits; the equivalence check rejects the patch.
    """
    norms = {m: forward for m in model.modules() if (forward := _rms_norm_of(m, rms_norm)) is not None}
    return ForwardPatch(norms, dict.fromkeys(rotary_modules(model), rotate))


def rms_norm(
    weight: Float[Tensor, " width"], epsilon: float, hidden_states: Float[Tensor, "*rows width"]
) -> Float[Tensor, "*rows width"]:
    """`weight * x / sqrt(mean(x^2) + epsilon)` over the last dimension (Zhang & Sennrich 2019, equation 4).

    The frozen weight gets no gradient.
    """
    y: Tensor = _RMSNorm.apply(hidden_states, weight, epsilon)  # type: ignore[no-untyped-call]
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        mean_square: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        factor = mean_square.add_(epsilon).rsqrt_()
        normed = x * factor
        ctx.save_for_backward(normed, factor, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        normed, factor, weight = ctx.saved_tensors
        grad_x = gradient * weight
        along = torch.linalg.vecdot(grad_x, normed).unsqueeze(-1).div_(-normed.shape[-1])
        return grad_x.addcmul_(normed, along).mul_(factor), None, None


def torch_rms_norm(
    weight: Float[Tensor, " width"], epsilon: float, hidden_states: Float[Tensor, "*rows width"]
) -> Float[Tensor, "*rows width"]:
    """`rms_norm` by torch, which has a kernel for it on a GPU."""
    return F.rms_norm(hidden_states, weight.shape, weight, epsilon)


def _rms_norm_of(norm: nn.Module, function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor] | None:
    """A norm with a module's weight, or with 1 + weight as in Gemma, whichever equals the module on random rows.

    None for any other module, and for 1 + weight in 16 bits, which would round it.
    """
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if "RMSNorm" not in type(norm).__name__ or weight is None or weight.dim() != 1 or epsilon is None:
        return None
    rows = 3 * torch.randn(2, 3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    exact = weight.dtype in (torch.float32, torch.float64)
    for factor in (weight.detach(), 1 + weight) if exact else (weight.detach(),):
        forward = partial(function, factor, epsilon)
        with torch.no_grad():
            if torch.allclose(forward(rows), norm(rows), rtol=1e-5 if exact else 2**-7, atol=1e-6):
                return forward
    return None


def rotate(
    q: Float[Tensor, "lines heads width size"],
    k: Float[Tensor, "lines groups width size"],
    cos: Float[Tensor, "#lines width size"],
    sin: Float[Tensor, "#lines width size"],
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """Rotary embedding of queries and keys, by halves of a head (Su et al. 2021, equation 34).

    It is `x cos + h(x) sin`, where `h` swaps the halves and negates the new first one. Both halves of `cos`, and of
    `sin`, must be equal.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)  # type: ignore[no-untyped-call]


class _Rotate(torch.autograd.Function):
    """A rotation. Its gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    y, half = x * cos, x.shape[-1] // 2
    (first, second), (y_first, y_second), angle = x.split(half, -1), y.split(half, -1), sin[..., :half]
    y_first.addcmul_(second, angle, value=-sign)
    y_second.addcmul_(first, angle, value=sign)
    return y
