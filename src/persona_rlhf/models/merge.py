"""Adapters merged into the weights of a model, so that anybody's merge gives the same bits."""

from __future__ import annotations

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel


def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """The model below, its weights W now W + (lora_alpha / r) B A, summed in float64 and rounded to their type."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_A.double()
            layer.lora_B.double()
            weights = layer.get_base_layer().weight
            for name in layer.active_adapters:
                change = layer.get_delta_weight(name)  # type: ignore[operator]
                weights.data = (weights.data.double() + change).to(weights.dtype)
    plain: PreTrainedModel = model.unload()
    return plain
