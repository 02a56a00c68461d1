"""The shape of a base without its weights: what it and its adapters weigh, and what a step of it takes, by counting."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from persona_rlhf.inputs.bundled import find, is_hub_id
from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.preferences.tokens import Row
from persona_rlhf.training.attention import packed
from persona_rlhf.training.batch import pack
from persona_rlhf.training.fp8 import Fp8Linear, fits
from persona_rlhf.training.lora import FleetLinear, attach, matrices
from persona_rlhf.training.losses import token_logps
from persona_rlhf.training.quantized import is_linear
from persona_rlhf.training.settings import BaseSettings, LoraSettings
from persona_rlhf.training.targets import targets

_META = torch.device("meta")
_SHAPES = "data/shapes.json"


class Step(NamedTuple):
    """A step of one user: its `tokens`; floating-point operations of the way there and of both ways; bytes that it
    keeps for the way back."""

    tokens: int
    forward: int
    both: int
    kept: int


_NF4_BITS = 4.127
"""Bits a weight: four, and its share of the constants, which are quantized themselves (QLoRA, section 3)."""


class Shape:
    """A base as its config describes it: tensors without values, so that nothing is read and nothing computed."""

    def __init__(
        self, config: PreTrainedConfig, lora: LoraSettings, dtype: torch.dtype, quantization: str | None = None
    ) -> None:
        with _META:
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.model.requires_grad_(False).eval()
        self.parameters, self._quantization = self.model.num_parameters(), quantization
        self.spans = attach(self.model, targets(self.model, lora).names, lora.rank, lora.alpha / lora.rank)
        self.adapter_parameters = max(span.stop for span in self.spans.values())

    @property
    def base_bytes(self) -> int:
        """Of the frozen weights."""
        head = self.model.get_output_embeddings()
        layers = [m for m in self.model.modules() if is_linear(m) and m is not head]
        rest = self.parameters - sum(layer.weight.numel() for layer in layers)
        return int(rest * self.model.dtype.itemsize + sum(map(self._stored, layers)))

    def _stored(self, layer: nn.Linear | Conv1D | Fp8Linear) -> float:
        """Bytes of a linear layer's weight."""
        if self._quantization == "nf4":
            return layer.weight.numel() * _NF4_BITS / 8
        if self._quantization == "fp8" and fits(layer):
            outputs = layer.weight.shape[1 if isinstance(layer, Conv1D) else 0]
            return layer.weight.numel() + outputs * torch.float32.itemsize
        return layer.weight.numel() * self.model.dtype.itemsize

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one token."""
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * heads * size * self.model.dtype.itemsize)

    def step(self, rows: Sequence[Row]) -> Step:
        """Counts one step over these rows: shared prompts once, as the fleet lays them out."""
        flat = torch.zeros(1, self.adapter_parameters, device=_META, requires_grad=True)
        spans = list(self.spans.values())
        for span, (a, b) in zip(spans, matrices(flat, spans), strict=True):
            layer = self.model.get_submodule(span.name)
            assert isinstance(layer, FleetLinear)
            layer.a, layer.b = a, b
        batch = pack(rows, 1, 0, _META)
        known = {tensor.untyped_storage()._cdata for tensor in (*self.model.parameters(), flat)}
        kept: list[Tensor] = []  # held on to, so that no storage takes another's place

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage()._cdata not in known:
                known.add(tensor.untyped_storage()._cdata)
                kept.append(tensor)
            return tensor

        head = self.model.get_output_embeddings()
        assert head is not None
        with packed(self.model.config.get_text_config()), FlopCounterMode(display=False) as counter:
            with saved_tensors_hooks(keep, lambda tensor: tensor):
                hidden = self.model.base_model(
                    input_ids=batch.ids, use_cache=False, position_ids=batch.positions, sight=batch.sight
                ).last_hidden_state
                loss = token_logps(head(batch.source(hidden.flatten(0, 1))), batch.targets).sum()
            forward = counter.get_total_flops()
            loss.backward()
            both = counter.get_total_flops()
        size = sum(tensor.untyped_storage().nbytes() for tensor in kept)
        return Step(batch.ids.numel(), forward, both, size)


def shape_of(base: BaseSettings, lora: LoraSettings) -> Shape:
    """The shape of a base by its name: a folder's config, one that is shipped, or the hub's.

    Raises InputError where there is none, or the packed attention that is counted with does not fit it.
    """
    try:
        dtype = torch.float32 if base.dtype == "float32" else torch.bfloat16
        return Shape(_config(base.model), lora, dtype, base.quantization)
    except (OSError, ValueError, KeyError) as fault:
        sentence = f"no config of it can be had ({str(fault).splitlines()[0]}); check the name and the network"
        raise InputError([Problem(base.model, None, "base.model", sentence)]) from fault


def _config(model: str) -> PreTrainedConfig:
    shipped = json.loads(find(_SHAPES).read_text())
    if model in shipped:
        return AutoConfig.for_model(**shipped[model])
    name = model if is_hub_id(model) else find(model)
    config: PreTrainedConfig = AutoConfig.from_pretrained(name)
    return config
