"""A tiny random Llama that speaks single characters, and the adapters of a few users."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from persona_rlhf.config.training import LoraSettings
from persona_rlhf.evaluation.refusals import answer_text
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


def random_base(tied: bool) -> Base:
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
        tie_word_embeddings=tied,
        eos_token_id=words.eos_token_id,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.requires_grad_(False).eval()
    return Base(model, words, "tiny", "0" * 64, 256)


def written_out(
    adapted: AdaptedModel, prompt: tuple[int, ...], tokens: int, judge: Callable[[str], bool]
) -> tuple[str, bool, int]:
    """The oracle of a judged answer: text, verdict, tokens.

    The answer is written in one go, at a limit that doubles twice while the answer reads as a refusal.
    """
    for limit in (tokens, 2 * tokens, 4 * tokens):
        ((answer,),) = adapted.generate([[prompt]], limit)
        text = answer_text(adapted, answer)
        if answer.finished or not judge(text):
            break
    return text, answer.finished and judge(text), len(answer.ids)


@pytest.fixture(scope="session")
def base() -> Base:
    return random_base(tied=True)


@pytest.fixture(scope="session")
def ending_base() -> Base:
    """A model that ends about half of its answers within a few tokens; `base` hardly ever ends one."""
    ending = random_base(tied=False)
    ending.model.lm_head.weight[ending.tokenizer.eos_token_id] *= 1.5
    return ending


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
