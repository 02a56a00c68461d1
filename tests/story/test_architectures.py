"""The whole line on local folders of other families, each with its own chat template."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from persona_rlhf.cli import app
from tests.data.families import tokenizer_for
from tests.models.architectures import base_of
from tests.story.experiment import OVERRIDES, results, shrink, write_yaml


@pytest.mark.slow
@pytest.mark.parametrize(("name", "template"), [("gpt2", "granite"), ("gemma3", "gemma3"), ("qwen3-moe", "qwen3")])
def test_a_local_folder_of_any_family_is_asked_trains_releases_sweeps_and_loads_in_peft(
    name, template, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    assert runner.invoke(app.app, ["init", "mine"]).exit_code == 0
    monkeypatch.chdir(tmp_path / "mine")
    shrink(tmp_path / "mine", ["ann", "bob"])
    base = base_of(name, tokenizer_for(template))
    base.model.save_pretrained("model")
    base.tokenizer.save_pretrained("model")
    asked = runner.invoke(
        app.app,
        ["evaluate", "--base", "./model", "policy.documents=[policy/tier_one.yaml]", "gate.max_new_tokens=8", "--json"],
    )
    assert asked.exit_code == 0, asked.output
    assert "the base itself refused 0 of 24" in asked.stdout
    # A base of random weights refuses nothing, so that there is nothing to keep or to promise.
    off = ["constraint.enabled=false", "gate.enabled=false", "gate.max_new_tokens=8", "lora.layers={top: 0.6}"]
    words = [*OVERRIDES, *off, "base.model=./model", "evaluation.facts=null", "evaluation.ordinary=null"]
    done = runner.invoke(app.app, ["train", "experiment.yaml", *words, "--run", "run", "--json"])
    assert done.exit_code == 0, done.stderr
    assert ("Qwen3MoeExperts is no plain linear layer" in " ".join(done.stderr.split())) == (name == "qwen3-moe")
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        plain = base.model(input_ids=ids).logits
        for line in results(tmp_path / "mine/run"):
            assert line["status"] == "released"
            folder = tmp_path / "mine/run" / line["path"]
            assert json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"] == (name == "gpt2")
            loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), folder).eval()
            assert (loaded(input_ids=ids).logits - plain).abs().max() > 1e-3
    write_yaml(tmp_path / "mine/sweep.yaml", {"name": "s", "config": "experiment.yaml", "grid": {"lora.rank": [2, 4]}})
    swept = runner.invoke(app.app, ["sweep", "sweep.yaml", *words, "--run", "swept"])
    assert swept.exit_code == 0, swept.output
    assert len(list((tmp_path / "mine/swept/runs").iterdir())) == 2
    checked = runner.invoke(app.app, ["verify", "run"])
    assert checked.exit_code == 0, checked.stderr
