"""A base by its shape: counted without weights, against published sizes, hand-made formulas and a real model."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.training import BaseSettings, LoraSettings
from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.training.base_shape import BaseShape, shape_of
from tests.models.tiny import tiny_base

PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "Qwen/Qwen3-8B": 8_190_735_360,
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_shipped_shapes_have_the_published_number_of_parameters(model):
    shape = shape_of(BaseSettings(model=model), LoraSettings())
    assert shape.parameters == PUBLISHED[model]
    assert shape.base_bytes == 2 * PUBLISHED[model]


def test_a_shape_says_what_the_model_itself_says():
    base, lora = tiny_base(), LoraSettings(rank=4)
    shape = BaseShape(base.model.config, lora, torch.float32)
    adapted = AdaptedModel(base, lora)
    assert shape.adapter_parameters == adapted.params_per_user
    assert shape.parameters == sum(weight.numel() for weight in base.model.parameters())
    cache = DynamicCache(config=base.model.config)
    adapted.close()
    base.model(input_ids=torch.arange(10)[None], past_key_values=cache, use_cache=True)
    held = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    assert shape.cache_bytes == held / 10


def test_operations_are_those_of_the_matrix_products():
    """A Llama of one layer, by hand: two operations a weight and token, the head at the completion only."""
    hidden, inner, vocabulary, rank, heads = 32, 64, 100, 4, 4
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=vocabulary, tie_word_embeddings=False,
    )  # fmt: skip
    shape = BaseShape(config, LoraSettings(rank=rank), torch.bfloat16)
    prompt, completion = 7, 5
    step = shape.step([Row(tuple(range(prompt)), tuple(range(completion)))])
    tokens = prompt + completion - 1
    linear = 4 * hidden * hidden + 3 * hidden * inner
    adapters = rank * (4 * 2 * hidden + 3 * (hidden + inner))
    attention = 2 * 2 * tokens * tokens * hidden
    head = 2 * completion * hidden * vocabulary
    assert step.tokens == tokens
    assert step.forward == 2 * tokens * (linear + adapters) + attention + head


def test_a_shared_prompt_is_counted_once_and_more_tokens_keep_more():
    shape = shape_of(BaseSettings(model="HuggingFaceTB/SmolLM2-135M-Instruct"), LoraSettings())
    prompt = tuple(range(50))
    one = shape.step([Row(prompt, (1, 2, 3))])
    shared = shape.step([Row(prompt, (1, 2, 3)), Row(prompt, (4, 5, 6))])
    apart = shape.step([Row(prompt, (1, 2, 3)), Row((9, *prompt[1:]), (4, 5, 6))])
    assert (one.tokens, shared.tokens, apart.tokens) == (52, 54, 104)
    assert one.forward < shared.forward < apart.forward
    assert one.kept < shared.kept < apart.kept
    assert 1.8 < one.both / one.forward < 2.2  # frozen weights have no gradient: the way back costs as much again


def test_a_base_without_a_config_is_told_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot load it"):
        shape_of(BaseSettings(model="nobody/nothing"), LoraSettings())
