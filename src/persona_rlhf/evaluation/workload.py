"""What a benchmark trains: a base of a fixed shape with made-up pairs, or the bundled base with its users."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from persona_rlhf.inputs.bundled import find
from persona_rlhf.preferences.messages import Message
from persona_rlhf.preferences.pairs import PreferencePair, read_pairs
from persona_rlhf.preferences.tokens import PairRow, Row, UserRows, tokenize
from persona_rlhf.training.bank import Anchor, ConstraintBank
from persona_rlhf.training.base import Base, load_base
from persona_rlhf.training.lora import LayerSpan, attach, detach
from persona_rlhf.training.settings import BaseSettings, DpoSettings, LoraSettings
from persona_rlhf.training.targets import adaptable_layers

Shape = Literal["bundled", "192x4", "256x6", "512x8"]
VOCABULARY = 1536
SEED = 0
PAIRS_AND_EPOCHS = {"bundled": (80, 3), "192x4": (80, 3), "256x6": (32, 2), "512x8": (16, 2)}
"""A user's work: less for larger shapes, so that each takes minutes on a CPU."""


class Work(NamedTuple):
    """What every contender does: train these users on this base. `spans` is the layout of a flat adapter; `bank` is
    made up, for the contender with the constraint on."""

    base: Base
    users: Sequence[UserRows]
    spans: list[LayerSpan]
    lora: LoraSettings
    dpo: DpoSettings
    bank: ConstraintBank
    clock: Callable[[], float]


def make_work(shape: str, users: int, pairs: int, epochs: int, device: torch.device) -> Work:
    """The work of a `Shape`; a fixed one is the same on every machine."""
    if shape == "bundled":
        base = load_base(BaseSettings(model="data/base"))
        rows = tokenize(read_pairs(find("data/users"), 0.25), base.tokenizer, base.context)
        people = [UserRows(user.user_id, user.train[:pairs], []) for user in rows[:users]]
    else:
        hidden, layers = map(int, shape.split("x"))
        base = _random_base(hidden, layers, device)
        people = made_users(range(users), pairs)
    lora, dpo = LoraSettings(), DpoSettings(epochs=epochs)
    bank = _made_bank(len(base.tokenizer))
    spans = attach(base.model, adaptable_layers(base.model, lora.target_modules), lora.rank, lora.alpha / lora.rank)
    detach(base.model, list(spans))
    return Work(base, people, list(spans.values()), lora, dpo, bank, _clock(device))


def _random_base(hidden: int, layers: int, device: torch.device) -> Base:
    """A Llama of random weights: heads of 32, half as many key-value heads, three times as wide inside, tied head."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).requires_grad_(False).eval()
    model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    words = {"<pad>": 0, "<end>": 1} | {f"w{n}": n for n in range(2, VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<end>"
    )
    return Base(model, tokenizer, f"random {hidden}x{layers}", f"seed {SEED}", 1024)


def made_users(numbers: Iterable[int], pairs: int, vocabulary: int = VOCABULARY) -> list[UserRows]:
    """Users who differ by their number alone."""
    return [_made_user(f"user {n}", pairs, n, vocabulary) for n in numbers]


def _made_user(user_id: str, pairs: int, seed: int, vocabulary: int) -> UserRows:
    """Pairs of random tokens: 12 to 30 of a prompt, 12 to 30 and an end token a side."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for n in range(pairs):
        prompt = _ids(draw, vocabulary)
        pair = PreferencePair(
            user_id,
            (Message("user", "made up"),),
            "a",
            "b",
            f"{user_id} {n}",
            None,
            None,
            1.0,
            "train",
            None,
            "made",
            n,
        )
        rows.append(PairRow(pair, Row(prompt, (*_ids(draw, vocabulary), 1)), Row(prompt, (*_ids(draw, vocabulary), 1))))
    return UserRows(user_id, rows, [])


def _made_bank(vocabulary: int) -> ConstraintBank:
    """A bank of made-up anchors in the size of a real one's rows: four categories of sixteen probes."""
    draw = torch.Generator().manual_seed(SEED)
    anchors = []
    for _ in range(4):
        prompts = [_ids(draw, vocabulary) for _ in range(16)]
        openings = [_ids(draw, vocabulary)[:8] for _ in range(16)]
        refusals = [(Row(prompt, (*_ids(draw, vocabulary), 1)),) for prompt in prompts]
        anchors.append(
            [
                Anchor(refused, Row(prompt, opening), Row(_ids(draw, vocabulary), refused[0].completion[:8]))
                for prompt, opening, refused in zip(prompts, openings, refusals, strict=True)
            ]
        )
    return ConstraintBank([f"category {n}" for n in range(4)], [0.3] * 4, anchors)


def _ids(draw: torch.Generator, vocabulary: int = VOCABULARY) -> tuple[int, ...]:
    length = int(torch.randint(12, 31, (1,), generator=draw))
    return tuple(torch.randint(2, vocabulary, (length,), generator=draw).tolist())


def _clock(device: torch.device) -> Callable[[], float]:
    """Seconds of this process's CPU time; on a GPU, wall seconds when it has done all it was given."""
    if device.type == "cpu":
        return time.process_time

    def drained() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return drained
