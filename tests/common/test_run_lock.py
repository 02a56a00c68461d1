"""The lock of a run: who gets it, what the others are told, and that it ends with its process."""

import json
import multiprocessing
import os
import signal
import threading
import time
from contextvars import Context
from pathlib import Path

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.run_lock import LOCK, run_lock

_FORK = multiprocessing.get_context("fork")


class Elsewhere:
    """A process that holds the lock of a run until `end`."""

    def __init__(self, run: Path, verb: str, **options: object) -> None:
        self._held, self._go = _FORK.Event(), _FORK.Event()
        self.process = _FORK.Process(target=self._hold, args=(run, verb, options))
        self.process.start()
        assert self._held.wait(30)

    def _hold(self, run, verb, options):
        Context().run(self._hold_anew, run, verb, options)  # a fork would take its parent's locks for its own

    def _hold_anew(self, run, verb, options):
        with run_lock(run, verb, **options):
            self._held.set()
            self._go.wait(30)

    @property
    def pid(self):
        return self.process.pid

    def end(self) -> None:
        self._go.set()
        self.process.join(30)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.process.join(30)


def refusal(run, verb="report", **options) -> str:
    with pytest.raises(InputError) as caught, run_lock(run, verb, **options):
        pass
    [problem] = caught.value.problems
    assert problem.file == str(run)
    return problem.sentence


def test_the_loser_learns_who_is_at_work_and_what_to_do(tmp_path):
    other = Elsewhere(tmp_path, "forget")
    for shared in (False, True):
        sentence = refusal(tmp_path, shared=shared)
        assert sentence.startswith(f"`forget` (process {other.pid}, since ")
        assert "--wait SECONDS" in sentence
    other.end()
    with run_lock(tmp_path, "report"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_readers_go_together_and_keep_a_writer_out(tmp_path):
    verbs = ("verify", "audit")
    readers = [Elsewhere(tmp_path, verb, shared=True) for verb in verbs]
    with run_lock(tmp_path, "export", shared=True):
        pass
    sentence = refusal(tmp_path, "forget")
    assert all(f"`{verb}` (process {reader.pid}" in sentence for verb, reader in zip(verbs, readers, strict=True))
    readers[0].kill()  # its line stays until the last one leaves, but it is not named any more
    sentence = refusal(tmp_path, "forget")
    assert "`verify`" not in sentence
    assert "`audit`" in sentence
    readers[1].end()
    with run_lock(tmp_path, "forget"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_killed_holder_frees_the_lock(tmp_path):
    other = Elsewhere(tmp_path, "train")
    other.kill()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == other.pid
    with run_lock(tmp_path, "report"):
        assert json.loads((tmp_path / LOCK).read_text())["verb"] == "report"
    assert list(tmp_path.iterdir()) == []


def test_parts_go_together_each_of_them_once(tmp_path):
    tmp_path = tmp_path / "new"  # the first part makes it
    other = Elsewhere(tmp_path, "train", part="1-of-2")
    with run_lock(tmp_path, "train", part="2-of-2"):
        pass
    assert refusal(tmp_path, "train", part="1-of-2").startswith(f"`train, part 1-of-2` (process {other.pid}")
    assert "part 1-of-2" in refusal(tmp_path, "forget")
    other.end()
    assert not tmp_path.exists()


def test_waiting_is_told_once_and_ends_with_the_lock_or_in_time(tmp_path):
    other, lines = Elsewhere(tmp_path, "forget"), list[str]()
    before = time.monotonic()
    refusal(tmp_path, wait=0.4, tell=lines.append)
    assert 0.4 <= time.monotonic() - before < 5
    assert len(lines) == 1
    assert f"`forget` (process {other.pid}" in lines[0]
    threading.Timer(0.3, other.end).start()
    with run_lock(tmp_path, "report", wait=30):
        pass


def test_a_thread_holds_it_once_and_another_thread_waits(tmp_path):
    with (
        run_lock(tmp_path, "train"),
        run_lock(tmp_path / "." / "", "report"),
        run_lock(tmp_path, "verify", shared=True),
    ):
        sentences = list[str]()
        thread = threading.Thread(target=lambda: sentences.append(refusal(tmp_path)))
        thread.start()
        thread.join()
        assert f"`train` (process {os.getpid()}," in sentences[0]
    with run_lock(tmp_path, "report"):
        pass


def test_a_reader_inside_cannot_become_a_writer(tmp_path):
    with run_lock(tmp_path, "verify", shared=True), pytest.raises(AssertionError), run_lock(tmp_path, "forget"):
        pass


def test_a_folder_made_for_the_lock_goes_with_it_unless_it_is_used(tmp_path):
    with run_lock(tmp_path / "runs/a", "train"):
        assert (tmp_path / "runs/a" / LOCK).exists()
    assert list(tmp_path.iterdir()) == []
    with run_lock(tmp_path / "runs/a", "train"):
        (tmp_path / "runs/a/config.yaml").touch()
    assert [file.name for file in (tmp_path / "runs/a").iterdir()] == ["config.yaml"]
    with run_lock(tmp_path / "none", "verify", shared=True):
        pass
    assert not (tmp_path / "none").exists()


def test_a_swap_of_folders_takes_no_lock_along(tmp_path):
    """A waiter gets the lock of the run that has the name now, not of the one that had it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "new").mkdir()
    with run_lock(tmp_path / "run", "rebase"):
        (tmp_path / "run").rename(tmp_path / "before")
        (tmp_path / "new").rename(tmp_path / "run")
        other = Elsewhere(tmp_path / "run", "report")
        assert f"process {other.pid}" in Context().run(refusal, tmp_path / "run")
        other.end()
    assert (tmp_path / "before" / LOCK).read_text() == ""
    with run_lock(tmp_path / "before", "report"):
        pass


def test_a_reader_may_read_a_folder_that_it_may_not_write_to(tmp_path, monkeypatch):
    opened = os.open

    def read_only(path, flags, *mode, **more):
        if flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *mode, **more)

    monkeypatch.setattr(os, "open", read_only)
    with run_lock(tmp_path, "verify", shared=True):
        pass
    with pytest.raises(PermissionError), run_lock(tmp_path, "forget"):
        pass
    (tmp_path / LOCK).touch()
    with run_lock(tmp_path, "verify", shared=True):
        monkeypatch.undo()
        assert "another program is at work" in Context().run(refusal, tmp_path)  # it could not write its line


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(InputError, match="this file system has no locks"), run_lock(tmp_path, "forget"):
        pass
