"""A run killed at random moments and resumed is, bit for bit, the run that nobody killed."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections import Counter

import pytest

from tests.story.experiment import OVERRIDES, adapters, command, environment, persona_rlhf, results, rows_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def start(folder, log, *words):
    with log.open("w") as stderr:
        return subprocess.Popen(
            command("train", "experiment.yaml", *OVERRIDES, "--run", "killed", *words),
            cwd=folder,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )


def kill(child, moment):
    """kill -9, once `moment()` has come; whether the child still ran then."""
    while child.poll() is None and not moment():
        time.sleep(0.01)
    alive = child.poll() is None
    child.kill()
    child.wait()
    return alive


def test_killed_and_resumed_gives_the_same_bits(trained, tmp_path):
    folder, log = tmp_path / "mine", tmp_path / "log"
    shutil.copytree(trained.folder, folder, ignore=shutil.ignore_patterns("run"))
    metrics = folder / "killed/metrics.jsonl"
    first, delay = random.randint(1, 20), random.uniform(0, 2)
    print(f"killed after {first} lines of metrics, then {delay:.2f} s into judging")  # shown where the test fails

    def lines():
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    assert kill(start(folder, log), lambda: lines() >= first)
    assert not (folder / "killed/report.html").exists()

    judging = []

    def while_judging():
        if not judging and "judging" in log.read_text():
            judging.append(time.monotonic())
        return bool(judging) and time.monotonic() - judging[0] >= delay

    assert kill(start(folder, log, "--resume"), while_judging), log.read_text()
    child = start(folder, log, "--resume")
    assert child.wait() == trained.code, log.read_text()

    assert adapters(folder / "killed") == adapters(trained.run)
    for resumed, straight in zip(results(folder / "killed"), results(trained.run), strict=True):
        for key in ("user_id", "slug", "status", "alpha", "duals", "steps", "pairs", "path", "tier_one"):
            assert resumed[key] == straight[key], (resumed["user_id"], key)
    assert persona_rlhf("verify", "killed", cwd=folder).returncode == 0
    told = Counter(row["event"] for row in rows_of(folder / "killed/audit.jsonl"))
    assert told["begun"] == told["finished"] == 1
    assert told["continued"] == 2
    assert told["released"] >= sum(line["status"] == "released" for line in results(trained.run))
    assert not [path for path in (folder / "killed").rglob("*") if path.name.endswith((".half", ".old"))]
    assert len(rows_of(metrics)) >= 36  # some steps twice; every line is whole


def test_a_run_is_resumed_only_as_what_it_was(copied):
    def resumed(*words):
        done = persona_rlhf("train", "experiment.yaml", *OVERRIDES, *words, "--run", "run", "--resume", cwd=copied)
        assert done.returncode == 2, done.stderr
        return done.stderr

    assert "the config (dpo.beta) changed" in resumed("dpo.beta=0.2")
    users = copied / "users/pairs.jsonl"
    whole = users.read_text()
    users.write_text(whole.replace('"chosen": "', '"chosen": "Well. ', 1))
    assert "the preference pairs changed" in resumed()
    users.write_text(whole)
    document = copied / "policy/tier_one.yaml"
    document.write_text(document.read_text().replace("limit: 0.5", "limit: 0.4", 1))
    assert "the config (dpo.beta) and the policy changed" in resumed("dpo.beta=0.2")


def test_there_must_be_a_run_to_resume(copied):
    done = persona_rlhf("train", "experiment.yaml", *OVERRIDES, "--run", "new", "--resume", cwd=copied)
    assert done.returncode == 2
    assert "no run here" in done.stderr
    assert not (copied / "new").exists()


def test_a_finished_run_resumes_to_itself(copied):
    before = adapters(copied / "run")
    done = persona_rlhf("train", "experiment.yaml", *OVERRIDES, "--run", "run", "--resume", cwd=copied)
    assert done.returncode in (0, 3), done.stderr
    assert adapters(copied / "run") == before
    assert persona_rlhf("verify", "run", cwd=copied).returncode == 0
