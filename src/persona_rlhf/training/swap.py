"""Other ways to compute what a model computes, put in its place for a while."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

ROTARY = "apply_rotary_pos_emb"
"""The function by which attention rotates queries and keys, in the Python module of the model's kind."""


class Swap:
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
