"""A model's own norms, rotations and gated activations as one kernel each, where a tensor is large enough for it.

The formulas of `transformers` go over their input five to ten times, a compiled one once. But a call of it costs its
host about a tenth of a millisecond (measured on a CPU), and a device of four terabytes a second goes over 2^24 elements
in bfloat16 in 17 microseconds: below that nothing is compiled, and nothing waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel

from persona_rlhf.training.swap import ROTARY, Swap, rotating

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


def compiled(model: PreTrainedModel, large: int = _LARGE) -> Swap:
    """All such of a model. An MLP that does more than to gate is found out where the whole is tried out."""
    norms: list[Any] = [m for m in model.modules() if "RMSNorm" in type(m).__name__]
    formulas = {kind: Compiled(kind.forward, [1], large) for kind in {type(norm) for norm in norms}}
    gate, gated = Compiled(_gate, [0, 1], large), [m for m in model.modules() if all(hasattr(m, n) for n in _GATED)]
    forwards: dict[nn.Module, Callable[..., Any]] = {norm: partial(formulas[type(norm)], norm) for norm in norms}
    forwards |= {mlp: partial(_mlp, mlp, gate) for mlp in gated}
    return Swap(forwards, {place: Compiled(getattr(place, ROTARY), [0, 1], large) for place in rotating(model)})


def _gate(gates: Tensor, ups: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    return activation(gates) * ups


def _mlp(mlp: Any, gate: Compiled, x: Tensor) -> Any:
    return mlp.down_proj(gate(mlp.gate_proj(x), mlp.up_proj(x), mlp.act_fn))
