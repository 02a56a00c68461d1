"""The constraint bank on disk: for the other processes of a run, for a resumed one, and for later runs over a base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import persona_rlhf
from persona_rlhf.preferences.tokens import Row
from persona_rlhf.training.bank import Anchor, ConstraintBank, Lessons
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.reference import identity_of_values

_PARTS = ("categories", "limits", "anchors", "lessons", "answers")


def bank_to_json(bank: ConstraintBank) -> str:
    """The bank as text, for other processes of a run and for a resumed one."""
    return json.dumps({part: getattr(bank, part) for part in _PARTS})


def bank_from_json(text: str) -> ConstraintBank:
    """What `bank_to_json` wrote. Raises ValueError where the text is damaged."""

    def row(stored: Any) -> Row | None:
        return None if stored is None else Row(tuple(stored[0]), tuple(stored[1]))

    def rows(stored: Any) -> tuple[Row, ...]:
        return tuple(Row(tuple(prompt), tuple(completion)) for prompt, completion in stored)

    def anchor(refusals: Any, compliance: Any, overrefusal: Any) -> Anchor:
        return Anchor(rows(refusals), row(compliance), row(overrefusal))

    try:
        stored = json.loads(text)
        anchors = [[anchor(*parts) for parts in category] for category in stored["anchors"]]
        lessons = [
            Lessons(name, limit, rows(turns), rows(elsewhere), wrong, each)
            for name, limit, turns, elsewhere, wrong, each in stored["lessons"]
        ]
        return ConstraintBank(stored["categories"], stored["limits"], anchors, lessons, rows(stored["answers"]))
    except (LookupError, TypeError, AssertionError) as fault:
        raise ValueError(f"this is no constraint bank ({fault})") from fault


def kept_bank(
    adapted: AdaptedModel, folder: Path, asked: Sequence[object], make: Callable[[], ConstraintBank]
) -> ConstraintBank:
    """The bank that runs over one base keep for each other in `folder`; made now where none fits.

    `asked` is everything that the base's sampled answers depend on, beside the base, its device and this version.
    """
    said = json.dumps([identity_of_values(adapted), persona_rlhf.__version__, *asked])
    file = folder / f"bank-{hashlib.sha256(said.encode()).hexdigest()[:32]}.json"
    try:
        return bank_from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        bank = make()
    folder.mkdir(parents=True, exist_ok=True)
    half = file.with_suffix(".half")
    half.write_text(bank_to_json(bank), encoding="utf-8")
    half.replace(file)
    return bank
