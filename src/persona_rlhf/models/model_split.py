"""A causal LM in three parts: the frozen prefix below the adapters, the adapted layers, and the output head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.device import device_bytes
from persona_rlhf.models.packing import Batch


def token_logps(
    logits: Float[Tensor, "tokens vocabulary"], targets: Int[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """`log pi(target)` in nats at each position, computed in at least float32."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logps: Tensor = _TokenLogps.apply(logits, targets)  # type: ignore[no-untyped-call]
    return logps


class _TokenLogps(torch.autograd.Function):
    """Cross entropy that saves only the softmax. The backward pass writes one tensor, the gradient.

    The softmax of the largest logit is 1 / sum(exp(logit - largest)), which gives the normalizer.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        shares = torch.softmax(logits, 1)
        ctx.save_for_backward(shares, targets)
        return logits.gather(1, targets[:, None]).squeeze(1) - logits.amax(1) + shares.amax(1).log()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        shares, targets = ctx.saved_tensors
        grad_logits = shares * -gradient[:, None]
        return grad_logits.scatter_add_(1, targets[:, None], gradient[:, None]), None


_MAX_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 29}  # held at once: 64 MiB or 2 GiB in float32
_BYTES_PER_LOGIT = 160  # of a GPU's memory: 2^29 logits on 80 GiB, and fewer on a smaller one
_MIN_TOKENS = 256  # at once, even above _MAX_LOGITS: fewer would not be worth reading the head's matrix


OfLogits = Callable[[Float[Tensor, "tokens vocabulary"], Int[Tensor, " tokens"]], Sequence[Tensor]]
"""Tensors with one entry per token, from the logits and the targets of these tokens."""


class OutputHead:
    """The layers behind the decoder: the output head, and any scale or cap of its logits.

    It is the model itself with its decoder replaced by a given result. So logits are computed for chosen tokens only.
    """

    def __init__(self, model: PreTrainedModel, output_type: type[ModelOutput]) -> None:
        """`output_type`: class of the decoder's output."""
        self._model, self._output_type, self._decoder_name = model, output_type, model.base_model_prefix

    def __call__(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocabulary"]:
        decoder = getattr(self._model, self._decoder_name)
        setattr(self._model, self._decoder_name, _FixedDecoder(self._output_type(last_hidden_state=hidden[None])))
        try:
            unused = torch.zeros(1, 1, dtype=torch.int64, device=hidden.device)
            logits: Tensor = self._model(input_ids=unused, use_cache=False).logits.squeeze(0)  # its gradient is a view
        finally:
            setattr(self._model, self._decoder_name, decoder)
        return logits

    def logps(
        self, hidden: Float[Tensor, "tokens hidden"], targets: Int[Tensor, " tokens"]
    ) -> Float[Tensor, " tokens"]:
        """`log pi(target)` in nats at each token: `token_logps` of the logits, which are never all in memory."""
        parts = self._parts(hidden)
        if parts == 1:
            return token_logps(self(hidden), targets)
        logps: Tensor = _ChunkedLogps.apply(hidden, targets, self, parts)  # type: ignore[no-untyped-call]
        return logps

    def by_token(
        self, hidden: Float[Tensor, "tokens hidden"], targets: Int[Tensor, " tokens"], function: OfLogits
    ) -> list[Tensor]:
        """The results of `function`, which treats tokens one by one. All logits are never in memory; no gradients."""
        parts = self._parts(hidden)
        pieces = zip(hidden.tensor_split(parts), targets.tensor_split(parts), strict=True)
        columns = zip(*(function(self(part), part_targets) for part, part_targets in pieces), strict=True)
        return [torch.cat(column) for column in columns]

    def _parts(self, hidden: Float[Tensor, "tokens hidden"]) -> int:
        """Parts of the tokens, of like size: a short one would read the whole matrix for few tokens."""
        vocabulary: int = self._model.config.get_text_config().vocab_size
        device = hidden.device
        most = _MAX_LOGITS[device.type]
        if device.type == "cuda":
            most = min(most, device_bytes(device) // _BYTES_PER_LOGIT)
        return max(1, math.ceil(len(hidden) / max(_MIN_TOKENS, most // vocabulary)))


class _ChunkedLogps(torch.autograd.Function):
    """Log-probabilities of one of several parts of the tokens at a time.

    A token's log-probability depends on its own hidden state alone. So the gradient of the sum is computed in the
    forward pass and scaled in the backward pass (Hsu et al. 2024, "Liger Kernel").
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: OutputHead, parts: int) -> Tensor:
        logps, gradients = list[Tensor](), list[Tensor]()
        for part, part_targets in zip(hidden.tensor_split(parts), targets.tensor_split(parts), strict=True):
            if not ctx.needs_input_grad[0]:
                logps.append(token_logps(head(part), part_targets))
                continue
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                part_logps = token_logps(head(leaf), part_targets)
                gradients += torch.autograd.grad(part_logps.sum(), [leaf])
            logps.append(part_logps.detach())
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        [gradients] = ctx.saved_tensors
        return gradients * gradient[:, None].to(gradients.dtype), None, None, None


class _FixedDecoder(nn.Module):
    """A decoder that returns the given output for any input."""

    def __init__(self, output: ModelOutput) -> None:
        super().__init__()
        self._output = output

    def forward(self, *_: object, **__: object) -> ModelOutput:
        return self._output


class SplitModel(NamedTuple):
    """A model as decoder and output head: `head(decoder(x).last_hidden_state)` equals the model's logits."""

    decoder: nn.Module
    head: OutputHead


def split_model(model: PreTrainedModel) -> SplitModel | None:
    """Decoder and output head of a model; None if their composition differs from the model on a probe input."""
    decoder = model.base_model
    if decoder is model:
        return None
    probe = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        logits = model(input_ids=probe, use_cache=False).logits[0]
        output = decoder(input_ids=probe, use_cache=False)
        split = SplitModel(decoder, OutputHead(model, type(output)))
        try:
            same = torch.equal(logits, split.head(output.last_hidden_state[0]))
        except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError, RuntimeError):
            return None
    return split if same else None


HiddenStates = Mapping[Row, Float[Tensor, "_tokens hidden"]]
"""For each row, the hidden states of its input tokens at the lowest adapted layer. The completion's last token is no
input."""


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Name and list of a model's decoder layers: the module list with the most parameters."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda entry: sum(p.numel() for p in entry[1].parameters()), default=None)


def max_row_length(config: PreTrainedConfig) -> float:
    """Longest row, in tokens, in which every layer of a (text) config attends to all earlier tokens.

    Infinite without sliding windows; 0 for layers of another type.
    """
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not types <= {"full_attention", "sliding_attention"}:
        return 0
    window: int | None = getattr(config, "sliding_window", None)  # None or 0: none
    return window or (0 if "sliding_attention" in types else math.inf)


def layer_number(name: str, stack: str) -> int | None:
    """Number of the decoder layer that contains a module; None outside of the stack."""
    return int(name[len(stack) + 1 :].split(".", 1)[0]) if name.startswith(f"{stack}.") else None


class FrozenPrefix:
    """The decoder layers of `model` below layer `first`, the lowest adapted one.

    Their hidden states of a row are the same in every step and for every user. So they are computed once, and training
    starts from them.
    """

    def __init__(self, model: PreTrainedModel, first: int) -> None:
        decoder = decoder_layers(model)
        assert decoder is not None
        name, self._layers = decoder
        parent, _, self._list_name = name.rpartition(".")
        self._parent, self._config = model.get_submodule(parent), model.config.get_text_config()
        self._lower, self._upper = slice(first), slice(first, None)

    @contextmanager
    def _only(self, part: slice) -> Iterator[nn.ModuleList]:
        """Inside, the model has only these layers, and its config only their types (windows, positions)."""
        layers, layer_types = nn.ModuleList(self._layers[part]), getattr(self._config, "layer_types", None)
        setattr(self._parent, self._list_name, layers)
        if layer_types is not None:
            self._config.layer_types = layer_types[part]
        try:
            yield layers
        finally:
            setattr(self._parent, self._list_name, self._layers)
            if layer_types is not None:
                self._config.layer_types = layer_types

    @contextmanager
    def start_from(self, states: Float[Tensor, "lines width hidden"]) -> Iterator[None]:
        """Inside, the model computes its upper layers only, with `states` as their input."""

        def replace(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return replace_states(args, kwargs, states)

        with self._only(self._upper) as layers:
            hook = layers[0].register_forward_pre_hook(replace, with_kwargs=True)
            try:
                yield
            finally:
                hook.remove()

    def run(self, forward: Callable[[], object]) -> Float[Tensor, "lines width hidden"]:
        """Output of the lower layers while `forward` runs the model."""
        outputs: list[Tensor] = []

        def record(_: nn.Module, __: Any, output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        with self._only(self._lower) as layers:
            hook = layers[-1].register_forward_hook(record)
            try:
                forward()
            finally:
                hook.remove()
        return outputs[0]


def replace_states(
    args: tuple[Any, ...], kwargs: dict[str, Any], states: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call of a decoder layer, or of a part of one, with other hidden states."""
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})


def unpack_states(
    batch: Batch, hidden: Float[Tensor, "lines width hidden"]
) -> dict[Row, Float[Tensor, "_tokens hidden"]]:
    """Hidden states of every row of a batch, each with its own memory."""
    tokens = hidden.flatten(0, 1)
    states = {}
    for place in batch.row_places:
        states[place.row] = torch.cat([tokens[start : start + length] for start, length in place.runs])
    return states


def pack_states(batch: Batch, states: Sequence[HiddenStates]) -> Float[Tensor, "lines width hidden"]:
    """Hidden states of a batch's rows at their tokens, zero in the padding. `states` has one entry per user."""
    lines, width = batch.input_ids.shape
    rows_per_user = batch.row_count // len(states)
    first = batch.row_places[0]
    example = states[first.number // rows_per_user][first.row]
    padding = example.new_zeros(lines * width, example.shape[1])
    pieces: list[Tensor] = []
    end = 0
    for place in batch.row_places:
        row_states = states[place.number // rows_per_user][place.row]
        lengths = [length for _, length in place.runs]
        owned = (place.prefix.repeat == 0, place.owns_prompt, True)
        for (start, _), part, owns in zip(place.runs, row_states.split(lengths), owned, strict=True):
            if owns:
                pieces += [padding[: start - end], part]
                end = start + len(part)
    pieces.append(padding[: lines * width - end])
    return torch.cat(pieces).view(lines, width, -1)
