"""A causal LM cut into frozen prefix, adapted layers and output head; token_logps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.packing import Batch


def token_logps(
    logits: Float[Tensor, "tokens vocabulary"], targets: Int[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """`log pi(target)` in nats at each position, in at least fp32 whatever the logits' type."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    found: Tensor = _TokenLogps.apply(logits, targets)  # type: ignore[no-untyped-call]
    return found


class _TokenLogps(torch.autograd.Function):
    """Cross entropy that keeps the log-softmax alone, and writes no more than its gradient on the way back."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        logps = torch.log_softmax(logits, 1)
        ctx.save_for_backward(logps, targets)
        return logps.gather(1, targets[:, None]).squeeze(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logps, targets = ctx.saved_tensors
        found = logps.exp().mul_(-gradient[:, None])
        return found.scatter_add_(1, targets[:, None], gradient[:, None]), None


# ----------------------------------------------------------------------------------------------------
# What a language model does after its decoder: the output head, and whatever scales or caps its logits.
# ----------------------------------------------------------------------------------------------------

_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 29}  # held at once: 64 MiB or 2 GiB in float32, but no fewer than those of
_TOKENS = 256  # which a product with a large matrix needs to be worth reading it


class OutputHead:
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
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: OutputHead, each: int) -> Tensor:
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


class SplitModel(NamedTuple):
    """A model in two: `head(decoder(x).last_hidden_state)` is the model."""

    decoder: nn.Module
    head: OutputHead


def split_model(model: PreTrainedModel) -> SplitModel | None:
    """The halves of a model; None where a probe finds that they are not the whole."""
    decoder = model.base_model
    if decoder is model:
        return None
    probe = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        whole = model(input_ids=probe, use_cache=False).logits[0]
        hidden = decoder(input_ids=probe, use_cache=False)
        halves = SplitModel(decoder, OutputHead(model, type(hidden)))
        try:
            same = torch.equal(whole, halves.head(hidden.last_hidden_state[0]))
        except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError, RuntimeError):
            return None
    return halves if same else None


# ----------------------------------------------------------------------------------------------------
# The frozen layers below the first adapted one: what they make of a row is the same in every step and for every user.
#
# So it is computed once, kept, and training starts from there; no gradient goes below it either.
# ----------------------------------------------------------------------------------------------------

States = Mapping[Row, Float[Tensor, "_tokens hidden"]]
"""Of each row the hidden states of its tokens (its completion without the last one) where the adapted layers begin."""


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The name and the list of a model's decoder layers: the list that holds the most."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda found: sum(p.numel() for p in found[1].parameters()), default=None)


def layer_number(name: str, stack: str) -> int | None:
    """The number of the decoder layer that a module lies in, None outside of the stack."""
    return int(name[len(stack) + 1 :].split(".", 1)[0]) if name.startswith(f"{stack}.") else None


class FrozenPrefix:
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
