"""What training stands on: the hidden states below the adapters, kept for the users in the slots and for the bank; and
the base's log-probabilities of what they were computed for."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Sequence

from persona_rlhf.preferences.tokens import PairRow, Row, UserRows, both_rows
from persona_rlhf.training.bank import ConstraintBank
from persona_rlhf.training.constraint import Draw
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.reference import Reference
from persona_rlhf.training.trunk import States


class Ground:
    """States by user, computed when he takes his slot and forgotten when he leaves it.

    What `reference` does not know of his rows by then starts from them too: nothing frozen is computed twice.
    `budget` bytes are shared: half for the bank, half for the slots in equal parts. Whoever does not fit has the states
    of each step's rows computed in that step. Either way they depend on his own rows alone, so a resumed run and a run
    with other neighbours compute the same bits.
    """

    def __init__(
        self, adapted: AdaptedModel, reference: Reference, bank: ConstraintBank | None, slots: int, budget: int
    ) -> None:
        self._adapted, self._reference = adapted, reference
        self._share = budget // 2 // max(1, slots)
        self._users: dict[str, States | None] = {}
        rows = bank.rows() if bank else []
        self._bank = adapted.below(rows) if adapted.below_bytes(rows) <= budget // 2 else None

    def of(self, user_id: str, train: Sequence[PairRow], pairs: Sequence[PairRow], draw: Draw | None) -> States:
        """The states of a step's rows: `pairs` of the user's `train`, and the constraint rows of `draw`."""
        if user_id not in self._users:
            own = both_rows(train)
            kept = self._adapted.below(own) if self._adapted.below_bytes(own) <= self._share else None
            self._reference.add(own, kept or {})
            self._users[user_id] = kept
        user, bank = self._users[user_id], self._bank
        if user is None:
            user = self._adapted.below(both_rows(pairs))
        if bank is None:
            bank = self._adapted.below([] if draw is None else draw.rows)
        return ChainMap(user, bank)  # type: ignore[arg-type]  # it is only read

    def forget(self, user_id: str) -> None:
        """Drops what is kept for a user who leaves his slot."""
        self._users.pop(user_id, None)


def rows_ahead(adapted: AdaptedModel, users: Iterable[UserRows], bank: ConstraintBank | None) -> list[Row]:
    """The rows that the reference must know before anyone takes a slot: in `Ground`, a user's own come with him."""
    pairs = (pair for user in users for pair in (*(() if adapted.starts_above else user.train), *user.deciding))
    return both_rows(pairs) + (bank.rows() if bank else [])
