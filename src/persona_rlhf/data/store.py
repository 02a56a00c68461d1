"""All pairs of a run, indexed by user in a temporary database, so that memory does not grow with the users."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import gettempdir
from typing import NamedTuple

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import naming_full_disk, pseudonym
from persona_rlhf.data.columns import UserSpellings
from persona_rlhf.data.pairs import SHOWN, Message, PreferencePair, assign_splits, first_problems, parsed_rows


class UserSelection(NamedTuple):
    """The users of a run, by their pseudonyms.

    `user_digests` holds them by number, each with the hash of their pairs; None keeps the number of a deleted user.
    Pairs of `excluded` users are skipped. `later_files` are read after the first file, in order; the pairs of a user
    in a later file replace those of earlier files.
    """

    user_digests: tuple[tuple[str, str] | None, ...] = ()
    excluded: frozenset[str] = frozenset()
    later_files: tuple[str, ...] = ()


class PairStore:
    """Every pair of a file, a folder or a hub data set; users are numbered from 0 in the order of their first pairs.

    The users of a run's `selection` keep their numbers, and new ones follow. The store is a private temporary
    database that ends with the process; a small one stays in memory.
    """

    def __init__(self, path: Path | str, heldout: float, selection: UserSelection | None = None) -> None:
        """Reads and checks everything once.

        `heldout` is the share of a user's prompts held out if rows have no `split`. Raises InputError naming the bad
        rows, and DiskFullError if the temporary folder is full.
        """
        if not 0 <= heldout < 1:
            raise ValueError(f"heldout is {heldout}; the share of prompts held out lies in [0, 1)")
        self._heldout = heldout
        self._rows = sqlite3.connect("")
        with naming_full_disk(Path(gettempdir()) / "index of the pairs"):
            self._read(path, selection or UserSelection())

    def _read(self, path: Path | str, selection: UserSelection) -> None:
        self._rows.execute("CREATE TABLE pairs (user INTEGER, content TEXT)")
        self._rows.execute("CREATE INDEX by_user ON pairs (user)")
        numbers_by_name = {user[0]: number for number, user in enumerate(selection.user_digests) if user is not None}
        self._names: list[str | None] = [None if user is None else user[0] for user in selection.user_digests]
        self._digests: list[bytes | None] = [None] * len(selection.user_digests)
        left_out: set[str] = set()
        problems: list[Problem] = []
        faults = 0
        spellings = UserSpellings()
        for source in (path, *selection.later_files):
            numbers: dict[str, int | None] = {}  # of the users in this file; None for one who stays out
            for item in parsed_rows(source, users=spellings):
                if isinstance(item, Problem):
                    faults += 1
                    if len(problems) <= SHOWN:
                        problems.append(item)
                    continue
                pair, split = item
                if pair.user_id not in numbers:
                    name = pseudonym(pair.user_id)
                    numbers[pair.user_id] = None if name in selection.excluded else self._begin(name, numbers_by_name)
                    left_out |= selection.excluded & {name}
                if (number := numbers[pair.user_id]) is None:
                    continue
                hashed = (pair.user_id, pair.prompt, pair.chosen, pair.rejected, split, pair.weight, pair.clean_choice)
                about = (pair.id, pair.created_at, pair.source, pair.file, pair.line, pair.place, pair.tie)
                content = json.dumps((*hashed, *about))
                self._rows.execute("INSERT INTO pairs VALUES (?, ?)", (number, content))
                before = self._digests[number] or b""
                marked = (*hashed, True) if pair.tie else hashed  # without ties, the hash of before there were any
                self._digests[number] = hashlib.sha256(before + json.dumps(marked).encode()).digest()
        if problems:
            raise InputError(first_problems(problems, faults))
        self.left_out = len(left_out)  # number of users in the files who stay out

    def _begin(self, name: str, numbers_by_name: dict[str, int]) -> int:
        """The number of a user at their first pair in a file; their pairs of earlier files are deleted."""
        number = numbers_by_name.setdefault(name, len(self._names))
        if number == len(self._names):
            self._names.append(name)
            self._digests.append(None)
        self._rows.execute("DELETE FROM pairs WHERE user = ?", (number,))
        self._digests[number] = None
        return number

    @property
    def users(self) -> int:
        """One more than the largest user number; deleted users keep theirs."""
        return len(self._names)

    @property
    def user_digests(self) -> tuple[tuple[str, str] | None, ...]:
        """The users by number, as in a `UserSelection`; None for a user without pairs."""
        return tuple(
            None if name is None or digest is None else (name, digest.hex())
            for name, digest in zip(self._names, self._digests, strict=True)
        )

    @property
    def fingerprint(self) -> str:
        """The hash of all users' pairs."""
        return fingerprint_of(self.user_digests)

    def __len__(self) -> int:
        [[count]] = self._rows.execute("SELECT COUNT(*) FROM pairs")
        return int(count)

    def __iter__(self) -> Iterator[PreferencePair]:
        """All pairs, user by user."""
        for user in range(self.users):
            yield from self.of(range(user, user + 1))

    def of(self, users: range) -> list[PreferencePair]:
        """The pairs of these users, in file order, with their splits decided."""
        query = "SELECT content FROM pairs WHERE user >= ? AND user < ? ORDER BY rowid"
        pairs: list[PreferencePair] = []
        undecided = []
        for (content,) in self._rows.execute(query, (users.start, users.stop)):
            user_id, prompt, chosen, rejected, split, weight, clean, *rest = json.loads(content)
            if split is None:
                undecided.append(len(pairs))
            id_, moment, source, file, line, place, tie = rest
            messages = tuple(Message(*message) for message in prompt)
            fields = (chosen, rejected, id_, moment, source, weight)
            about = (clean, file, line, place and tuple(place), tie)
            pairs.append(PreferencePair(user_id, messages, *fields, split or "train", *about))
        assign_splits(pairs, undecided, self._heldout)
        return pairs


def fingerprint_of(users: Iterable[tuple[str, str] | None]) -> str:
    """The sha256 over the hashes of the users' pairs, in the users' order, without deleted users."""
    digest = hashlib.sha256()
    for user in users:
        digest.update(b"" if user is None else user[1].encode())
    return digest.hexdigest()
