"""The choices of a run's users in numbers, for the operator: nothing of a user's texts."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from persona_rlhf.data.choice_ledger import DELETIONS, Choice, ChoiceLedger, Update


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


def collected_users(run: Path, ledger: ChoiceLedger, trained: Collection[str]) -> list[CollectedUser]:
    """Every user with choices in the ledger, then those who deleted their choices and are not forgotten yet.

    `trained` has the ids of the pairs that are in a source of the run.
    """
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
