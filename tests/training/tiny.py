"""Tiny random models and made-up token rows for the tests of the training floor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from persona_rlhf.preferences.pairs import Message, PreferencePair
from persona_rlhf.preferences.tokens import PairRow, Row, UserRows
from persona_rlhf.training.base import Base

VOCABULARY = 96
EOS = 1


def tiny_base(hidden: int = 32, layers: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> Base:
    """A random Llama, frozen; weights drawn wide enough that its answers are not uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=True,
        eos_token_id=EOS,
        bos_token_id=None,
        pad_token_id=0,
    )
    model: Any = LlamaForCausalLM(config).to(dtype)
    model.requires_grad_(False).eval()
    tokenizer: Any = SimpleNamespace(eos_token_id=EOS, pad_token_id=0)
    return Base(model, tokenizer, "tiny", f"seed {seed}", 256)


def user_rows(user_id: str, pairs: int, seed: int, heldout: int = 0, weight: float = 1.0) -> UserRows:
    """A user with random preference pairs of varied lengths."""
    draw = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        count = int(torch.randint(low, high, (1,), generator=draw))
        return tuple(torch.randint(2, VOCABULARY, (count,), generator=draw).tolist())

    rows = []
    for n in range(pairs + heldout):
        pair = PreferencePair(
            user_id=user_id,
            prompt=(Message("user", f"prompt {n}"),),
            chosen="a",
            rejected="b",
            id=f"{user_id}-{n}",
            created_at=None,
            source=None,
            weight=weight,
            split="train" if n < pairs else "heldout",
            clean_choice=None,
            file="made.jsonl",
            line=n + 1,
        )
        prompt = ids(3, 9)
        rows.append(PairRow(pair, Row(prompt, (*ids(4, 16), EOS)), Row(prompt, (*ids(4, 16), EOS))))
    return UserRows(user_id, rows[:pairs], rows[pairs:])
