"""Inference engines that `scripts/engines` installed, and the prompts on which they are compared."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from persona_rlhf.common.files import shipped_root
from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import ChatTokenizer, prompt_ids
from tests.story.experiment import rows_of

PLACE = "PERSONA_RLHF_ENGINES"
_ROOT = Path(__file__).resolve().parents[2]


def engine_folder(name: str) -> Path:
    """The folder of an engine's virtual environment, made or not."""
    return (_ROOT / os.environ.get(PLACE, ".engines") / name).absolute()


def needs_engine(name: str) -> list[Any]:
    """The marks of a module whose tests run this engine."""
    missing = not (engine_folder(name) / "pin").is_file()
    reason = f"{name} is not installed: scripts/engines {name}, and {PLACE} where its folder is another one"
    return [pytest.mark.engines, pytest.mark.timeout(1800), pytest.mark.skipif(missing, reason=reason)]


def prompts(count: int) -> list[str]:
    """The first distinct prompts of the simulated users' held-out pairs."""
    rows = rows_of(shipped_root() / "data/users/surface.jsonl")
    texts = dict.fromkeys(row["prompt"] for row in rows if row["split"] == "heldout")
    return list(texts)[:count]


def prompt_rows(texts: list[str], tokenizer: ChatTokenizer) -> list[tuple[int, ...]]:
    """The token ids of each prompt, by the base's chat template."""
    return [prompt_ids((Message("user", text),), tokenizer) for text in texts]
