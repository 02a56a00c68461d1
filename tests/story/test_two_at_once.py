"""All pairs of verbs at once: one stands still in the middle of a write, every other one is tried meanwhile."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from persona_rlhf.cli.app import app
from persona_rlhf.common.files import shipped_root
from persona_rlhf.release.verify import verify
from tests.story.experiment import OVERRIDES, environment, listing, persona_rlhf, results, write_users

_TABLE = pytest.mark.skipif(
    "ALL_PAIRS" not in os.environ, reason="nine minutes: set ALL_PAIRS=1 for all pairs of verbs"
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), _TABLE]

_STOP = """
import os, sys, time
from pathlib import Path
ending, there, go = sys.argv[1:4]
def hook(event, facts):
    if event == "os.rename" and str(facts[1]).endswith(ending) and not os.path.exists(there):
        os.mkdir(there)
        while not os.path.exists(go):
            time.sleep(0.02)
sys.addaudithook(hook)
sys.argv = ["persona-rlhf", *sys.argv[4:]]
from persona_rlhf.cli.app import main
main()
"""
POLICY = ("--policy", "policy/tier_one.yaml", "--policy", "policy/tier_two.yaml")
READERS = {
    "verify": ("verify", "run"),
    "audit": ("audit", "run", "--head"),
    "evaluate": ("evaluate", "run"),
    "export": ("export", "run", "--user", "Ann", "--to", "out"),
    "data review": ("data", "review", "run"),
    "policy packet": ("policy", "packet", "run"),
}
WRITERS = {
    "forget": ("forget", "run", "--user", "ann"),
    "report": ("report", "run"),
    "recertify": ("recertify", "run", *POLICY),
    "evaluate --redteam": ("evaluate", "run", "redteam.probes=2", "--redteam"),
    "serve --make-tokens": ("serve", "run", "--tokens", "tokens", "--make-tokens"),
    "add": ("add", "run", "--users", "more"),
    "train --resume": ("train", "experiment.yaml", *OVERRIDES, "--run", "run", "--resume"),
    "rebase --replace": ("rebase", "run", "--base", "other", "--replace"),
}
QUICK = ("verify", "audit", "data review", "policy packet")


@pytest.fixture
def mine(copied, monkeypatch) -> Path:
    """The trained experiment, a user to add to it, and another base."""
    monkeypatch.chdir(copied)
    (copied / "more").mkdir()
    write_users(copied / "more", ("one more",))
    (copied / "other").mkdir()
    for file in (shipped_root() / "data/base").iterdir():
        if file.name != "model.safetensors":
            (copied / "other" / file.name).write_bytes(file.read_bytes())
    weights = load_file(shipped_root() / "data/base/model.safetensors")
    name = sorted(weights)[0]
    save_file({**weights, name: weights[name] * 1.5}, copied / "other/model.safetensors", {"format": "pt"})
    return copied


@contextmanager
def stopped(words: Sequence[str], ending: str, place: Path) -> Iterator[int]:
    """The command in a process of its own, which stands still before it names a file so; its id."""
    there, go = place / "there", place / "go"
    command = [sys.executable, "-c", _STOP, ending, str(there), str(go), *words, "--wait", "0"]
    child = Popen(command, env=environment(), stdout=PIPE, stderr=PIPE, text=True)
    try:
        while child.poll() is None and not there.exists():
            time.sleep(0.02)
        assert child.poll() is None, child.communicate()
        yield child.pid
        go.mkdir()
        out, err = child.communicate(timeout=600)
        assert child.returncode in (0, 3), out + err
    finally:
        child.kill()
        child.wait()


def refused(words: Sequence[str], pid: int) -> None:
    done = CliRunner().invoke(app, [*words, "--wait", "0"])
    assert done.exit_code == 2, (words, done.output, done.exception)
    *_, sentence, count = done.stderr.splitlines()
    assert f"(process {pid}, since " in sentence, words
    assert "--wait SECONDS" in sentence
    assert count == "1 problem found."


def admitted(words: Sequence[str]) -> None:
    done = CliRunner().invoke(app, [*words, "--wait", "0"])
    assert done.exit_code in (0, 3), (words, done.output)


@pytest.mark.parametrize(
    ("verb", "ending"),
    [
        ("forget", "run/results.jsonl"),
        ("forget", "run/manifest.json"),
        ("report", "report.html"),
        ("recertify", "run/manifest.json"),
        ("evaluate --redteam", "redteam.json"),
        ("serve --make-tokens", "tokens"),
        ("add", "run/results.jsonl"),
        ("rebase --replace", "rebased/results.jsonl"),
        ("rebase --replace", "run.before"),
    ],
)
def test_while_one_writes_no_other_verb_gets_in(mine, tmp_path, verb, ending):
    with stopped(WRITERS[verb], ending, tmp_path) as pid:
        before = listing(mine)
        for words in (*WRITERS.values(), *READERS.values()):
            refused(words, pid)
        assert listing(mine) == before
    assert verify(Path("run")) == []
    assert not list(Path().glob("**/.lock*"))


def test_readers_go_together_and_keep_writers_out(mine, tmp_path):
    with stopped(READERS["export"], "out", tmp_path) as pid:
        for verb, words in WRITERS.items():
            if verb != "add":  # it trains meanwhile, and waits at its end
                refused(words, pid)
        for verb in QUICK:
            admitted(READERS[verb])


def test_readers_go_on_while_users_are_added_and_another_addition_does_not(mine, tmp_path):
    with stopped(WRITERS["add"], "adding/results.jsonl", tmp_path) as pid:
        for words in WRITERS.values():
            refused(words, pid)
        for verb in QUICK:
            admitted(READERS[verb])
    assert "one more" in {line["user_id"] for line in results(Path("run"))}
    assert verify(Path("run")) == []


def test_a_run_is_trained_once_at_a_time(mine, tmp_path):
    words = ("train", "experiment.yaml", *OVERRIDES, "--run", "new")
    with stopped(words, "new/results.jsonl", tmp_path) as pid:
        for more in ((), ("--resume",), ("--shard", "1/2")):
            refused([*words, *more], pid)
        refused(("forget", "new", "--user", "Ann"), pid)
        refused(("rebase", "run", "--base", "other", "--run", "new"), pid)
    steps = re.findall(r'"user_id": "Ann", "step": (\d+)', Path("new/metrics.jsonl").read_text())
    assert len(steps) == len(set(steps)) == len(re.findall('"user_id": "ann"', Path("new/metrics.jsonl").read_text()))
    assert verify(Path("new")) == []


def test_shards_train_one_run_together_each_of_them_once(mine, tmp_path):
    words = ("train", "experiment.yaml", *OVERRIDES, "--run", "new", "--shard")
    with stopped([*words, "1/2"], "state/chunks/000000/results.jsonl", tmp_path) as pid:
        refused([*words, "1/2"], pid)
        refused(("forget", "new", "--user", "Ann"), pid)
        refused([*words[:-1], "--resume"], pid)
        other = persona_rlhf(*words, "2/2", cwd=mine)
        assert other.returncode == 0, other.stderr
    joined = persona_rlhf(*words[:-1], "--resume", cwd=mine)
    assert joined.returncode in (0, 3), joined.stderr
    assert verify(Path("new")) == []


def test_a_sweep_is_run_once_at_a_time(mine, tmp_path):
    Path("sweep.yaml").write_text("name: s\nconfig: experiment.yaml\nseeds: [0]\n", encoding="utf-8")
    words = ("sweep", "sweep.yaml", *OVERRIDES, "--run", "swept")
    with stopped(words, "sweep.json", tmp_path) as pid:
        refused(words, pid)
        refused([*words, "--resume"], pid)
