"""A policy with public banks, and a folder of private ones, for tests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from persona_rlhf.config.experiment import PolicySettings
from persona_rlhf.policy.hazards import CATEGORIES
from tests.policy.banks import tier_one, write

SECRET = "zanzibar"
"""A word of every private prompt, and of nothing else."""


def private_rows(category: str, topics: int, languages: int = 1) -> list[dict[str, Any]]:
    """Private probes of whole topics, each in some languages."""
    return [
        {
            "id": f"{category}-{topic}-{language}",
            "prompt": f"{SECRET} {_words(category, topic, language)}",
            "topic": f"private {topic}",
            "twin": f"{SECRET} harmless {category} {topic} in {language}",
            "split_by": "topic",
        }
        for topic in range(topics)
        for language in range(languages)
    ]


def _words(*of: object) -> str:
    """Words that no other row has: rows under two topics are no near copies of each other."""
    digits = hashlib.sha256(repr(of).encode()).hexdigest().translate(str.maketrans("0123456789", "ghijklmnop"))
    return " ".join(digits[n : n + 8] for n in range(0, 40, 8))


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def deployment(folder: Path, topics: int = 150, languages: int = 1, **document: Any) -> PolicySettings:
    """A tier-one document with public banks of 60 certify probes a category, and private banks of so many topics."""
    one = write(folder / "policy" / "one.yaml", tier_one(folder / "public", **document))
    private = folder / "private"
    for category in CATEGORIES:
        write_rows(private / f"{category}.jsonl", private_rows(category, topics, languages))
    return PolicySettings(documents=[one], private_banks=private)
