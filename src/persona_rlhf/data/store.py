"""The pairs of a run on disk, handed out some users at a time: memory does not grow with the number of users."""

from __future__ import annotations

import errno
import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import pseudonym
from persona_rlhf.data.pairs import SHOWN, Message, PreferencePair, assign_splits, first_problems, parsed_rows


class UserSelection(NamedTuple):
    """Whose pairs a run uses; its users are named by their pseudonyms.

    `known`: those it has, in the order of their numbers, each with what his pairs hash to; None keeps the number of
    one who is gone. `out`: those who stay out, whatever the files say. `more`: files read after the first one, in
    order; whoever is in a later file is there with all of his pairs, and those of the earlier files count no more.
    """

    known: tuple[tuple[str, str] | None, ...] = ()
    out: frozenset[str] = frozenset()
    more: tuple[str, ...] = ()


class PairStore:
    """Every pair of a file, a folder or a hub data set; users are numbered (from 0) as they first appear.

    Where a run has a `roll`, its users keep their numbers there, and new ones come after them. The store lies in a
    private temporary database that ends with the process; small ones never leave the memory.
    """

    def __init__(self, path: Path | str, heldout: float, roll: UserSelection | None = None) -> None:
        """Reads and checks everything once. `heldout` is the share of a user's prompts held out, where rows carry no
        `split`. Raises InputError naming the bad rows, and OSError where the temporary folder is full."""
        if not 0 <= heldout < 1:
            raise ValueError(f"heldout is {heldout}; the share of prompts held out lies in [0, 1)")
        self._heldout = heldout
        self._rows = sqlite3.connect("")
        try:
            self._read(path, roll or UserSelection())
        except sqlite3.OperationalError as fault:
            if "full" not in str(fault):
                raise
            raise OSError(errno.ENOSPC, "no space left for the index of the pairs", "temporary folder") from fault

    def _read(self, path: Path | str, roll: UserSelection) -> None:
        self._rows.execute("CREATE TABLE pairs (user INTEGER, content TEXT)")
        self._rows.execute("CREATE INDEX by_user ON pairs (user)")
        places = {known[0]: number for number, known in enumerate(roll.known) if known is not None}
        self._names: list[str | None] = [None if known is None else known[0] for known in roll.known]
        self._digests: list[bytes | None] = [None] * len(roll.known)
        left_out: set[str] = set()
        problems: list[Problem] = []
        faults = 0
        for source in (path, *roll.more):
            numbers: dict[str, int | None] = {}  # of the users of this file; None: he stays out
            for item in parsed_rows(source):
                if isinstance(item, Problem):
                    faults += 1
                    if len(problems) <= SHOWN:
                        problems.append(item)
                    continue
                pair, split = item
                if pair.user_id not in numbers:
                    name = pseudonym(pair.user_id)
                    numbers[pair.user_id] = None if name in roll.out else self._begin(name, places)
                    left_out |= roll.out & {name}
                if (number := numbers[pair.user_id]) is None:
                    continue
                said = (pair.user_id, pair.prompt, pair.chosen, pair.rejected, split, pair.weight, pair.clean_choice)
                content = json.dumps((*said, pair.id, pair.created_at, pair.source, pair.file, pair.line))
                self._rows.execute("INSERT INTO pairs VALUES (?, ?)", (number, content))
                before = self._digests[number] or b""
                self._digests[number] = hashlib.sha256(before + json.dumps(said).encode()).digest()
        if problems:
            raise InputError(first_problems(problems, faults))
        self.left_out = len(left_out)  # users of the files who stay out

    def _begin(self, name: str, places: dict[str, int]) -> int:
        """The number of a user whom a file begins to tell of; what earlier files told of him is forgotten."""
        number = places.setdefault(name, len(self._names))
        if number == len(self._names):
            self._names.append(name)
            self._digests.append(None)
        self._rows.execute("DELETE FROM pairs WHERE user = ?", (number,))
        self._digests[number] = None
        return number

    @property
    def users(self) -> int:
        """One more than the largest number of a user; not everybody who has a number need be here any more."""
        return len(self._names)

    @property
    def known(self) -> tuple[tuple[str, str] | None, ...]:
        """The users by number, as a roll knows them; None where there is no pair of him."""
        return tuple(
            None if name is None or digest is None else (name, digest.hex())
            for name, digest in zip(self._names, self._digests, strict=True)
        )

    @property
    def fingerprint(self) -> str:
        """A hash of what everybody's pairs say."""
        return fingerprint_of(self.known)

    def __len__(self) -> int:
        [[count]] = self._rows.execute("SELECT COUNT(*) FROM pairs")
        return int(count)

    def __iter__(self) -> Iterator[PreferencePair]:
        """All pairs, user by user."""
        for user in range(self.users):
            yield from self.of(range(user, user + 1))

    def of(self, users: range) -> list[PreferencePair]:
        """The pairs of these users, in file order, with their splits decided."""
        asked = "SELECT content FROM pairs WHERE user >= ? AND user < ? ORDER BY rowid"
        pairs: list[PreferencePair] = []
        undecided = []
        for (content,) in self._rows.execute(asked, (users.start, users.stop)):
            user_id, prompt, chosen, rejected, split, weight, clean, *rest = json.loads(content)
            if split is None:
                undecided.append(len(pairs))
            id_, moment, source, file, line = rest
            messages = tuple(Message(*message) for message in prompt)
            told = (chosen, rejected, id_, moment, source, weight)
            pairs.append(PreferencePair(user_id, messages, *told, split or "train", clean, file, line))
        assign_splits(pairs, undecided, self._heldout)
        return pairs


def fingerprint_of(known: Iterable[tuple[str, str] | None]) -> str:
    """sha256 over what the pairs of each user hash to, in the users' order; those who are gone do not count."""
    digest = hashlib.sha256()
    for user in known:
        digest.update(b"" if user is None else user[1].encode())
    return digest.hexdigest()
