"""The pairs of a run on disk, handed out some users at a time: memory does not grow with the number of users."""

from __future__ import annotations

import errno
import hashlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.preferences.messages import Message
from persona_rlhf.preferences.pairs import SHOWN, PreferencePair, assign_splits, first_problems, parsed_rows


class PairStore:
    """Every pair of a file, a folder or a hub data set; users are numbered (from 0) as they first appear.

    It lies in a private temporary database that ends with the process; small ones never leave the memory.
    """

    def __init__(self, path: Path | str, heldout: float) -> None:
        """Reads and checks everything once. `heldout` is the share of a user's prompts held out, where rows carry no
        `split`. Raises InputError naming the bad rows, and OSError where the temporary folder is full."""
        if not 0 <= heldout < 1:
            raise ValueError(f"heldout is {heldout}; the share of prompts held out lies in [0, 1)")
        self._heldout = heldout
        self._rows = sqlite3.connect("")
        try:
            self._read(path)
        except sqlite3.OperationalError as fault:
            if "full" not in str(fault):
                raise
            raise OSError(errno.ENOSPC, "no space left for the index of the pairs", "temporary folder") from fault

    def _read(self, path: Path | str) -> None:
        self._rows.execute("CREATE TABLE pairs (user INTEGER, content TEXT)")
        numbers: dict[str, int] = {}
        problems: list[Problem] = []
        digest, self._count, faults = hashlib.sha256(), 0, 0
        for item in parsed_rows(path):
            if isinstance(item, Problem):
                faults += 1
                if len(problems) <= SHOWN:
                    problems.append(item)
                continue
            pair, split = item
            number = numbers.setdefault(pair.user_id, len(numbers))
            said = (pair.user_id, pair.prompt, pair.chosen, pair.rejected, split, pair.weight, pair.clean_choice)
            content = json.dumps((*said, pair.id, pair.created_at, pair.source, pair.file, pair.line))
            self._rows.execute("INSERT INTO pairs VALUES (?, ?)", (number, content))
            digest.update(json.dumps(said).encode())
            self._count += 1
        if problems:
            raise InputError(first_problems(problems, faults))
        self._rows.execute("CREATE INDEX by_user ON pairs (user)")
        self.users, self.fingerprint = len(numbers), digest.hexdigest()

    def __len__(self) -> int:
        return self._count

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
