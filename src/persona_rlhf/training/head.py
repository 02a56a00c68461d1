"""What a language model does after its decoder: the output head, and whatever scales or caps its logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput


class Head:
    """The model itself, with its decoder's result given: so logits are computed at the tokens that need them only."""

    def __init__(self, model: PreTrainedModel, kind: type[ModelOutput]) -> None:
        """`kind`: what the decoder returns."""
        self._model, self._kind, self._place = model, kind, model.base_model_prefix

    def __call__(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocabulary"]:
        decoder = getattr(self._model, self._place)
        setattr(self._model, self._place, _Given(self._kind(last_hidden_state=hidden[None])))
        try:
            unread = torch.zeros(1, 1, dtype=torch.int64, device=hidden.device)
            logits: Tensor = self._model(input_ids=unread, use_cache=False).logits.squeeze(0)  # its gradient is a view
        finally:
            setattr(self._model, self._place, decoder)
        return logits


class _Given(nn.Module):
    """Stands in for a decoder, whatever it is asked."""

    def __init__(self, result: ModelOutput) -> None:
        super().__init__()
        self._result = result

    def forward(self, *_: object, **__: object) -> ModelOutput:
        return self._result


class Halves(NamedTuple):
    """A model in two: `head(decoder(x).last_hidden_state)` is the model."""

    decoder: nn.Module
    head: Head


def split(model: PreTrainedModel) -> Halves | None:
    """The halves of a model; None where a probe finds that they are not the whole."""
    decoder = model.base_model
    if decoder is model:
        return None
    probe = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        whole = model(input_ids=probe, use_cache=False).logits[0]
        hidden = decoder(input_ids=probe, use_cache=False)
        halves = Halves(decoder, Head(model, type(hidden)))
        try:
            same = torch.equal(whole, halves.head(hidden.last_hidden_state[0]))
        except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError, RuntimeError):
            return None
    return halves if same else None
