"""One toy base of random weights for each family of models, made from that family's own config class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from persona_rlhf.models.base import Base
from tests.models.tiny import EOS, tiny_tokenizer

VOCABULARY = 256
CONTEXT = 256
LAYERS = 3
WINDOW = 20
"""Of the models with sliding windows, in tokens: shorter than some of the tests' rows."""

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,  # wide enough that answers are not uniform
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}


def _gpt2() -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=32,
        n_layer=LAYERS,
        n_head=4,
        initializer_range=0.2,
        bos_token_id=EOS,
        eos_token_id=EOS,
    )


ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama3": lambda: LlamaConfig(**_SIZES, rope_parameters=ROPE),
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=16, tie_word_embeddings=True),
    "gemma2": lambda: Gemma2Config(
        **_SIZES,
        head_dim=8,
        query_pre_attn_scalar=4,
        sliding_window=WINDOW,
        attn_logit_softcapping=1.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_SIZES,
        head_dim=8,
        query_pre_attn_scalar=4,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "mistral": lambda: MistralConfig(**_SIZES, sliding_window=None),
    "mistral-window": lambda: MistralConfig(**_SIZES, sliding_window=WINDOW),
    "phi3": lambda: Phi3Config(**_SIZES),
    "smollm3": lambda: SmolLM3Config(**_SIZES, no_rope_layers=[1, 0, 1]),
    "olmo2": lambda: Olmo2Config(**_SIZES),
    "granite": lambda: GraniteConfig(
        **_SIZES, logits_scaling=2.0, residual_multiplier=0.5, embedding_multiplier=3.0, attention_multiplier=0.2
    ),
    "gpt-neox": lambda: GPTNeoXConfig(**_SIZES, use_parallel_residual=True, attention_bias=True),
    "gpt2": _gpt2,
    "qwen2-moe": lambda: Qwen2MoeConfig(**_SIZES, **_EXPERTS, shared_expert_intermediate_size=24),
    "qwen3-moe": lambda: Qwen3MoeConfig(**_SIZES, **_EXPERTS, head_dim=8, mlp_only_layers=[1]),
}


def base_of(name: str, tokenizer: PreTrainedTokenizerFast | None = None) -> Base:
    """A frozen base of that family; norms and biases drawn too, so that none of them is neutral."""
    torch.manual_seed(0)
    config, tokenizer = CONFIGS[name](), tokenizer or tiny_tokenizer(VOCABULARY)
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    model.requires_grad_(False).eval()
    return Base(model, tokenizer, name, "0", CONTEXT)
