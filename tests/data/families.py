"""The families of chat models as far as their conversations go: template, control tokens, begin and end of text."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerFast

from tests.data.tokenizers_by_hand import tokenizer_of

TEMPLATES = Path(__file__).parent / "templates"


class Family(NamedTuple):
    """`begin` and `end` of text are the tokenizer's, `turn` ends an answer; `system`: what becomes of a system turn."""

    begin: str
    end: str
    turn: str
    system: Literal["kept", "before the user's text", "refused"]
    roles: tuple[str, ...] = ()  # control tokens that open turns


CHATML = ("<|im_start|>",)
GEMMA = ("<start_of_turn>",)
FAMILIES = {
    "qwen2": Family("<|endoftext|>", "<|im_end|>", "<|im_end|>", "kept", CHATML),
    "qwen3": Family("<|endoftext|>", "<|im_end|>", "<|im_end|>", "kept", CHATML),
    "smollm3": Family("<|begin_of_text|>", "<|im_end|>", "<|im_end|>", "kept", CHATML),
    "llama3": Family(
        "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "kept", ("<|start_header_id|>", "<|end_header_id|>")
    ),
    "gemma2": Family("<bos>", "<eos>", "<end_of_turn>", "refused", GEMMA),
    "gemma3": Family("<bos>", "<eos>", "<end_of_turn>", "before the user's text", GEMMA),
    "mistral": Family("<s>", "</s>", "</s>", "before the user's text", ("[INST]", "[/INST]")),
    "phi3": Family("<s>", "<|endoftext|>", "<|end|>", "kept", ("<|system|>", "<|user|>", "<|assistant|>")),
    "olmo2": Family("<|endoftext|>", "<|endoftext|>", "<|endoftext|>", "kept"),
    "granite": Family(
        "<|end_of_text|>", "<|end_of_text|>", "<|end_of_text|>", "kept", ("<|start_of_role|>", "<|end_of_role|>")
    ),
}


@cache
def tokenizer_for(name: str) -> PreTrainedTokenizerFast:
    """A small tokenizer with that family's control tokens and template."""
    family = FAMILIES[name]
    special = dict.fromkeys((family.begin, family.end, family.turn, *family.roles))
    template = (TEMPLATES / f"{name}.jinja").read_text()
    return tokenizer_of(template, family.end, list(special), family.begin)
