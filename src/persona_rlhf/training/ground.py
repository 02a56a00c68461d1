"""What training stands on: the hidden states below the adapters, kept for the users in the slots and for the bank; and
the base's log-probabilities of what they were computed for."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Sequence
from pathlib import Path

from persona_rlhf.preferences.tokens import PairRow, Row, UserRows, both_rows
from persona_rlhf.training.bank import ConstraintBank
from persona_rlhf.training.constraint import Draw
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.reference import Reference
from persona_rlhf.training.spill import Spilled
from persona_rlhf.training.trunk import States


class Ground:
    """States by user, computed when he takes his slot and forgotten when he leaves it.

    What `reference` does not know of his rows by then starts from them too: nothing frozen is computed twice.
    `memory` bytes are shared: half for the bank, half for the slots in equal parts. Whoever does not fit finds his
    states in a file in `folder`, of `disk` bytes shared likewise; who does not fit there either has those of each
    step's rows computed in that step. However it is, they depend on his own rows alone, so a resumed run and a run with
    other neighbours compute the same bits.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        reference: Reference,
        bank: ConstraintBank | None,
        slots: int,
        memory: int,
        disk: int = 0,
        folder: Path | None = None,
    ) -> None:
        self._adapted, self._reference, self._folder = adapted, reference, folder
        self._memory, self._disk, self._slots = memory // 2, disk // 2, max(1, slots)
        self._users: dict[str, States | None] = {}
        self._bank = self._kept(bank.rows() if bank else [], 1)

    def of(self, user_id: str, train: Sequence[PairRow], pairs: Sequence[PairRow], draw: Draw | None) -> States:
        """The states of a step's rows: `pairs` of the user's `train`, and the constraint rows of `draw`."""
        if user_id not in self._users:
            own = both_rows(train)
            kept = self._kept(own, self._slots)
            self._reference.add(own, kept or {})
            self._users[user_id] = kept
        user, bank = self._users[user_id], self._bank
        if user is None:
            user = self._adapted.below(both_rows(pairs))
        if bank is None:
            bank = self._adapted.below([] if draw is None else draw.rows)
        return ChainMap(user, bank)  # type: ignore[arg-type]  # it is only read

    def _kept(self, rows: Sequence[Row], parts: int) -> States | None:
        size = self._adapted.below_bytes(rows)
        if size <= self._memory // parts:
            return self._adapted.below(rows)
        return Spilled(self._adapted, rows, self._folder) if size <= self._disk // parts else None

    def forget(self, user_id: str) -> None:
        """Drops what is kept for a user who leaves his slot."""
        self._users.pop(user_id, None)


def rows_ahead(adapted: AdaptedModel, users: Iterable[UserRows], bank: ConstraintBank | None) -> list[Row]:
    """The rows that the reference must know before anyone takes a slot: in `Ground`, a user's own come with him."""
    pairs = (pair for user in users for pair in (*(() if adapted.starts_above else user.train), *user.deciding))
    return both_rows(pairs) + (bank.rows() if bank else [])
