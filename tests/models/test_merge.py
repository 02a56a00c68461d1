"""Merged adapters: the sum of float64."""

import torch
from peft import LoraConfig, get_peft_model

from persona_rlhf.models.merge import merge_adapter
from tests.models.architectures import base_of


def test_the_sum_is_of_float64():
    """1 + 2**-30 - 1: float32 keeps nothing of the middle term."""
    model = base_of("llama3").model.bfloat16()
    peft = get_peft_model(model, LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj"]))
    layer = peft.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.lora_B["default"].weight.fill_(1)
        for row, value in enumerate((1, 2.0**-30, -1)):
            layer.lora_A["default"].weight[row] = value
    merged = merge_adapter(peft).model.layers[0].self_attn.q_proj.weight
    assert merged.dtype == torch.bfloat16
    assert (merged == 2.0**-30).all()
