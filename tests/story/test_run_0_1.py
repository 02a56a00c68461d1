"""A run folder that version 0.1 wrote (`run_0_1/`) is opened by this version: every verb that reads a run."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from persona_rlhf.common.files import slug
from persona_rlhf.release.results import read_results
from tests.cli.test_serve import Server, read
from tests.story.experiment import persona_rlhf

USERS = ("Ann", "ann", "../../etc")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """The experiment of that run: its policy, probes, users, and the run."""
    folder = tmp_path_factory.mktemp("old") / "experiment"
    shutil.copytree(Path(__file__).with_name("run_0_1"), folder)
    return folder


def succeed(*words, cwd):
    done = persona_rlhf(*words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_its_hashes_signatures_and_audit_trail_hold(experiment):
    succeed("verify", "run", cwd=experiment)
    for user in USERS:
        succeed("verify", f"run/adapters/{slug(user)}", cwd=experiment)


def test_a_changed_adapter_of_it_is_noticed(experiment, tmp_path):
    shutil.copytree(experiment, tmp_path / "changed")
    weights = tmp_path / "changed/run/adapters" / slug("Ann") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert persona_rlhf("verify", "run", cwd=tmp_path / "changed").returncode == 3


def test_its_results_are_read_and_reported(experiment, tmp_path):
    shutil.copytree(experiment, tmp_path / "copy")
    results = read_results(tmp_path / "copy/run")
    assert [(result.user_id, result.status, result.alpha) for result in results] == [
        (user, "released", 1.0) for user in USERS
    ]
    before = (tmp_path / "copy/run/report.html").read_text(encoding="utf-8")
    promise = json.loads((tmp_path / "copy/run/summary.json").read_bytes())["promise"]
    succeed("report", "run", cwd=tmp_path / "copy")
    after = (tmp_path / "copy/run/report.html").read_text(encoding="utf-8")
    assert all(user in before and user in after for user in ("Ann", "ann", "../../etc"))
    kept = json.loads((tmp_path / "copy/run/summary.json").read_bytes())["promise"]
    assert kept["judged"] == promise["judged"] == 3
    assert {key: value for key, value in kept.items() if key != "sentence"} == pytest.approx(
        {key: value for key, value in promise.items() if key != "sentence"}, rel=1e-9
    )


def test_its_figures_are_measured_again(experiment):
    lines = json.loads(succeed("evaluate", "run", "--json", cwd=experiment))
    before = {result.user_id: result for result in read_results(experiment / "run")}
    for line in lines:
        assert line["heldout_accuracy"]["adapted"] == before[line["user_id"]].measures.heldout_accuracy.adapted


def test_an_adapter_of_it_is_exported(experiment, tmp_path):
    succeed("export", "run", "--user", "../../etc", "--to", tmp_path / "out", cwd=experiment)
    exported = load_file(tmp_path / "out/adapter_model.safetensors")
    released = load_file(experiment / "run/adapters" / slug("../../etc") / "adapter_model.safetensors")
    assert exported.keys() == released.keys()
    assert all(exported[name].equal(released[name]) for name in exported)


def test_it_is_served(experiment, tmp_path):
    tokens = tmp_path / "tokens.json"
    made = succeed("serve", "run", "--make-tokens", "--tokens", tokens, cwd=experiment)
    token = {line["user_id"]: line["token"] for line in map(json.loads, made.splitlines())}["Ann"]
    server = Server(["serve", "run", "--tokens", str(tokens)], cwd=experiment)
    try:
        messages = [{"role": "user", "content": "How do I bake bread?"}]
        status, answer = read(server.ask(token, model=slug("Ann"), messages=messages, max_tokens=8))
        assert status == 200
        assert answer["choices"][0]["message"]["content"]
        assert server.stop() == 0
    finally:
        server.process.kill()
        server.process.wait()
        server.process.stderr.close()


def test_no_path_of_a_machine_is_in_it():
    text = (Path(__file__).with_name("run_0_1") / "run/config.yaml").read_text(encoding="utf-8")
    assert not [line for line in text.splitlines() if ": /" in line]


def test_a_user_of_it_is_forgotten(experiment, tmp_path):
    shutil.copytree(experiment, tmp_path / "copy")
    succeed("forget", "run", "--user", "ann", cwd=tmp_path / "copy")
    assert [result.user_id for result in read_results(tmp_path / "copy/run")] == ["Ann", "../../etc"]
    succeed("verify", "run", cwd=tmp_path / "copy")
