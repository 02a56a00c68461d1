"""The line of a run on a pretended GPU, through the command line: train, resume, export, verify, add, serve."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from persona_rlhf.cli.app import app
from persona_rlhf.common.files import shipped_root
from persona_rlhf.training.engine import Engine
from tests.gpu.pretended_cuda import enable
from tests.story.experiment import UNMEASURED, adapters, results, shrink, write_users, write_yaml

machine = enable()

USERS = ["Ann", "Bob", "Cy"]
SHORT = (
    "dpo.epochs=1",
    "dpo.early_stop={every: 2, patience: 2}",
    "gate.alphas=[1.0]",
    "gate.max_new_tokens=24",
    "constraint.rows_per_step=2",
    "constraint.refusals_per_probe=1",
    "constraint.most_probes=4",
    "fleet.slots=2",
    "fleet.checkpoint_every=1",
    *UNMEASURED,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An experiment with three users, and a provider that requires something."""
    place = tmp_path_factory.mktemp("line")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert run("init", "mine").exit_code == 0
    folder = place / "mine"
    shrink(folder, USERS)
    prompts = (shipped_root() / "data/policy/requirements/everyday.jsonl").read_text(encoding="utf-8")
    (folder / "banks/everyday.jsonl").write_text("".join(prompts.splitlines(keepends=True)[:12]), encoding="utf-8")
    rule = {"id": "t2.brief", "kind": "requirement", "probes": "banks/everyday.jsonl", "max_words": 40}
    issuer = {"role": "application_provider", "name": "Provider"}
    document = {"tier": "two", "issuer": issuer, "version": "1", "rules": [rule]}
    write_yaml(folder / "policy/tier_two.yaml", document)
    config = yaml.safe_load((folder / "experiment.yaml").read_text(encoding="utf-8"))
    documents = {"documents": ["policy/tier_one.yaml", "policy/tier_two.yaml"]}
    write_yaml(folder / "experiment.yaml", config | {"policy": documents})
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    machine.reset_peak()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = run("train", "experiment.yaml", *SHORT, "--run", "run")
    assert done.exit_code in (0, 3), done.output
    return folder / "run"


@pytest.fixture(scope="module")
def peak(trained):
    """The most bytes that the run in bfloat16 held."""
    return machine.peak() - machine.held()


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def run(*words):
    return CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)


def test_requirements_constraint_and_gate_run_in_bfloat16(trained):
    lines = results(trained)
    assert [line["user_id"] for line in lines] == USERS
    assert {line["status"] for line in lines} <= {"released", "held_back"}
    assert any(line["status"] == "released" for line in lines)
    assert "bfloat16" in json.dumps(lines) or "bfloat16" in next(trained.glob("adapters/*/persona.json")).read_text()


def test_a_killed_run_goes_on_to_the_same_bytes(trained, monkeypatch):
    with monkeypatch.context() as patch:
        saves, save = [], Engine._save

        def killed(engine):
            saves.append(save(engine))
            if len(saves) == 3:
                raise KeyboardInterrupt

        patch.setattr(Engine, "_save", killed)
        assert run("train", "experiment.yaml", *SHORT, "--run", "killed").exit_code == 130
    assert run("train", "experiment.yaml", *SHORT, "--run", "killed", "--resume").exit_code in (0, 3)
    assert adapters(trained.parent / "killed") == adapters(trained)


def test_export_and_verify(trained):
    user = next(line["user_id"] for line in results(trained) if line["status"] == "released")
    assert run("verify", "run").exit_code == 0
    assert run("export", "run", "--user", user, "--to", "exported").exit_code == 0
    assert run("verify", "exported").exit_code == 0


def test_a_user_is_added_and_the_others_stay(trained):
    write_users(trained.parent / "users", [*USERS, "Dan"])
    before = adapters(trained)
    try:
        added = run("add", "run", "--users", "users", "--json")
    finally:
        write_users(trained.parent / "users", USERS)
    assert added.exit_code in (0, 3), added.output
    assert [line["user_id"] for line in results(trained)] == [*USERS, "Dan"]
    assert before.items() <= adapters(trained).items()
    assert run("verify", "run").exit_code == 0


def test_an_old_and_small_gpu_gives_the_cpu_s_run(trained, peak, monkeypatch):
    """Compute capability 7.5 means float32; passes of reference, gate and training do not fit and are cut."""
    freed, outcomes = [], {}
    for place in ("models.passes", "training.engine"):
        monkeypatch.setattr(f"persona_rlhf.{place}.release_cache", lambda place=place: freed.append(place))
    for device in ("cpu", "cuda"):
        with machine.of_capability(7, 5), machine.memory(machine.held() + peak // 2):
            done = run("train", "experiment.yaml", *SHORT, f"base.device={device}", "--run", device)
        assert done.exit_code in (0, 3), done.output
        rows = map(json.loads, Path(device, "metrics.jsonl").read_text().splitlines())
        losses = {(row["user_id"], row["step"]): row["loss"] for row in rows}
        outcomes[device] = [(line["status"], line["tier_one"]) for line in results(Path(device))], losses
    assert set(freed) >= {"models.passes"}
    assert outcomes["cuda"][0] == outcomes["cpu"][0]
    assert outcomes["cuda"][1] == pytest.approx(outcomes["cpu"][1], rel=1e-3)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # pipes to ended processes
def test_two_processes_train_on_two_gpus(trained, tmp_path, monkeypatch):
    """Each process has the pretended GPUs through a Python of its own; the users are those of one process."""
    program = "import sys, runpy; from tests.gpu.pretended_cuda import enable; enable(); import torch; "
    program += f"open({str(tmp_path / 'gpus')!r}, 'a').write(__import__('os').environ['LOCAL_RANK']); "
    program += "runpy.run_module('persona_rlhf', run_name='__main__', alter_sys=True)"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} -c "{program}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[2]}:{Path(__file__).parents[2] / 'src'}")
    monkeypatch.setattr("persona_rlhf.pipeline.distributed.sys.executable", str(python))
    done = run("train", "experiment.yaml", *SHORT, "fleet.processes=2", "--run", "pair")
    assert done.exit_code in (0, 3), done.output
    assert sorted((tmp_path / "gpus").read_text()) == ["0", "1"]
    assert [line["user_id"] for line in results(Path("pair"))] == USERS
    assert [line["status"] for line in results(Path("pair"))] == [line["status"] for line in results(trained)][:3]


def test_more_processes_than_gpus_are_refused_before_anything_is_written(folder, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    refused = run("train", "experiment.yaml", *SHORT, "fleet.processes=3", "--run", "crowded")
    assert refused.exit_code == 2
    assert "fleet.processes" in refused.output
    assert not list(folder.glob("crowded/*"))
