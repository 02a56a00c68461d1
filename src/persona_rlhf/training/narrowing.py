"""The last decoder layer, where only the tokens whose logits are read need more than keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from persona_rlhf.training.lookup import Lookup
from persona_rlhf.training.lora import FleetLinear
from persona_rlhf.training.quantized import is_linear
from persona_rlhf.training.trunk import decoder_layers, with_states


class Narrowing:
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
    def to(self, read: Lookup, shares: Sequence[int]) -> Iterator[None]:
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


def narrowing(model: PreTrainedModel, probe: Callable[[], object]) -> Narrowing | None:
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
    return Narrowing(layer, attention, called[-1]) if called else None
