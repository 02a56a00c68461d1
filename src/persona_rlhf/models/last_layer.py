"""The last decoder layer without the tokens that nobody reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from persona_rlhf.models.base import is_linear
from persona_rlhf.models.gather import DeterministicGather
from persona_rlhf.models.model_split import decoder_layers, replace_states
from persona_rlhf.models.multi_lora import MultiLoRALinear


class LastLayerPruning:
    """The last decoder layer computed for chosen tokens only, from the output projection of its attention on.

    The layer's input is cut to these tokens, but its first part (a norm or the attention) still gets all of them. So
    keys and values are those of all tokens. The attention's output is cut before its projection. A layer of another
    structure gives wrong values or none, so the equivalence check comes before use.
    """

    def __init__(self, layer: nn.Module, attention: nn.Module, projection: nn.Module) -> None:
        """`projection`: the last linear layer of `attention`."""
        self._layer, self._projection = layer, projection
        unpruned = set(attention.modules()) - {projection}
        self._pruned = [m for m in layer.modules() if isinstance(m, MultiLoRALinear) and m not in unpruned]

    @contextmanager
    def to(self, tokens: DeterministicGather, tokens_per_user: Sequence[int]) -> Iterator[None]:
        """Inside, the decoder's hidden states are those of `tokens`, `[1, tokens, hidden]`."""
        inputs: list[Tensor] = []

        def cut(x: Tensor) -> Tensor:
            return tokens(x.flatten(0, 1))[None]

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            inputs.append(args[0] if args else kwargs["hidden_states"])
            for module in self._pruned:
                module.rows_per_user = tokens_per_user
            return replace_states(args, kwargs, cut(inputs[0]))

        def restore(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return replace_states(args, kwargs, inputs.pop()) if inputs else None

        def cut_input(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            return (cut(args[0]),)

        with ExitStack() as hooks:
            hooks.callback(self._layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            for part in self._layer.children():
                hooks.callback(part.register_forward_pre_hook(restore, with_kwargs=True).remove)
            hooks.callback(self._projection.register_forward_pre_hook(cut_input).remove)
            yield


def last_layer_pruning(model: PreTrainedModel, forward: Callable[[], object]) -> LastLayerPruning | None:
    """Pruning of a model's last layer, not yet checked; None without decoder layers. `forward` runs the model once."""
    decoder = decoder_layers(model)
    layer = decoder[1][-1] if decoder and len(decoder[1]) else None
    attention = next((m for m in layer.modules() if "Attention" in type(m).__name__), None) if layer else None
    if layer is None or attention is None:
        return None
    called: list[nn.Module] = []
    frozen = {id(m.frozen) for m in attention.modules() if isinstance(m, MultiLoRALinear)}
    with ExitStack() as hooks:
        for module in attention.modules():
            if (isinstance(module, MultiLoRALinear) or is_linear(module)) and id(module) not in frozen:
                hooks.callback(module.register_forward_pre_hook(lambda m, _: called.append(m)).remove)
        forward()
    return LastLayerPruning(layer, attention, called[-1]) if called else None
