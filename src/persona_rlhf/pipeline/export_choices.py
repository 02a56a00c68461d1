"""Choices of a ledger as preference pairs that `add` reads: each user with all of their pairs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write, pseudonym
from persona_rlhf.config.experiment import Config
from persona_rlhf.data.choice_ledger import ChoiceLedger
from persona_rlhf.data.pairs import PreferencePair
from persona_rlhf.data.store import PairStore
from persona_rlhf.pipeline.run_dir import RunDir


class ExportedChoices(NamedTuple):
    """The outcome of an export: users with a preferred answer, their pairs from choices, and pairs of the run."""

    users: int
    chosen: int
    earlier: int


def export_choices(run: Path, config: Config, ledger: ChoiceLedger, out: Path) -> ExportedChoices:
    """Writes the pairs of every user who preferred an answer: those that the run has, then those of the choices.

    `add` replaces a user's pairs by those of its source, so a source holds all of them. Ties, undone choices and equal
    answers are left out. Raises InputError for an `out` that is no new .jsonl file, and where the run's pairs cannot
    be read.
    """
    if out.suffix != ".jsonl" or out.exists():
        sentence = "name a new file *.jsonl: the run reads the file of each `add` again later, so none is overwritten"
        raise InputError([Problem(str(out), None, "--export", sentence)])
    rows: dict[str, list[dict[str, Any]]] = {}
    for choice in ledger.choices():
        if (pair := choice.pair) is not None:
            rows.setdefault(choice.user_id, []).append(pair)
    selection, saved = RunDir(run).selection, ledger.ids()
    numbers = {user[0]: number for number, user in enumerate(selection.user_digests) if user is not None}
    earlier: dict[str, list[dict[str, Any]]] = {}
    if any(pseudonym(user_id) in numbers for user_id in rows):
        store = PairStore(config.users.path, config.users.heldout, selection)
        for user_id in rows:
            if (number := numbers.get(pseudonym(user_id))) is not None:
                pairs = store.of(range(number, number + 1))
                earlier[user_id] = [_row(pair) for pair in pairs if pair.id not in saved]

    def lines() -> Iterator[str]:
        for user_id, chosen in rows.items():
            yield from (json.dumps(row, ensure_ascii=False) + "\n" for row in (*earlier.get(user_id, ()), *chosen))

    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, lines(), private=True)
    return ExportedChoices(len(rows), sum(map(len, rows.values())), sum(map(len, earlier.values())))


def _row(pair: PreferencePair) -> dict[str, Any]:
    """A pair of the run as a row, with the split that it has there."""
    row = {
        "user_id": pair.user_id,
        "prompt": [message._asdict() for message in pair.prompt],
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "id": pair.id,
        "split": pair.split,
        "weight": pair.weight,
        "created_at": pair.created_at,
        "source": pair.source,
        "clean_choice": pair.clean_choice,
        "place": None if pair.place is None else f"{pair.place[0]}/{pair.place[1]}",
    }
    return {key: value for key, value in row.items() if value is not None}
