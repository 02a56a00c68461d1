"""What a language model does after its decoder: the output head, and whatever scales or caps its logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from persona_rlhf.training.losses import token_logps

_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 29}  # held at once: 64 MiB or 2 GiB in float32, but no fewer than those of
_TOKENS = 256  # which a product with a large matrix needs to be worth reading it


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

    def logps(
        self, hidden: Float[Tensor, "tokens hidden"], targets: Int[Tensor, " tokens"]
    ) -> Float[Tensor, " tokens"]:
        """`log pi(target)` in nats at each token, as `losses.token_logps` of the logits, which are never all held."""
        vocabulary = self._model.config.get_text_config().vocab_size
        each = max(_TOKENS, _LOGITS[hidden.device.type] // vocabulary)
        if len(hidden) <= each:
            return token_logps(self(hidden), targets)
        found: Tensor = _Logps.apply(hidden, targets, self, each)  # type: ignore[no-untyped-call]
        return found


class _Logps(torch.autograd.Function):
    """Some tokens at a time. A token's log-probability depends on its own hidden state alone, so the gradient of their
    sum is known on the way forward, and is scaled on the way back (as Hsu et al. 2024, "Liger Kernel", do)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, each: int) -> Tensor:
        found, slopes = list[Tensor](), list[Tensor]()
        for part, own in zip(hidden.split(each), targets.split(each), strict=True):
            if not ctx.needs_input_grad[0]:
                found.append(token_logps(head(part), own))
                continue
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                logps = token_logps(head(leaf), own)
                slopes += torch.autograd.grad(logps.sum(), [leaf])
            found.append(logps.detach())
        if slopes:
            ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        [slopes] = ctx.saved_tensors
        return slopes * gradient[:, None].to(slopes.dtype), None, None, None


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
