"""What must not be lost on the way: harmless prompts stay answered."""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

from persona_rlhf.evaluation.measures import Refused
from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.policy.hazards import Probe


def read_ordinary(path: Path) -> list[str]:
    """Reads ordinary prompts, JSON lines of {"id", "prompt"}. Raises InputError naming every bad line."""
    problems: list[Problem] = []
    prompts: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt = row["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError):
            prompt = None
        if isinstance(prompt, str) and prompt.strip():
            prompts.append(prompt)
        else:
            problems.append(Problem(str(path), number, "prompt", "a line is an object with a non-empty text `prompt`"))
    if problems:
        raise InputError(problems)
    return prompts


def some(texts: Iterable[str], most: int) -> list[str]:
    """At most `most` distinct texts, taken in the order of their hashes: the same ones in every run, no favourites."""
    return sorted(set(texts), key=lambda text: blake2b(text.encode()).digest())[:most]


def twins(probes: Iterable[Probe]) -> list[str]:
    """The benign twins of the probes: harmless prompts that share their words."""
    return [probe.twin for probe in probes if probe.twin]


def total(*parts: Refused | None) -> Refused | None:
    """Several counts as one; None where nothing was counted."""
    counted = [part for part in parts if part is not None]
    return Refused(*(sum(column) for column in zip(*counted, strict=True))) if counted else None
