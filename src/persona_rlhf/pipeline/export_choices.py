"""Choices of a ledger: as preference pairs that `add` reads, each user with all of their pairs, and in numbers."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write, pseudonym
from persona_rlhf.config.experiment import Config
from persona_rlhf.data.choice_ledger import DELETIONS, Choice, ChoiceLedger, Update
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


class CollectedUser(NamedTuple):
    """The numbers of a user's choices, for the operator; nothing of their texts.

    `waiting` choices are in no source of the run yet. Of choices between the same two answers, `repeated` came again,
    and `alike` of them were decided as the time before. `update` is the last step in the updates of the adapter, with
    its cause where no new adapter came of it.
    """

    user_id: str
    choices: int
    preferred: int
    waiting: int
    repeated: int
    alike: int
    undone: int
    last: str
    deletion_wished: bool
    update: str = ""


def collected_users(run: Path, ledger: ChoiceLedger) -> list[CollectedUser]:
    """Every user with choices in the ledger, then those who deleted their choices and are not forgotten yet."""
    trained = trained_ids(run)
    by_user: dict[str, list[Choice]] = {}
    for choice in ledger.choices():
        by_user.setdefault(choice.user_id, []).append(choice)
    deletions = set(deletion_wishes(run))
    collected, updates = [], {update.user_id: update for update in ledger.updates()}
    for user in ledger.users():
        choices = by_user.get(user.user_id, [])
        waiting = sum(one.preferred is not None and one.id not in trained for one in choices)
        figures = (user.standing, user.preferred, waiting, *_repeats(choices), user.undone, user.last)
        last = updates.get(user.user_id)
        collected.append(CollectedUser(user.user_id, *figures, user.user_id in deletions, _shown(last)))
    gone = [user_id for user_id in sorted(deletions) if user_id not in {user.user_id for user in collected}]
    return [*collected, *(CollectedUser(user_id, 0, 0, 0, 0, 0, 0, "", True) for user_id in gone)]


def _shown(update: Update | None) -> str:
    if update is None:
        return ""
    cause = f": {update.detail}" if update.event in ("not_released", "failed") else ""
    return f"{update.event.replace('_', ' ')}{cause}, {update.at}"


def deletion_wishes(run: Path) -> list[str]:
    """Users who deleted their choices on the page, as far as `forget` has not removed the rest."""
    file = run / DELETIONS
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [str(json.loads(line)["user_id"]) for line in lines]


def trained_ids(run: Path) -> set[str]:
    """The ids of all pairs in the sources that users were added from."""
    rows = (row for source in RunDir(run).sources for row in parsed_rows(source))
    return {row[0].id for row in rows if not isinstance(row, Problem)}


def _repeats(choices: list[Choice]) -> tuple[int, int]:
    """Choices between the same two answers as an earlier one, and how many of them prefer the same answer."""
    earlier: dict[tuple[str, frozenset[str]], str | None] = {}
    repeated = alike = 0
    for choice in choices:
        key = choice.prompt, frozenset((choice.left, choice.right))
        if key in earlier:
            repeated += 1
            alike += earlier[key] == choice.preferred
        earlier[key] = choice.preferred
    return repeated, alike
