"""What a benchmark trains: a base of a fixed shape with made-up pairs, or the bundled base with its users."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

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
LENGTHS = (12, 30)
"""Least and most tokens of a made-up prompt or answer."""
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
        base = random_base(_llama(*map(int, shape.split("x"))), device, f"random {shape}")
        people = made_users(range(users), pairs)
    return work_on(base, people, epochs)


def work_on(base: Base, people: Sequence[UserRows], epochs: int) -> Work:
    """What it takes to train these users on a base that is at hand."""
    lora, dpo = LoraSettings(), DpoSettings(epochs=epochs)
    bank, device = _made_bank(len(base.tokenizer)), base.device
    spans = attach(base.model, adaptable_layers(base.model, lora.target_modules), lora.rank, lora.alpha / lora.rank)
    detach(base.model, list(spans))
    return Work(base, people, list(spans.values()), lora, dpo, bank, _clock(device))


def _llama(hidden: int, layers: int) -> LlamaConfig:
    """Heads of 32, half as many key-value heads, three times as wide inside, tied head."""
    return LlamaConfig(
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


def random_base(config: PreTrainedConfig, device: torch.device, name: str) -> Base:
    """A model of random weights, drawn on its device, and a word of its own for every token."""
    torch.manual_seed(SEED)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device.type == "cuda" else None)
    model.requires_grad_(False).eval()
    words = {"<pad>": 0, "<end>": 1} | {f"w{n}": n for n in range(2, config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<end>"
    )
    return Base(model, tokenizer, name, f"seed {SEED}", config.max_position_embeddings)


def made_users(
    numbers: Iterable[int],
    pairs: int,
    vocabulary: int = VOCABULARY,
    prompt: tuple[int, int] = LENGTHS,
    answer: tuple[int, int] = LENGTHS,
) -> list[UserRows]:
    """Users who differ by their number alone: pairs of random tokens, as many (least, most) of a prompt and, before the
    end token, of each answer."""
    return [_made_user(f"user {n}", pairs, n, vocabulary, prompt, answer) for n in numbers]


def _made_user(
    user_id: str, pairs: int, seed: int, vocabulary: int, prompt: tuple[int, int], answer: tuple[int, int]
) -> UserRows:
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for n in range(pairs):
        asked = _ids(draw, vocabulary, prompt)
        message = (Message("user", "made up"),)
        pair = PreferencePair(user_id, message, "a", "b", f"{user_id} {n}", None, None, 1.0, "train", None, "made", n)
        chosen, rejected = (Row(asked, (*_ids(draw, vocabulary, answer), 1)) for _ in range(2))
        rows.append(PairRow(pair, chosen, rejected))
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


def _ids(draw: torch.Generator, vocabulary: int = VOCABULARY, lengths: tuple[int, int] = LENGTHS) -> tuple[int, ...]:
    length = int(torch.randint(lengths[0], lengths[1] + 1, (1,), generator=draw))
    return tuple(torch.randint(2, vocabulary, (length,), generator=draw).tolist())


def _clock(device: torch.device) -> Callable[[], float]:
    """Seconds of this process's CPU time; on a GPU, wall seconds when it has done all it was given."""
    if device.type == "cpu":
        return time.process_time

    def drained() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return drained
