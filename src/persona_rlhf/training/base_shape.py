"""The shape of a base, without its weights: bytes of the frozen weights, and the work and bytes of a step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import find, is_gguf, is_hub_id
from persona_rlhf.config.training import BaseSettings, LoraSettings
from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.attention import packed_attention
from persona_rlhf.models.base import Fp8Linear, fits_fp8, is_linear
from persona_rlhf.models.base_folder import cannot_load, config_reasons
from persona_rlhf.models.model_files import gguf_config
from persona_rlhf.models.model_split import token_logps
from persona_rlhf.models.multi_lora import MultiLoRALinear, attach, lora_matrices
from persona_rlhf.models.packing import pack
from persona_rlhf.models.target_layers import target_layers

_META = torch.device("meta")
_SHAPES = "data/shapes.json"


class StepWork(NamedTuple):
    """A step of one user: its `tokens`; floating-point operations of the forward pass and of `both` passes; the bytes
    `kept` for the backward pass."""

    tokens: int
    forward: int
    both: int
    kept: int


_NF4_BITS = 4.127
"""Bits per weight: four, and a share of the quantization constants, which are quantized too (QLoRA, section 3)."""


class BaseShape:
    """The shape of a base from its config: tensors without values, so nothing is read or computed."""

    def __init__(
        self, config: PreTrainedConfig, lora: LoraSettings, dtype: torch.dtype, quantization: str | None = None
    ) -> None:
        with _META:
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.model.requires_grad_(False).eval()
        self.parameters, self._quantization = self.model.num_parameters(), quantization
        self.spans = attach(self.model, target_layers(self.model, lora).names, lora.rank)
        self.adapter_parameters = max(span.stop for span in self.spans.values())

    @property
    def base_bytes(self) -> int:
        """Bytes of the frozen weights."""
        head = self.model.get_output_embeddings()
        layers = [m for m in self.model.modules() if is_linear(m) and m is not head]
        rest = self.parameters - sum(layer.weight.numel() for layer in layers)
        return int(rest * self.model.dtype.itemsize + sum(map(self._stored, layers)))

    def _stored(self, layer: nn.Linear | Conv1D | Fp8Linear) -> float:
        """Bytes of a linear layer's weight."""
        if self._quantization == "nf4":
            return layer.weight.numel() * _NF4_BITS / 8
        if self._quantization == "fp8" and fits_fp8(layer):
            outputs = layer.weight.shape[1 if isinstance(layer, Conv1D) else 0]
            return layer.weight.numel() + outputs * torch.float32.itemsize
        return layer.weight.numel() * self.model.dtype.itemsize

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * heads * size * self.model.dtype.itemsize)

    def step(self, rows: Sequence[Row]) -> StepWork:
        """The work of one step over these rows: shared prompts once, as packed batches have them."""
        flat = torch.zeros(1, self.adapter_parameters, device=_META, requires_grad=True)
        spans = list(self.spans.values())
        for span, (a, b) in zip(spans, lora_matrices(flat, spans), strict=True):
            layer = self.model.get_submodule(span.name)
            assert isinstance(layer, MultiLoRALinear)
            layer.a, layer.b = a, b
        batch = pack(rows, 1, 0, _META)
        counted = {tensor.untyped_storage()._cdata for tensor in (*self.model.parameters(), flat)}
        kept: list[Tensor] = []  # held, so that no storage is reused and counted once

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage()._cdata not in counted:
                counted.add(tensor.untyped_storage()._cdata)
                kept.append(tensor)
            return tensor

        head = self.model.get_output_embeddings()
        assert head is not None
        with packed_attention(self.model.config.get_text_config()), FlopCounterMode(display=False) as counter:
            with saved_tensors_hooks(keep, lambda tensor: tensor):
                hidden = self.model.base_model(
                    input_ids=batch.input_ids, use_cache=False, position_ids=batch.position_ids, layout=batch.layout
                ).last_hidden_state
                loss = token_logps(head(batch.predictors(hidden.flatten(0, 1))), batch.targets).sum()
            forward = counter.get_total_flops()
            loss.backward()
            both = counter.get_total_flops()
        size = sum(tensor.untyped_storage().nbytes() for tensor in kept)
        return StepWork(batch.input_ids.numel(), forward, both, size)


def shape_of(base: BaseSettings, lora: LoraSettings) -> BaseShape:
    """The shape of a base by its name, from a shipped config, a folder or the hub.

    Raises InputError if there is no config, or if packed attention does not work with its architecture.
    """
    try:
        dtype = torch.float32 if base.dtype == "float32" else torch.bfloat16
        return BaseShape(_config(base.model), lora, dtype, base.quantization)
    except InputError:
        raise
    except (OSError, ValueError, KeyError) as fault:
        raise cannot_load(base.model, fault) from fault


def _config(model: str) -> PreTrainedConfig:
    shipped = json.loads(find(_SHAPES).read_text())
    if model in shipped:
        return AutoConfig.for_model(**shipped[model])
    name = model if is_hub_id(model) else find(model)
    if is_gguf(name):
        return gguf_config(model, Path(name))
    config: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if reasons := list(config_reasons(config.to_dict())):
        raise InputError([Problem(model, None, "base.model", reason) for reason in reasons])
    return config
