"""Updates of users' adapters while the feedback page is served: enough new choices are trained in another process.

One user is trained at a time, by `add --keep-earlier`. The ledger notes when a training begins and how it ends, so the
next server goes on with one that was killed. A user who deletes the choices, or is forgotten, is not trained further.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import IO, NamedTuple

from persona_rlhf.common.errors import InputError, visible
from persona_rlhf.common.files import pseudonym, remove_folder
from persona_rlhf.common.run_lock import WAIT_SECONDS, run_lock
from persona_rlhf.config.experiment import Config
from persona_rlhf.data.choice_ledger import FAULT, FEW, HARM, SAFETY, ChoiceLedger, Update, UserChoices
from persona_rlhf.data.erasure import DataSubject
from persona_rlhf.pipeline.distributed import HELD_BACK
from persona_rlhf.pipeline.export_choices import UPDATES, export_choices, trained_ids
from persona_rlhf.pipeline.run_dir import RunDir, number_of
from persona_rlhf.release import integrity
from persona_rlhf.release.deletion_records import forgotten
from persona_rlhf.release.earlier_adapters import adapter_name, result_of
from persona_rlhf.release.results import Result

_POLL_SECONDS = 0.5  # between looks at a training under way
_IDLE_SECONDS = 30.0  # between looks at a ledger that other servers write to as well
_NICE = 10  # answers come first
_CAUSES = {"held_back": SAFETY, "skipped": FEW, "failed": FAULT}


class TrainingEnd(NamedTuple):
    """The exit code of a training, and what it printed."""

    code: int
    out: str
    err: str


class BackgroundUpdates:
    """Trains users of a run with at least `after` new preferred answers in the ledger, one after the other.

    `log` receives the begin and the end of each training, for the operator. `program` is the command line of this
    toolkit.
    """

    def __init__(
        self,
        run: Path,
        config: Config,
        ledger: ChoiceLedger,
        after: int,
        log: Callable[[str], None],
        program: Sequence[str] = (sys.executable, "-m", "persona_rlhf"),
    ) -> None:
        self._run, self._config, self._ledger, self._after, self._log = run, config, ledger, after, log
        self._program = program
        self._wake, self._stopping = threading.Event(), threading.Event()

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Trains in the background for a block; a training under way at its end is stopped, to be resumed.

        Raises InputError where another server trains this run's users.
        """
        with run_lock(self._run / UPDATES, "collect --update-after"):
            thread = threading.Thread(target=self._work, name="updates")
            thread.start()
            try:
                yield
            finally:
                self._stopping.set()
                self._wake.set()
                thread.join()

    def wake(self) -> None:
        """Looks at the ledger now, since it has a new choice."""
        self._wake.set()

    def _work(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                if (user := self.next_user()) is not None:
                    self.update(user)
                    continue
            except InputError as fault:
                self._log(f"No update now: {fault}")
            except Exception as fault:
                self._log(f"No update now: {type(fault).__name__}")
            self._wake.wait(_IDLE_SECONDS)

    def next_user(self) -> str | None:
        """The user whose training was interrupted, else the first one with enough new choices."""
        last = {update.user_id: update for update in self._ledger.updates() if update.event != "restored"}
        interrupted = [user for user, update in last.items() if update.event == "begun"]
        return next((user for user in chain(interrupted, self._due(last)) if not self._gone(user)), None)

    def _due(self, last: Mapping[str, Update]) -> Iterator[str]:
        """The users with enough choices that no source of the run has; `last` has the last step of each."""
        candidates = [user for user in self._ledger.users() if self._may_be_due(user, last.get(user.user_id))]
        trained = trained_ids(self._run) if candidates else set()  # it reads all sources
        for user in candidates:
            pairs = {choice.id for choice in self._ledger.choices(user.user_id) if choice.preferred is not None}
            if len(pairs - trained) >= self._after:
                yield user.user_id

    def _may_be_due(self, user: UserChoices, last: Update | None) -> bool:
        before = last.choices if last is not None and last.event == "failed" else 0
        return user.preferred - before >= self._after

    def update(self, user: str) -> None:
        """Trains one user, and notes the outcome; a stop, or the user's deletion, leaves the training as it is."""
        begun = next((one for one in reversed(self._ledger.updates(user)) if one.event != "restored"), None)
        if begun is None or begun.event != "begun" or not Path(begun.detail).exists():
            begun = self._begin(user)
        self._log(visible(f"Training {user!r} on {begun.choices} choices"))
        end = self._train(user, Path(begun.detail))
        if end is not None:
            update = self._conclude(user, begun, end)
            cause = f" ({update.detail})" if update.detail else ""
            self._log(visible(f"Training of {user!r} ended: {update.event.replace('_', ' ')}{cause}"))

    def _begin(self, user: str) -> Update:
        """Writes the user's pairs to a new file of the run, and notes the begin."""
        folder, name = self._run / UPDATES, pseudonym(user)  # the run keeps the file's name after a deletion
        with run_lock(self._run, "collect", shared=True, wait=WAIT_SECONDS):
            numbers = [int(file.stem.rpartition("-")[2]) for file in folder.glob(f"{name}-*.jsonl")]
            source = folder / f"{name}-{max(numbers, default=0) + 1}.jsonl"
            export_choices(self._run, self._config, self._ledger, source, only=user)
            preferred = sum(choice.preferred is not None for choice in self._ledger.choices(user))
            present = adapter_name(result_of(self._run, user))
        return self._ledger.record_update(user, "begun", present, preferred, str(source))

    def _train(self, user: str, source: Path) -> TrainingEnd | None:
        """Runs `add` up to its end; None where it was stopped before."""
        words = ["add", str(self._run), "--users", str(source), "--keep-earlier", "--json", "--wait", "86400"]
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = subprocess.Popen(
                [*self._program, *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                process_group=0,  # Ctrl-C of a terminal reaches the server alone, which then stops it
            )
            with suppress(OSError):  # it is over already
                os.setpriority(os.PRIO_PROCESS, process.pid, _NICE)
            try:
                while process.poll() is None and not self._stopping.is_set() and not self._gone(user):
                    self._stopping.wait(_POLL_SECONDS)
                stopped = process.poll() is None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # the next `add` goes on from any point
                process.wait()
            if self._gone(user):
                self._discard(user, source)
                return None
            return None if stopped else TrainingEnd(process.returncode, _text(out), _text(err))

    def _conclude(self, user: str, begun: Update, end: TrainingEnd) -> Update:
        """Notes the end of a training: by the audit trail, since a resumed one may have nothing left to print."""
        present = adapter_name(result_of(self._run, user))
        if end.code not in (0, HELD_BACK):
            last = end.err.strip().splitlines()[-1:]
            self._log(visible(f"`add` exited with {end.code} for {user!r}: {''.join(last)}"))
            return self._ledger.record_update(user, "failed", present, begun.choices, FAULT)
        statuses = ("released", "prior", *_CAUSES)
        events = [
            entry.event
            for entry in integrity.read(self._run)
            if entry.event in statuses and entry.facts.get("user") == pseudonym(user)
        ]
        if events[-1] in ("released", "prior"):
            return self._ledger.record_update(user, "released", present, begun.choices)
        harmful = any(Result.from_json(row).harmful for row in json.loads(end.out or "[]"))
        cause = HARM if harmful else _CAUSES[events[-1]]
        return self._ledger.record_update(user, "not_released", present, begun.choices, cause)

    def _gone(self, user: str) -> bool:
        """Whether the user deleted the choices, is forgotten, or is about to be."""
        barred = pseudonym(user) in forgotten(self._run) or _stop_file(self._run, user).exists()
        return barred or self._ledger.consent(user) is None

    def _discard(self, user: str, source: Path) -> None:
        """Removes a training under way, and its pairs, unless they joined the run before."""
        inner = RunDir(RunDir(self._run).addition)
        with run_lock(self._run, "add", part="adding", wait=WAIT_SECONDS):
            subject = DataSubject(pseudonym(user))
            if (
                not RunDir(self._run).addition_trained.is_file()
                and number_of(inner.selection.user_digests, subject) is not None
            ):
                remove_folder(inner.path)
            if str(source) not in RunDir(self._run).sources:
                source.unlink(missing_ok=True)


@contextmanager
def without_update(run: Path, user_id: str) -> Iterator[None]:
    """For a block, a training of this user in the background stops, and none begins: `forget` needs the run's lock."""
    file = _stop_file(run, user_id)
    if file.parent.is_dir():
        file.touch()
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _stop_file(run: Path, user_id: str) -> Path:
    return run / UPDATES / f"{pseudonym(user_id)}.stop"


def _text(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace")
