"""Refusals that somebody wrote: what a model is taught to say where it has no refusal of its own."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from persona_rlhf.inputs.problems import InputError, Problem, did_you_mean
from persona_rlhf.policy.hazards import CATEGORIES
from persona_rlhf.policy.judges import is_refusal


class RefusalText(NamedTuple):
    """A refusal; `category` is the hazard category that it speaks of, None where it fits all."""

    text: str
    category: str | None


def read_refusal_texts(path: Path, categories: Collection[str]) -> list[RefusalText]:
    """Reads JSON lines of {"text", "category"?}.

    Raises InputError naming every line that is none, that the judge would not call a refusal (the model would be taught
    what counts as a compliance), or whose category is unknown; and each category without a refusal.
    """
    problems: list[Problem] = []
    found: list[RefusalText] = []
    known = {*CATEGORIES, *categories}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, category = row["text"], row.get("category")
        except (json.JSONDecodeError, KeyError, TypeError):
            text = category = None
        if not isinstance(text, str) or not isinstance(category, str | None):
            problems.append(
                Problem(str(path), number, "text", "a line is an object with texts `text` and, perhaps, `category`")
            )
        elif not is_refusal(text):
            sentence = f"the judge does not call this a refusal: `{text}`; say no in its first sentence, in English"
            problems.append(Problem(str(path), number, "text", sentence))
        elif category is None or category in known:
            found.append(RefusalText(text, category))
        else:
            sentence = f"no rule has the category `{category}`{did_you_mean(category, known)}"
            problems.append(Problem(str(path), number, "category", sentence))
    bare = [name for name in categories if not _fitting(found, name)]
    if bare and not problems:
        problems.append(Problem(str(path), None, None, f"holds no refusal for {', '.join(bare)}; add some"))
    if problems:
        raise InputError(problems)
    return found


def draw_refusal(texts: Sequence[RefusalText], category: str | None, rng: Random) -> str:
    """One that fits the category; for None, one that fits all of them, or any where there is no such one."""
    return rng.choice(_fitting(texts, category) or list(texts)).text


def _fitting(texts: Sequence[RefusalText], category: str | None) -> list[RefusalText]:
    return [text for text in texts if text.category in (None, category)]
