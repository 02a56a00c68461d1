"""The frozen layers below the first adapted one: what they make of a row is the same in every step and for every user.

So it is computed once, kept, and training starts from there; no gradient goes below it either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from persona_rlhf.preferences.tokens import Row
from persona_rlhf.training.batch import Batch

States = Mapping[Row, Float[Tensor, "_tokens hidden"]]
"""Of each row the hidden states of its tokens (its completion without the last one) where the adapted layers begin."""


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The name and the list of a model's decoder layers: the list that holds the most."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda found: sum(p.numel() for p in found[1].parameters()), default=None)


def layer_number(name: str, stack: str) -> int | None:
    """The number of the decoder layer that a module lies in, None outside of the stack."""
    return int(name[len(stack) + 1 :].split(".", 1)[0]) if name.startswith(f"{stack}.") else None


class Trunk:
    """The decoder layers of `model` below layer `first`."""

    def __init__(self, model: PreTrainedModel, first: int) -> None:
        found = decoder_layers(model)
        assert found is not None
        name, self._layers = found
        parent, _, self._leaf = name.rpartition(".")
        self._parent, self._config = model.get_submodule(parent), model.config.get_text_config()
        self._lower, self._upper = slice(first), slice(first, None)

    @contextmanager
    def _only(self, part: slice) -> Iterator[nn.ModuleList]:
        """Inside, the model has only these layers, and its config knows what each of them is (windows, positions)."""
        layers, kinds = nn.ModuleList(self._layers[part]), getattr(self._config, "layer_types", None)
        setattr(self._parent, self._leaf, layers)
        if kinds is not None:
            self._config.layer_types = kinds[part]
        try:
            yield layers
        finally:
            setattr(self._parent, self._leaf, self._layers)
            if kinds is not None:
                self._config.layer_types = kinds

    @contextmanager
    def from_states(self, states: Float[Tensor, "lines width hidden"]) -> Iterator[None]:
        """Inside, the model computes its upper layers only, and they begin with `states`."""

        def begin(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return with_states(args, kwargs, states)

        with self._only(self._upper) as layers:
            hook = layers[0].register_forward_pre_hook(begin, with_kwargs=True)
            try:
                yield
            finally:
                hook.remove()

    def states(self, forward: Callable[[], object]) -> Float[Tensor, "lines width hidden"]:
        """What comes out of the lower layers while `forward` runs the model."""
        found: list[Tensor] = []

        def end(_: nn.Module, __: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        with self._only(self._lower) as layers:
            hook = layers[-1].register_forward_hook(end)
            try:
                forward()
            finally:
                hook.remove()
        return found[0]


def with_states(
    args: tuple[Any, ...], kwargs: dict[str, Any], states: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of a decoder layer, or a part of one, with other hidden states."""
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})


def cut(batch: Batch, hidden: Float[Tensor, "lines width hidden"]) -> dict[Row, Float[Tensor, "_tokens hidden"]]:
    """The states of every row of a batch; they own their memory."""
    tokens = hidden.flatten(0, 1)
    found = {}
    for row, _, prompt, completion, _ in batch.places:
        fed = len(row.completion) - 1
        found[row] = torch.cat([tokens[prompt : prompt + len(row.prompt)], tokens[completion : completion + fed]])
    return found


def lay(batch: Batch, states: Sequence[States]) -> Float[Tensor, "lines width hidden"]:
    """The states of a batch's rows at their tokens, zero in the padding; `states` has one entry a user."""
    lines, width = batch.ids.shape
    each = batch.rows // len(states)
    first = batch.places[0]
    some = states[first.number // each][first.row]
    nothing = some.new_zeros(lines * width, some.shape[1])
    pieces: list[Tensor] = []
    at = 0
    for row, number, prompt, completion, is_first in batch.places:
        own = states[number // each][row]
        for place, part in ((prompt, own[: len(row.prompt)]), (completion, own[len(row.prompt) :])):
            if place == prompt and not is_first:
                continue
            pieces += [nothing[: place - at], part]
            at = place + len(part)
    pieces.append(nothing[: lines * width - at])
    return torch.cat(pieces).view(lines, width, -1)
