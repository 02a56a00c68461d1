"""Choices of a ledger: as preference pairs that `add` reads, each user with all of their pairs."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write, pseudonym
from persona_rlhf.config.experiment import Config
from persona_rlhf.data.choice_ledger import ChoiceLedger
from persona_rlhf.data.pairs import PreferencePair, parsed_rows
from persona_rlhf.data.store import PairStore
from persona_rlhf.pipeline.run_dir import RunDir

UPDATES = Path("state") / "updates"
"""Sources of pairs for updates of one user each, PSEUDONYM-NUMBER.jsonl, relative to the run."""

Rows = dict[str, list[dict[str, Any]]]
"""Rows of preferences by user."""


class ExportedChoices(NamedTuple):
    """The outcome of an export: users with a preferred answer, their pairs from choices, and pairs of the run."""

    users: int
    chosen: int
    earlier: int


def export_choices(
    run: Path, config: Config, ledger: ChoiceLedger, out: Path, shared: bool = False, only: str | None = None
) -> ExportedChoices:
    """Writes the pairs of every user who preferred an answer: those that the run has, then those of the choices.

    `add` replaces a user's pairs by those of its source, so a source holds all of them. Undone choices, equal answers
    and two bad answers are left out. So are users who preferred no answer, whose ties alone cannot train an adapter.
    `shared` writes for `basis fit` instead: only choices that were made for sharing, of users who still consent to it.
    `only` is the one user to write.

    Raises InputError for an `out` that is no new .jsonl file, for a ledger without pairs, and where the run's pairs
    cannot be read.
    """
    if out.suffix != ".jsonl" or out.exists():
        sentence = "name a new file *.jsonl: the run reads the file of each `add` again later, so none is overwritten"
        raise InputError([Problem(str(out), None, "--export", sentence)])
    rows = _preferred(ledger, shared, only)
    if not rows:
        kind = "choice that may be shared" if shared else "choice"
        sentence = f"no {kind} in it prefers an answer, so there are no pairs; nothing was written"
        raise InputError([Problem(str(ledger.file), None, "--export", sentence)])
    earlier = {} if shared else _earlier(run, config, rows, ledger.ids())

    def lines() -> Iterator[str]:
        for user_id, chosen in rows.items():
            yield from (json.dumps(row, ensure_ascii=False) + "\n" for row in (*earlier.get(user_id, ()), *chosen))

    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, lines(), private=True)
    return ExportedChoices(len(rows), sum(map(len, rows.values())), sum(map(len, earlier.values())))


def _preferred(ledger: ChoiceLedger, shared: bool, only: str | None) -> Rows:
    """The choices, as rows, of users who preferred an answer."""
    rows: Rows = {}
    choices = [choice for choice in ledger.choices(only) if choice.consent == "shared" or not shared]
    for choice in choices:
        if (pair := choice.pair) is not None:
            rows.setdefault(choice.user_id, []).append(pair)
    users = {choice.user_id for choice in choices if choice.preferred is not None}
    return {user: rows[user] for user in rows if user in users and (not shared or ledger.consent(user) == "shared")}


def _earlier(run: Path, config: Config, users: Iterable[str], saved: Collection[str]) -> Rows:
    """The pairs that a run has of these users, without those of choices (`saved` ids): a choice may be undone since."""
    selection = RunDir(run).selection
    numbers = {user[0]: number for number, user in enumerate(selection.user_digests) if user is not None}
    present = {user: numbers[name] for user in users if (name := pseudonym(user)) in numbers}
    if not present:
        return {}
    store = PairStore(config.users.path, config.users.heldout, selection)
    return {
        user: [_row(pair) for pair in store.of(range(number, number + 1)) if pair.id not in saved]
        for user, number in present.items()
    }


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
        "tie": pair.tie or None,
        "place": None if pair.place is None else f"{pair.place[0]}/{pair.place[1]}",
    }
    return {key: value for key, value in row.items() if value is not None}


def trained_ids(run: Path) -> set[str]:
    """The ids of all pairs in the sources that users were added from."""
    rows = (row for source in RunDir(run).sources for row in parsed_rows(source))
    return {row[0].id for row in rows if not isinstance(row, Problem)}
