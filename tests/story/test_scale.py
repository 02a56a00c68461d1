"""A run divided among processes and shards is the run of one process, and one bad user harms nobody else."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from persona_rlhf.config.experiment import read_config
from persona_rlhf.pipeline import distributed, train
from tests.story.experiment import OVERRIDES, STRANGE, adapters, command, environment, persona_rlhf, results, rows_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

WORDS = ("train", "experiment.yaml", *OVERRIDES, "fleet.chunk=3")
SAME = ("user_id", "slug", "status", "reason", "alpha", "duals", "steps", "pairs", "path", "tier_one", "over_refusal")


def same(run, other):
    """Whether two runs hold the same bits, but for the time that each took."""
    assert adapters(run) == adapters(other)
    assert (run / "screening.jsonl").read_bytes() == (other / "screening.jsonl").read_bytes()
    for mine, theirs in zip(results(run), results(other), strict=True):
        assert [mine[key] for key in SAME] == [theirs[key] for key in SAME]
    return True


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory) -> Path:
    """The experiment, and its run in two processes: RUN is the folder `two` in it."""
    place = tmp_path_factory.mktemp("scale") / "mine"
    shutil.copytree(trained.folder, place)
    done = persona_rlhf(*WORDS, "--run", "two", "fleet.processes=2", "--json", cwd=place)
    assert done.returncode == trained.code, done.stderr
    assert [row["user_id"] for row in results(place / "two")] == list(STRANGE)
    assert "[1-of-2]" in done.stderr
    assert "[2-of-2]" in done.stderr
    assert done.stderr.count("Report:") == 1
    assert persona_rlhf("verify", "two", cwd=place).returncode == 0
    return place


def test_two_processes_make_the_adapters_of_a_run_that_is_one_chunk(folder, trained):
    """Other neighbours in the cohort, other rounding: 1e-5 of an adapter's norm in float32."""
    for name in adapters(trained.run):
        one, other = (
            load_file(run / f"adapters/{name}/adapter_model.safetensors") for run in (trained.run, folder / "two")
        )
        distance = sum(float((one[key] - other[key]).square().sum()) for key in one) ** 0.5
        assert distance <= 1e-5 * sum(float(one[key].square().sum()) for key in one) ** 0.5
    steps = dict.fromkeys(STRANGE, 0)
    for row in rows_of(folder / "two/metrics.jsonl"):
        steps[row["user_id"]] += 1
    assert set(steps.values()) == {6}


def test_shards_are_put_together_into_the_same_bits(folder):
    """The second shard goes first, the first is never run: putting together trains what is missing."""
    last = persona_rlhf(*WORDS, "--run", "shards", "--shard", "2/2", "--json", cwd=folder)
    assert (last.returncode, last.stdout) == (0, ""), last.stderr
    assert "--run shards --resume" in last.stderr
    assert not (folder / "shards/results.jsonl").exists()
    mixed = persona_rlhf(*WORDS, "--run", "shards", "--shard", "1/2", "dpo.beta=0.3", cwd=folder)
    assert mixed.returncode == 2
    assert "the config (dpo.beta) changed" in mixed.stderr
    joined = persona_rlhf(*WORDS, "--run", "shards", "--resume", cwd=folder)
    assert joined.returncode in (0, 3), joined.stderr
    assert same(folder / "shards", folder / "two")
    assert persona_rlhf("verify", "shards", cwd=folder).returncode == 0


@pytest.mark.parametrize("ended", ["worker", "launcher", "terminated"])
def test_a_run_of_processes_that_was_ended_is_resumed_to_the_same_bits(folder, tmp_path, ended):
    run, log = folder / ended, tmp_path / "log"
    words = command(*WORDS, "--run", ended, "fleet.processes=2")
    with log.open("w") as stderr:
        child = subprocess.Popen(words, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=stderr)
    workers: list[int] = []
    while child.poll() is None and not any(file.stat().st_size for file in run.glob("state/metrics-*.jsonl")):
        time.sleep(0.02)
    workers = [int(pid) for pid in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()]
    assert len(workers) == 2
    if ended == "worker":
        os.kill(workers[1], signal.SIGKILL)
        assert child.wait(60) == 1
        assert "Process 2 of 2 was ended by signal 9" in log.read_text()
    else:
        child.send_signal(signal.SIGKILL if ended == "launcher" else signal.SIGTERM)
        assert child.wait(60) == (-9 if ended == "launcher" else 130)
    for _ in range(300):
        if not any(Path(f"/proc/{pid}").exists() for pid in workers):
            break
        time.sleep(0.1)
    else:
        raise AssertionError("a process outlived the one that started it")
    assert f"--run {ended} --resume" in log.read_text()
    assert "Traceback" not in log.read_text()
    done = persona_rlhf(*WORDS, "--run", ended, "--resume", cwd=folder)  # one process takes up the work of two
    assert done.returncode in (0, 3), done.stderr
    assert same(run, folder / "two")


def test_a_user_who_makes_preparation_judging_or_writing_raise_fails_alone(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("persona_rlhf.pipeline.prepare.fit", _raising("persona_rlhf.pipeline.prepare.fit", "Ann"))
    from persona_rlhf.evaluation import evaluator
    from persona_rlhf.release import adapter

    measures = evaluator.Evaluator.measures

    def measured(self, flat, users, alphas):
        if any(user.user_id == "a/b" for user in users):
            raise RuntimeError("out of memory")
        return measures(self, flat, users, alphas)

    monkeypatch.setattr(evaluator.Evaluator, "measures", measured)
    export, unwritten = adapter.Exporter.write, list[str]()

    def first_raises(self, user_id, *others):
        if not unwritten:
            unwritten.append(user_id)
            raise RuntimeError("no words for it")
        return export(self, user_id, *others)

    monkeypatch.setattr(adapter.Exporter, "write", first_raises)
    config = read_config("experiment.yaml", [*OVERRIDES, "dpo.epochs=1"])
    found = {result.user_id: result for result in train.train(config, Path("bad"))}
    assert list(found) == list(STRANGE)
    assert found["Ann"].status == found["a/b"].status == "failed"
    assert found["Ann"].reason == "could not be prepared (ValueError: Ann)"
    assert found["a/b"].reason == "could not be judged (RuntimeError: out of memory)"
    assert found["Ann"].pairs == (0, 0, 0)
    assert found["a/b"].steps == 3
    assert found[unwritten[0]].reason == "could not be written (RuntimeError: no words for it)"
    assert found[unwritten[0]].path is None
    others = [result for user, result in found.items() if user not in ("Ann", "a/b", *unwritten)]
    assert {result.status for result in others} <= {"released", "held_back"}
    assert "out of memory" in Path("bad/report.html").read_text()
    assert persona_rlhf("verify", "bad", cwd=folder).returncode == 0


def _raising(name, bad):
    from persona_rlhf.data.screening import fit

    def raising(rows, tokenizer, context):
        if any(user.user_id == bad for user in rows):
            raise ValueError(bad)
        return fit(rows, tokenizer, context)

    return raising


def test_threads_are_shared_out(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8,4")
    assert distributed._threads() == 8
    monkeypatch.setenv("OMP_NUM_THREADS", "no")
    assert distributed._threads() == len(os.sched_getaffinity(0))
