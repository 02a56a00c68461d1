"""Two commands over one run at once: the second learns who is at work, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from persona_rlhf.cli.app import app
from persona_rlhf.common.files import pseudonym
from persona_rlhf.release import integrity
from persona_rlhf.release.deletion_records import forgotten, pending
from persona_rlhf.release.results import read_results
from persona_rlhf.release.verify import verify
from tests.pipeline.test_forget_user import ID, base, planted, run  # noqa: F401  # fixtures
from tests.story.experiment import listing

WRITERS = {  # the file before whose change each of them is stopped
    ("forget", "--user", ID): ("pending", "results.jsonl", "report.html", "json", "manifest.json"),
    ("report",): ("report.html",),
    ("serve", "--tokens", "tokens", "--make-tokens"): ("tokens",),
}
READERS = {("verify",), ("audit", "--json"), ("export", "--user", "Ada", "--to", "out"), ("policy", "packet")}
WORDS = {f"{words[0]}": words for words in (*WRITERS, *READERS)}


def of_run(words: Sequence[str], run: Path) -> list[str]:
    """The words of a command over this run."""
    group = 2 if words[0] == "policy" else 1
    return [*words[:group], str(run), *words[group:], "--wait", "0"]


def command(words: Sequence[str], run: Path):
    return CliRunner().invoke(app, of_run(words, run))


@contextmanager
def stopped_before(words: Sequence[str], run: Path, ending: str) -> Iterator[int]:
    """The command in a process of its own, which stands still before it changes a file with this ending; its id."""
    there, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            sys.addaudithook(lambda event, facts: stop(event, facts, ending, there[1], go[0]))
            os._exit(command(words, run).exit_code)
        os._exit(99)
    os.close(there[1])
    try:
        assert os.read(there[0], 1) == b"!", "it never came to that file"
        yield child
        os.write(go[1], b"!")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        for handle in (there[0], *go):
            os.close(handle)


def stop(event: str, facts: tuple[object, ...], ending: str, there: int, go: int) -> None:
    if event == "os.rename" and str(facts[1]).endswith(ending):
        with suppress(OSError):  # the second time
            os.write(there, b"!")
            os.close(there)
            os.read(go, 1)


def test_one_of_two_is_refused_with_one_sentence_and_changes_nothing(planted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with stopped_before(WORDS["forget"], planted, "results.jsonl") as pid:
        before = listing(tmp_path)
        assert len(pending(planted)) == 1  # a live deletion, which nobody may finish for it
        for words in (*WRITERS, *READERS):
            done = command(words, planted)
            sentence, count = done.stderr.splitlines()
            assert done.exit_code == 2, words
            assert f"`forget` (process {pid}, since " in sentence, words
            assert count == "1 problem found."
            assert done.stdout == ""
        assert listing(tmp_path) == before
    assert pending(planted) == []
    assert verify(planted) == []


def test_readers_go_together_and_a_writer_waits_for_them(planted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with stopped_before(WORDS["export"], planted, "out") as pid:
        for words in READERS - {WORDS["export"]}:
            assert "is at work" not in command(words, planted).stderr, words
        for words in WRITERS:
            done = command(words, planted)
            assert done.exit_code == 2, words
            assert f"`export` (process {pid}, since " in done.stderr, words
    assert command(WORDS["forget"], planted).exit_code == 0
    assert verify(planted) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "ending"), [(words, ending) for words, endings in WRITERS.items() for ending in endings]
)
def test_no_pair_of_commands_at_once_loses_anything(planted, tmp_path, monkeypatch, words, ending):
    monkeypatch.chdir(tmp_path)
    with stopped_before(words, planted, ending) as pid:
        before = listing(tmp_path)
        for other in (*WRITERS, *READERS):
            done = command(other, planted)
            assert done.exit_code == 2, other
            assert f"(process {pid}, since " in done.stderr, other
        assert listing(tmp_path) == before
    for other in (*WRITERS, *READERS):
        assert command(other, planted).exit_code == 0, other
    assert verify(planted) == []


def test_four_deletions_at_once_all_happen(planted, tmp_path):
    users = [result.user_id for result in read_results(planted)][:4]
    metrics = [json.loads(line) for line in (planted / "metrics.jsonl").read_text().splitlines()[:-1]]
    kept = [row for row in metrics if row["user_id"] not in users]
    children = []
    for user in users:
        children.append(os.fork())
        if children[-1] == 0:
            done = CliRunner().invoke(app, ["forget", str(planted), "--user", user, "--wait", "100"])
            os._exit(done.exit_code)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert verify(planted) == []
    assert forgotten(planted) == {pseudonym(user) for user in users}
    assert {entry.facts["user"] for entry in integrity.read(planted)} == forgotten(planted)
    assert [json.loads(line) for line in (planted / "metrics.jsonl").read_text().splitlines()] == kept
    assert {result.user_id for result in read_results(planted)}.isdisjoint(users)


def test_a_killed_command_frees_the_run_and_the_next_one_finishes_it(planted, tmp_path):
    with suppress(AssertionError), stopped_before(WORDS["forget"], planted, "report.html") as pid:
        os.kill(pid, signal.SIGKILL)
    assert len(pending(planted)) == 1
    assert (planted / ".lock").exists()
    done = command(("verify",), planted)
    assert done.exit_code == 0
    assert "Finished an interrupted deletion" in done.stderr
    assert not (planted / ".lock").exists()
