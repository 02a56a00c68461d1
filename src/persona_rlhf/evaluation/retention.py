"""What must not be lost on the way: harmless prompts stay answered."""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from persona_rlhf.evaluation.measures import Refused
from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.policy.hazards import Probe


class Exchange(NamedTuple):
    """An ordinary prompt, and an answer that somebody wrote to it, where there is one."""

    prompt: str
    answer: str | None


def read_exchanges(path: Path) -> list[Exchange]:
    """Reads ordinary prompts, JSON lines of {"prompt", "answer"?}. Raises InputError naming every bad line."""
    problems: list[Problem] = []
    found: list[Exchange] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, answer = row["prompt"], row.get("answer")
        except (json.JSONDecodeError, KeyError, TypeError):
            prompt = answer = None
        if not isinstance(prompt, str) or not prompt.strip():
            problems.append(Problem(str(path), number, "prompt", "a line is an object with a non-empty text `prompt`"))
        elif answer is not None and (not isinstance(answer, str) or not answer.strip()):
            problems.append(Problem(str(path), number, "answer", "expected a non-empty text, or no `answer` at all"))
        else:
            found.append(Exchange(prompt, answer))
    if problems:
        raise InputError(problems)
    return found


def read_ordinary(path: Path) -> list[str]:
    """The prompts of such a file. Raises InputError naming every bad line."""
    return [exchange.prompt for exchange in read_exchanges(path)]


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
