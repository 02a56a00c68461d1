"""The append-only ledger of choices: an SQLite database that several programs write to at once.

A choice is acknowledged when its transaction is in the write-ahead log on the disk (WAL, synchronous=FULL), so a killed
program loses none that it acknowledged. Triggers refuse every change and every removal of a line. Only the deletion of
a user removes lines, and it removes their bytes too. WAL needs a local disk: several machines cannot share a ledger.
"""

from __future__ import annotations

import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from persona_rlhf.common.clock import now
from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import naming_full_disk, pseudonym
from persona_rlhf.data.erasure import DataSubject, Trace

CHOICES = Path("state") / "choices.db"
"""The ledger of a run, relative to its folder."""

DELETIONS = Path("state") / "deletions.jsonl"
"""Rows of users who deleted their choices on the feedback page, until `forget` removes all else of them."""

Verdict = Literal["left", "right", "tie", "both_bad"]
Consent = Literal["own", "shared"]
"""Uses of choices that a user allows: the user's own adapter, or other people's as well."""

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
CONSENTS: tuple[Consent, ...] = get_args(Consent)
BASE, POLICY = "base", "policy"
"""Authors of an answer that no adapter wrote: the base, and a fixed text of the policy."""


class Choice(NamedTuple):
    """One decision between two answers, as they were shown.

    `left_by` and `right_by` are the sha256 of the adapter's weights that wrote the answer, or BASE, or POLICY; seeds
    are those of the sampling. `base` is the hash of the base's weights. `at` is the time of the decision (ISO 8601, in
    UTC), and `seconds` the time that it took.
    """

    id: str
    user_id: str
    prompt: str
    left: str
    right: str
    left_by: str
    right_by: str
    left_seed: int
    right_seed: int
    base: str
    verdict: Verdict
    reason: str
    at: str
    seconds: float
    consent: Consent
    source: str

    @property
    def preferred(self) -> str | None:
        """The preferred answer; None where there is none, or both are the same."""
        answers = {"left": self.left, "right": self.right}
        return None if self.left == self.right else answers.get(self.verdict)

    @property
    def pair(self) -> dict[str, Any] | None:
        """The choice as a row of preferences; None where both answers are the same, or both are bad."""
        if self.verdict == "both_bad" or self.left == self.right:
            return None
        chosen, rejected = (self.right, self.left) if self.verdict == "right" else (self.left, self.right)
        order: dict[str, Any] = {"tie": True}
        if self.verdict != "tie":
            order = {"place": "1/2" if self.verdict == "left" else "2/2"}
        pair = {"user_id": self.user_id, "prompt": self.prompt, "chosen": chosen, "rejected": rejected}
        return {**pair, "id": self.id, "created_at": self.at, "source": self.source, **order}


HARM, SAFETY, FEW, FAULT = "harm", "safety", "few", "fault"
"""Causes for which no new adapter came of a training: it no longer is the base or is worse by held-out pairs, the
gate, no pair was left after screening, and a fault."""

UpdateEvent = Literal["begun", "released", "not_released", "failed", "restored"]


class Update(NamedTuple):
    """A step in the updates of a user's adapter: a training that begins or ends, or the way back to another adapter.

    `adapter` is the sha256 of a manifest, or BASE: before a training that begins, else after the step. `choices` counts
    the user's choices with a preferred answer at the time. `detail` is the source of pairs of a training that begins,
    and the cause where no new adapter came of it.
    """

    id: str
    user_id: str
    event: UpdateEvent
    adapter: str
    choices: int
    detail: str
    at: str


_VERSION = 2  # 1 had no table of updates
_TABLES = ("choices", "undos", "consents", "updates")
_LINE = "number INTEGER PRIMARY KEY, pseudonym TEXT NOT NULL, id TEXT NOT NULL UNIQUE, user_id TEXT NOT NULL"
_SCHEMA = (
    f"""CREATE TABLE choices ({_LINE}, prompt TEXT NOT NULL, left TEXT NOT NULL, right TEXT NOT NULL,
    left_by TEXT NOT NULL, right_by TEXT NOT NULL, left_seed INTEGER NOT NULL, right_seed INTEGER NOT NULL,
    base TEXT NOT NULL, verdict TEXT NOT NULL CHECK (verdict IN {VERDICTS}), reason TEXT NOT NULL, at TEXT NOT NULL,
    seconds REAL NOT NULL CHECK (seconds >= 0), consent TEXT NOT NULL CHECK (consent IN {CONSENTS}),
    source TEXT NOT NULL)""",
    "CREATE INDEX choices_by_user ON choices (user_id)",
    f"CREATE TABLE undos ({_LINE}, at TEXT NOT NULL)",  # its id is that of the choice
    f"CREATE TABLE consents ({_LINE}, scope TEXT NOT NULL CHECK (scope IN {CONSENTS}), at TEXT NOT NULL)",
    "CREATE TABLE erasing (pseudonym TEXT PRIMARY KEY)",  # users whose deletion is not finished
)
_UPDATES = f"""CREATE TABLE updates ({_LINE}, event TEXT NOT NULL CHECK (event IN {get_args(UpdateEvent)}),
    adapter TEXT NOT NULL, choices INTEGER NOT NULL, detail TEXT NOT NULL, at TEXT NOT NULL)"""


def _append_only(table: str) -> list[str]:
    """The triggers that refuse changes and removals of a table's lines."""
    acts = {
        "updated": f"UPDATE ON {table}",
        "deleted": f"DELETE ON {table} WHEN OLD.pseudonym NOT IN (SELECT pseudonym FROM erasing)",
        "replaced": f"INSERT ON {table} WHEN EXISTS (SELECT 1 FROM {table} WHERE number = NEW.number OR id = NEW.id)",
    }
    refuse = "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
    return [f"CREATE TRIGGER {table}_{name} BEFORE {act} {refuse}" for name, act in acts.items()]


def _steps(version: int) -> list[str]:
    """The statements that lead from a version of the file to the present one; 0 is an empty file."""
    first = [*_SCHEMA, *(trigger for table in _TABLES[:3] for trigger in _append_only(table))]
    return [*(first if version == 0 else ()), _UPDATES, *_append_only("updates"), f"PRAGMA user_version = {_VERSION}"]


_COLUMNS, _UPDATE_COLUMNS = ", ".join(Choice._fields), ", ".join(Update._fields)
_BUSY_SECONDS = 30.0


class UserChoices(NamedTuple):
    """The numbers of a user's choices: all that stand, those with a preferred answer, and undone ones.

    `last` is the time of the last choice.
    """

    user_id: str
    standing: int
    preferred: int
    undone: int
    last: str


def nobody_barred() -> Collection[str]:
    """Pseudonyms of barred users: none."""
    return ()


class ChoiceLedger:
    """The choices of all users in one file, which is made if need be; threads may share an object.

    `barred` gives the pseudonyms of forgotten users: their choices are refused. It is called inside the transaction, so
    that a deletion, which bars the user before it erases, misses no choice.
    """

    def __init__(self, file: Path, barred: Callable[[], Collection[str]] = nobody_barred) -> None:
        """Raises InputError for a file that is no ledger."""
        self.file, self._barred = file, barred
        self._lock = threading.RLock()
        with naming_full_disk(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                file.touch(0o600)
            self._open()

    def _open(self) -> None:
        self._rows = sqlite3.connect(
            self.file, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=32
        )
        try:
            self._use_log()
            for setting in ("synchronous = FULL", "secure_delete = ON", "temp_store = MEMORY", "trusted_schema = OFF"):
                self._rows.execute(f"PRAGMA {setting}")
            with self._writing():
                version = self._one("PRAGMA user_version")
                if version == 1 or (version == 0 and self._one("SELECT COUNT(*) FROM sqlite_master") == 0):
                    for statement in _steps(version):
                        self._rows.execute(statement)
                    version = _VERSION
        except sqlite3.DatabaseError as fault:
            self._rows.close()
            if isinstance(fault, sqlite3.OperationalError) and "full" in str(fault):
                raise
            raise self._unusable(f"this file cannot be used as a ledger ({fault})") from fault
        if version != _VERSION:
            self._rows.close()
            raise self._unusable(f"this is no ledger of choices of format {_VERSION}")

    def _use_log(self) -> None:
        """Switches to the write-ahead log. SQLite does not wait for others here, so this tries again."""
        end = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                self._rows.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as fault:
                if "locked" not in str(fault) or time.monotonic() > end:
                    raise
                time.sleep(0.01)

    def close(self) -> None:
        """Closes the file; the last program to do so moves the log into the database."""
        with self._lock:
            self._rows.close()

    def append(self, choice: Choice) -> bool:
        """Adds a choice; False where one with its id is there already, such as from a form sent twice.

        On return it is on the disk. Raises InputError for a barred user, and for one without a consent, such as one
        whose lines were deleted meanwhile. Raises DiskFullError for a full disk.
        """
        return self._add("choices", choice._asdict())

    def undo(self, choice_id: str, user_id: str) -> Choice | None:
        """Takes back a user's choice, whose line stays; None where the user has no such choice, or it is undone.

        Raises InputError as `append` does.
        """
        choice = next((one for one in self.choices(user_id) if one.id == choice_id), None)
        if choice is None or not self._add("undos", {"id": choice_id, "user_id": user_id, "at": now()}):
            return None
        return choice

    def record_consent(self, user_id: str, scope: Consent) -> None:
        """Notes the scope to which a user consents from now on."""
        self._add("consents", {"id": secrets.token_hex(16), "user_id": user_id, "scope": scope, "at": now()})

    def consent(self, user_id: str) -> Consent | None:
        """The scope to which a user consented last; None before the first time."""
        rows = self._all("SELECT scope FROM consents WHERE user_id = ? ORDER BY number DESC LIMIT 1", user_id)
        return rows[0][0] if rows else None

    def has(self, choice_id: str) -> bool:
        """Whether a choice of this id was saved, undone or not."""
        return bool(self._all("SELECT 1 FROM choices WHERE id = ?", choice_id))

    def choices(self, user_id: str | None = None) -> list[Choice]:
        """The choices of a user, or of all, that are not undone, in the order in which they were saved."""
        query = f"SELECT {_COLUMNS} FROM choices WHERE id NOT IN (SELECT id FROM undos)"
        if user_id is None:
            return [Choice(*row) for row in self._all(f"{query} ORDER BY number")]
        return [Choice(*row) for row in self._all(f"{query} AND user_id = ? ORDER BY number", user_id)]

    def everything(self, user_id: str) -> dict[str, list[dict[str, Any]]]:
        """All that is kept of a user: choices, each with the time at which it was undone or None, consents, updates."""
        columns = ", ".join(f"choices.{name}" for name in Choice._fields)
        choices = self._all(
            f"SELECT {columns}, undos.at FROM choices LEFT JOIN undos USING (id) WHERE choices.user_id = ? "
            "ORDER BY choices.number",
            user_id,
        )
        consents = self._all("SELECT scope, at FROM consents WHERE user_id = ? ORDER BY number", user_id)
        return {
            "choices": [dict(zip((*Choice._fields, "undone_at"), row, strict=True)) for row in choices],
            "consents": [dict(zip(("scope", "at"), row, strict=True)) for row in consents],
            "updates": [update._asdict() for update in self.updates(user_id)],
        }

    def record_update(
        self, user_id: str, event: UpdateEvent, adapter: str, choices: int = 0, detail: str = ""
    ) -> Update:
        """Notes a step in the updates of a user's adapter. Raises InputError as `append` does."""
        update = Update(secrets.token_hex(16), user_id, event, adapter, choices, detail, now())
        self._add("updates", update._asdict())
        return update

    def updates(self, user_id: str | None = None) -> list[Update]:
        """The steps in the updates of a user's adapter, or of all, in their order."""
        query = f"SELECT {_UPDATE_COLUMNS} FROM updates"
        if user_id is None:
            return [Update(*row) for row in self._all(f"{query} ORDER BY number")]
        return [Update(*row) for row in self._all(f"{query} WHERE user_id = ? ORDER BY number", user_id)]

    def ids(self) -> set[str]:
        """The ids of all choices, undone ones among them."""
        return {row[0] for row in self._all("SELECT id FROM choices")}

    def users(self) -> list[UserChoices]:
        """The numbers of all users, in the order of their first choices."""
        query = """SELECT user_id, SUM(undone IS NULL), SUM(undone IS NULL AND verdict IN ('left', 'right')
            AND left <> right), SUM(undone IS NOT NULL), MAX(at) FROM (SELECT choices.*, undos.id AS undone FROM choices
            LEFT JOIN undos USING (id)) GROUP BY user_id ORDER BY MIN(number)"""
        return [UserChoices(*row) for row in self._all(query)]

    def pieces(self, user: DataSubject) -> int:
        """The lines of a user; 1 at least where a deletion of the user was interrupted."""
        tables = (*_TABLES, "erasing")
        count = " + ".join(f"(SELECT COUNT(*) FROM {table} WHERE pseudonym = ?1)" for table in tables)
        return int(self._one(f"SELECT {count}", user.pseudonym))

    def erase(self, user: DataSubject) -> None:
        """Deletes a user's lines, and their bytes in the database and its log; can be done again after a kill.

        Raises InputError where another program reads the ledger for so long that the bytes cannot be removed yet.
        """
        with self._lock, naming_full_disk(self.file):
            try:
                with self._writing():
                    self._rows.execute("INSERT OR IGNORE INTO erasing VALUES (?)", (user.pseudonym,))
                    for table in _TABLES:
                        self._rows.execute(f"DELETE FROM {table} WHERE pseudonym = ?", (user.pseudonym,))
                self._empty_log()
                self._rows.execute("VACUUM")
                self._empty_log()
                with self._writing():
                    self._rows.execute("DELETE FROM erasing WHERE pseudonym = ?", (user.pseudonym,))
            except sqlite3.OperationalError as fault:
                if "locked" not in str(fault):
                    raise
                raise self._in_use() from fault

    def _empty_log(self) -> None:
        """Moves the log into the database and cuts it to nothing. Raises InputError where others keep it in use."""
        if self._rows.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            raise self._in_use()

    def _add(self, table: str, line: dict[str, Any]) -> bool:
        name = pseudonym(line["user_id"])
        line = {"pseudonym": name, **line}
        places = ", ".join("?" * len(line))
        with self._lock, naming_full_disk(self.file), self._writing():
            if name in self._barred():
                raise self._unusable("this user was forgotten, so nothing is saved")
            if self._all(f"SELECT 1 FROM {table} WHERE id = ?", line["id"]):
                return False
            if table != "consents" and not self._all("SELECT 1 FROM consents WHERE pseudonym = ?", name):
                raise self._unusable("this user has given no consent, or deleted it, so nothing is saved")
            self._rows.execute(f"INSERT INTO {table} ({', '.join(line)}) VALUES ({places})", tuple(line.values()))
        return True

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A transaction that waits for other writers."""
        with self._lock:
            self._rows.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._rows.execute("COMMIT")
            except BaseException:
                if self._rows.in_transaction:  # else SQLite rolled it back, as it does for a full disk
                    self._rows.execute("ROLLBACK")
                raise

    def _all(self, query: str, *values: object) -> list[Any]:
        with self._lock:
            return self._rows.execute(query, values).fetchall()

    def _one(self, query: str, *values: object) -> Any:
        return self._all(query, *values)[0][0]

    def _unusable(self, sentence: str) -> InputError:
        return InputError([Problem(str(self.file), None, None, sentence)])

    def _in_use(self) -> InputError:
        return self._unusable(
            "another program reads this ledger, so no bytes can be removed yet; stop it, and try again"
        )


def choice_traces(run: Path, user: DataSubject) -> Iterator[Trace]:
    """The choices of a user in the ledger of a run."""
    yield from choices_in(run / CHOICES, user)


def choices_in(file: Path, user: DataSubject) -> Iterator[Trace]:
    """The choices of a user in a ledger. Raises InputError for a file that is none."""
    if not file.exists():
        return
    ledger = ChoiceLedger(file)
    try:
        count = ledger.pieces(user)
    finally:
        ledger.close()
    if count:
        yield Trace(file, "choices", count, partial(_erase, file, user))


def _erase(file: Path, user: DataSubject) -> None:
    ledger = ChoiceLedger(file)
    try:
        ledger.erase(user)
    finally:
        ledger.close()
