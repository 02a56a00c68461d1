"""A tiny random Llama that speaks single characters, and the adapters of a few users."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from persona_rlhf.config.training import LoraSettings
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import Base

CHARACTERS = "abcdefghijklmnopqrstuvwxyz .!?"
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role[0] + '>' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "</s>", "<u>", "<a>", "<s>"]
    vocabulary = {token: n for n, token in enumerate([*special, "<unk>", *CHARACTERS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", extra_special_tokens=special[2:]
    )
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="session")
def base() -> Base:
    torch.manual_seed(0)
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=True,
        eos_token_id=words.eos_token_id,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.requires_grad_(False).eval()
    return Base(model, words, "tiny", "0" * 64, 256)


@pytest.fixture
def adapted(base: Base):
    model = AdaptedModel(base, LoraSettings(rank=2, alpha=4))
    yield model
    model.close()


@pytest.fixture
def adapters(adapted: AdaptedModel) -> torch.Tensor:
    """Five users: from one who changes nothing to one who changes almost every answer."""
    noise = torch.randn(5, adapted.params_per_user, generator=torch.Generator().manual_seed(1))
    return noise * torch.tensor([0.0, 0.03, 0.06, 0.12, 0.3])[:, None]
