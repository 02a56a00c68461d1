"""What was certified is what runs: the type of the gate in manifest and card, and a word where another one runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from persona_rlhf.cli.app import app
from persona_rlhf.config.experiment import read_config, scaffold
from persona_rlhf.pipeline.train import train
from persona_rlhf.release.results import read_results
from persona_rlhf.serving.local_engine import local_run
from tests.story.experiment import OVERRIDES, shrink

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run trained in float32 and certified in bfloat16."""
    folder = tmp_path_factory.mktemp("conditions") / "mine"
    scaffold(folder)
    shrink(folder, ("Ann",))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = read_config("experiment.yaml", [*OVERRIDES, "gate.dtype=bfloat16", "lora.products=base"])
        train(config, Path("run"))
        yield Path("run"), config


def test_manifest_and_card_name_the_computation_of_the_gate(run):
    folder, _ = run
    [result] = read_results(folder)
    assert result.path is not None, result.reason
    manifest = json.loads((folder / result.path / "persona.json").read_text())
    assert manifest["conditions"] == {
        "dtype": "bfloat16", "attention": "sdpa", "device": "cpu", "max_new_tokens": 96, "samples": 0,
        "products": "bfloat16",
    }  # fmt: skip
    card = (folder / result.path / "README.md").read_text()
    assert (
        "certified in bfloat16, adapters multiplied in bfloat16, with sdpa attention on cpu, "
        "by greedy answers of up to 96 tokens"
    ) in card
    assert "--dtype bfloat16" in card


def test_the_recipe_of_the_card_loads_the_certified_type(run):
    folder, _ = run
    [result] = read_results(folder)
    [recipe] = re.findall(r"```python\n(.*?)```", (folder / result.path / "README.md").read_text(), re.S)
    from persona_rlhf.common.files import find

    recipe = recipe.replace("THIS_FOLDER", str(folder / result.path)).replace('"data/base"', f'"{find("data/base")}"')
    names: dict[str, object] = {}
    exec(recipe, names)
    assert str(names["base"].dtype) == "torch.bfloat16"
    assert {str(p.dtype) for n, p in names["model"].named_parameters() if "lora_" in n} == {"torch.bfloat16"}  # type: ignore[attr-defined]
    assert isinstance(names["tokenizer"], type(AutoTokenizer.from_pretrained(find("data/base"))))


def test_an_engine_in_another_type_says_so_once(run):
    folder, config = run
    [result] = read_results(folder)
    for base, count in ((config.base, 1), (config.judged_base, 0)):
        log: list[str] = []
        with local_run(folder, base, config.lora, 1 << 20, log.append) as served:
            assert served.access.reasons(result.slug) == served.access.reasons(result.slug) == []
        assert len(log) == count
    with local_run(folder, config.base, config.lora, 1 << 20, log.append) as served:
        served.access.admit(result.slug)
    assert "certified in bfloat16, but this engine runs float32: the certificate does not cover its answers" in log[0]


def test_verify_says_what_was_certified_and_what_would_run_here(run):
    folder, _ = run
    done = CliRunner().invoke(app, ["verify", str(folder), "--json"])
    assert done.exit_code == 0, done.stderr
    notes = json.loads(done.stdout)["notes"]
    assert any(note.startswith("Certified in bfloat16") for note in notes)
    assert not any("engine runs" in note for note in notes)  # `serve` would take gate.dtype
    assert any(note.startswith("Here: certified without a system prompt") for note in notes)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("dtype: bfloat16", "dtype: float32"))
    notes = json.loads(CliRunner().invoke(app, ["verify", str(folder), "--json"]).stdout)["notes"]
    assert any("Here: certified in bfloat16, but this engine runs float32" in note for note in notes)
    (folder / "config.yaml").write_text(config)
