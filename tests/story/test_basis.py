"""A run with a reward basis: labelled pairs in training, its traces in the results, and an end that no stop changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import sha256_of, shipped_root
from persona_rlhf.config.experiment import read_config
from persona_rlhf.config.training import BaseSettings, LoraSettings
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import load_base, weights_hash
from persona_rlhf.pipeline.train import train
from persona_rlhf.release.adapter import read_adapter
from persona_rlhf.training import checkpoint
from persona_rlhf.training.answer_features import scaled_features
from persona_rlhf.training.reward_basis import Prior, RewardBasis
from tests.story.experiment import adapters, persona_rlhf, results, rows_of, shrink

USERS = ("Ann", "Bob")
SETTINGS = (
    *("basis.file=basis.safetensors", "basis.pairs=9", "basis.candidates=12", "dpo.epochs=2"),
    *("fleet.slots=2", "fleet.checkpoint_every=2"),
    *("gate.enabled=false", "constraint.enabled=false", "screening.base=off", "evaluation.facts=null"),
    *("evaluation.win_rate_prompts=0", "evaluation.harmless_prompts=0", "evaluation.test_probes=0"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """An experiment of two users, and a basis whose one direction is the number of words."""
    folder = tmp_path_factory.mktemp("basis")
    assert persona_rlhf("init", "mine", cwd=folder).returncode == 0
    shrink(folder / "mine", USERS)
    features = scaled_features(["One.", "One and two."])
    directions = torch.zeros(len(features.scale), 1, dtype=torch.float64)
    directions[0] = 1
    prior = Prior(torch.zeros(1, dtype=torch.float64), 0.3)
    base = weights_hash(BaseSettings(model=str(shipped_root() / "data/base")))
    RewardBasis(features, directions, prior, base).save(folder / "mine/basis.safetensors")
    return folder / "mine"


def config_of(place, monkeypatch, *changes):
    monkeypatch.chdir(place)
    return read_config("experiment.yaml", [*SETTINGS, *changes])


def test_labelled_pairs_train_and_a_stopped_run_ends_in_the_same_bits(place, monkeypatch):
    config, steps = config_of(place, monkeypatch), []
    train(config, place / "whole")

    def stop(event):
        steps.extend([event.step] if event.phase == "training" else [])
        if len(steps) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, place / "stopped", on_progress=stop)
    answers = (place / "stopped/state/answers.jsonl").read_bytes()
    train(config, place / "stopped", resume=True)
    assert (place / "stopped/state/answers.jsonl").read_bytes() == answers
    assert len(adapters(place / "whole")) == len(USERS)
    assert adapters(place / "stopped") == adapters(place / "whole")
    priors = {(place / run / "state/prior.safetensors").read_bytes() for run in ("stopped", "whole")}
    assert len(priors) == 1

    digest = sha256_of(place / "basis.safetensors")
    for line in results(place / "whole"):
        use = line["basis"]
        assert (use["sha256"], use["pairs"]) == (digest, line["pairs"]["train"])
        assert 5 <= use["labelled"] <= 9
        gain = line["gain_over_prior"]
        assert (gain["prior"], gain["by"], gain["n"]) == ("population", "left-out pairs", 12)
        assert gain["low"] <= gain["gain"] <= gain["high"]
        assert line["steps"] == sum(-(-(12 + part) // 4) for part in (use["labelled"] // 2, -(-use["labelled"] // 2)))
        manifest = json.loads((place / "whole" / line["path"] / "persona.json").read_text())
        assert manifest["settings"]["basis"] == {"sha256": digest, "pairs": 9}
    texts = {row[key] for row in rows_of(place / "users/pairs.jsonl") for key in ("prompt", "chosen", "rejected")}
    pool = [json.loads(line) for line in answers.decode().splitlines()]
    assert not texts & {text for row in pool for text in row[:1]}


def test_users_whose_pairs_show_no_gain_keep_the_gated_prior_everywhere(place, monkeypatch):
    gated = ("gate.enabled=true", "basis.prior_level=0.001", "fleet.checkpoint_every=100")
    train(config_of(place, monkeypatch, *gated), place / "prior")
    population = checkpoint.load(place / "prior/state/prior.safetensors", torch.device("cpu"))[0]["adapter"]
    lines = results(place / "prior")
    assert [line["status"] for line in lines] == ["prior", "prior"]
    for line in lines:
        assert line["spending"]["look"] == 1
        assert "passed" in line["reason"]
        assert "left-out pairs of 12 prompts" in line["reason"]
        folder = place / "prior" / line["path"]
        manifest = json.loads((folder / "persona.json").read_text())
        assert (manifest["adapter"], manifest["verdict"]["certified"]) == ("population", True)
        assert manifest["settings"]["basis"]["prior_level"] == 0.001
        assert "the mean preferences of a population" in (folder / "README.md").read_text()
    assert len(set(adapters(place / "prior").values())) == 1
    base = load_base(BaseSettings(model=str(shipped_root() / "data/base")))
    spans = list(AdaptedModel(base, LoraSettings(layers={"top": 0.25})).spans.values())
    assert torch.equal(read_adapter(place / "prior" / lines[0]["path"], spans), population)

    summary = json.loads((place / "prior/summary.json").read_text())
    assert (summary["released"], summary["prior"], summary["promise"]["released"]) == (0, 2, 2)
    assert "2 with the population&#39;s adapter" in (place / "prior/report.html").read_text()
    for arguments in (("verify", "prior"), ("export", "prior", "--user", "Ann", "--to", "ann"), ("evaluate", "prior")):
        done = persona_rlhf(*arguments, cwd=place)
        assert done.returncode == 0, done.stderr
    done = persona_rlhf("evaluate", "prior", "--data-curve", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    curve = json.loads((place / "prior/data_curve.json").read_text())
    assert json.loads(done.stdout) == curve
    assert [(one["user_id"], one["pairs"], one["adapter"]) for one in curve["users"]] == [
        ("Ann", 12, None),
        ("Bob", 12, None),
    ]
    assert [point["pairs"] for point in curve["users"][0]["points"]] == [0, 1, 2, 5, 10]
    assert curve["need"]["users"] == 2
    assert "Pairs that a user needs" in (place / "prior/report.html").read_text()
    assert persona_rlhf("verify", "prior", cwd=place).returncode == 0
    line = (place / "prior/results.jsonl").read_text().replace('"status": "prior"', '"status": "released"', 1)
    kept = (place / "prior/results.jsonl").read_text()
    (place / "prior/results.jsonl").write_text(line)
    assert persona_rlhf("verify", "prior", cwd=place).returncode != 0
    (place / "prior/results.jsonl").write_text(kept)
    assert persona_rlhf("forget", "prior", "--user", "Ann", cwd=place).returncode == 0
    assert [line["user_id"] for line in results(place / "prior")] == ["Bob"]
    assert (place / "prior/state/prior.safetensors").exists()
    curve = json.loads((place / "prior/data_curve.json").read_text())
    assert ([one["user_id"] for one in curve["users"]], curve["need"], curve["all_users"]) == (["Bob"], None, [])
    assert persona_rlhf("verify", "prior", cwd=place).returncode == 0


def test_a_basis_of_another_base_or_a_missing_one_is_named(place, monkeypatch):
    features = scaled_features(["One.", "One and two."])
    prior = Prior(torch.zeros(1, dtype=torch.float64), 0.3)
    other = RewardBasis(features, torch.zeros(len(features.scale), 1, dtype=torch.float64), prior, "f" * 64)
    other.save(place / "other.safetensors")
    with pytest.raises(InputError, match=r"basis\.file.*was fitted over the base ffffffffffffffff"):
        train(config_of(place, monkeypatch, "basis.file=other.safetensors"), place / "no")
    (place / "bad.safetensors").write_text("{}")
    with pytest.raises(InputError, match="no reward basis"):
        train(config_of(place, monkeypatch, "basis.file=bad.safetensors"), place / "no")
    for change in ("basis.file=missing.safetensors", "basis.prompts=missing.jsonl", "basis.pair=3", "basis.pairs=0"):
        with pytest.raises(InputError, match=change.partition("=")[0]):
            config_of(place, monkeypatch, change)
    assert not (place / "no").exists()
