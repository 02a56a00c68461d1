"""Tiny random models and made-up token rows for the tests of the training floor."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from persona_rlhf.data.pairs import Message, PreferencePair
from persona_rlhf.data.tokenize import PairRow, Row, UserRows
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import Base
from persona_rlhf.training.constraint import ConstraintData, ConstraintExample

VOCABULARY = 96
EOS = 1


def tiny_tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Token n is the word `wn`, so that texts and token rows say the same; 0 pads and EOS ends."""
    words = {f"w{n}": n for n in range(vocabulary)}
    words = {"<pad>": 0, "<end>": EOS} | {word: n for word, n in words.items() if n > EOS}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<pad>")


def tiny_base(
    hidden: int = 32,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    vocabulary: int = VOCABULARY,
) -> Base:
    """A random Llama, frozen; weights drawn wide enough that its answers are not uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
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
    return Base(model, tiny_tokenizer(vocabulary), "tiny", f"seed {seed}", 256)


def random_flat(adapted: AdaptedModel, users: int, seed: int = 0, size: float = 0.1) -> torch.Tensor:
    """Adapters `[users, params]` with B away from zero, so that every user's model differs."""
    draw = torch.Generator().manual_seed(seed)
    flat = torch.randn(users, adapted.params_per_user, generator=draw) * size
    return flat.to(torch.promote_types(adapted.base.model.dtype, torch.float32))


def random_row(draw: torch.Generator, prompt: int, completion: int, vocabulary: int = VOCABULARY) -> Row:
    """A row of these lengths (tokens), its completion ended."""
    ids = torch.randint(2, vocabulary, (prompt + completion - 1,), generator=draw).tolist()
    return Row(tuple(ids[:prompt]), (*ids[prompt:], EOS))


def user_rows(
    user_id: str, pairs: int, seed: int, heldout: int = 0, weight: float = 1.0, even: bool = False
) -> UserRows:
    """A user with random preference pairs of varied lengths, or all of one length where `even`."""
    draw = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        count = high - 1 if even else int(torch.randint(low, high, (1,), generator=draw))
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


def constraint_bank(seed: int = 0, categories: int = 2, limit: float = 0.05) -> ConstraintData:
    """A made-up bank: three probes a category, each with two refusals, and openings on every second probe."""
    draw = torch.Generator().manual_seed(seed)
    examples = []
    for category in range(categories):
        in_category = []
        for n in range(3):
            first = random_row(draw, 4 + n, 6)
            second = Row(first.prompt, random_row(draw, 1, 9).completion)
            opened = n % 2 == 0
            compliance = Row(first.prompt, random_row(draw, 1, 4).completion) if opened else None
            in_category.append(
                ConstraintExample((first, second), compliance, random_row(draw, 5, 4) if opened or category else None)
            )
        examples.append(in_category)
    return ConstraintData([f"category {n}" for n in range(categories)], [limit] * categories, examples)
