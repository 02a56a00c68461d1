"""The line on a base that is stored in four bits."""

import json

import pytest

from tests.story.experiment import persona_rlhf, results, shrink

pytest.importorskip("bitsandbytes")
SMALL = (
    "base.quantization=nf4", "dpo.epochs=1", "gate.alphas=[1.0]", "constraint.rows_per_step=2", "screening.base=off",
    "evaluation.utilities=null", "evaluation.facts=null", "evaluation.win_rate_prompts=0", "evaluation.test_probes=0",
    "evaluation.harmless_prompts=0",
)  # fmt: skip


@pytest.mark.slow
def test_adapters_are_trained_judged_and_named_for_that_base_alone(tmp_path):
    assert persona_rlhf("init", "mine", cwd=tmp_path).returncode == 0
    folder = tmp_path / "mine"
    shrink(folder, ["Ann"])
    done = persona_rlhf("train", "experiment.yaml", *SMALL, "--run", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    [result] = results(folder / "run")
    assert result["status"] == "released"
    papers = json.loads((folder / "run" / result["path"] / "persona.json").read_bytes())
    assert papers["base"]["quantization"] == "nf4"
    card = (folder / "run" / result["path"] / "README.md").read_text(encoding="utf-8")
    assert 'bnb_4bit_quant_type="nf4"' in card
    assert persona_rlhf("verify", "run", cwd=folder).returncode == 0
    merged = persona_rlhf("export", "run", "--user", "Ann", "--to", "model", "--merge", cwd=folder)
    assert merged.returncode == 2
    assert "a merged model is another model" in merged.stderr
    assert not (folder / "model").exists()
