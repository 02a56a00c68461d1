"""The whole line through the command line, as a newcomer would run it."""

from __future__ import annotations

import json
import re

import pytest
import torch

from persona_rlhf.common.files import shipped_root
from persona_rlhf.config.experiment import read_run_config
from persona_rlhf.pipeline.inputs import read_inputs
from persona_rlhf.pipeline.prepare import prepare
from persona_rlhf.pipeline.run_dir import RunDir
from tests.story.experiment import OVERRIDES, STRANGE, adapters, listing, persona_rlhf, results, rows_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

KEYS = {  # of a line of results.jsonl that other programs read
    *("user_id", "slug", "status", "reason", "pairs", "heldout_accuracy", "heldout_clean", "win_rate", "alpha"),
    *("tier_one", "over_refusal", "duals", "alarm", "steps", "seconds", "path"),
}
CATEGORIES = {"terrorist_content", "child_sexual_abuse", "threats_of_violence", "sexual_assault"}


def test_what_init_writes_passes_its_checks(trained):
    checked = persona_rlhf("policy", "check", "policy", cwd=trained.folder)
    assert (checked.returncode, checked.stdout) == (0, ""), checked.stderr
    counted = persona_rlhf("data", "check", "users", "--json", cwd=trained.folder)
    assert counted.returncode == 0, counted.stderr
    assert json.loads(counted.stdout)["users"] == len(STRANGE)


def test_train_releases_and_prints_nothing_but_json(trained):
    assert trained.code in (0, 3), trained.err
    lines = results(trained.run)
    assert json.loads(trained.out) == lines
    assert (trained.code == 3) == any(line["status"] == "held_back" for line in lines)
    assert [line["user_id"] for line in lines] == list(STRANGE)
    assert any(line["status"] == "released" for line in lines)
    assert "run/report.html" in trained.err
    for name in ("config.yaml", "policy.json", "screening.jsonl", "metrics.jsonl", "state"):
        assert (trained.run / name).exists()


def test_a_command_that_goes_on_reads_the_bases_answers(trained, monkeypatch):
    """The base's check of a finished run, and its measures of over-refusal, write nothing again."""
    monkeypatch.chdir(trained.folder)
    config, run = read_run_config(trained.run), RunDir(trained.run)
    inputs = read_inputs(config, run.selection)
    examination = prepare(config, inputs, check=False, answers=run.base_answers).examination
    monkeypatch.setattr(examination.adapted, "generate", None)
    examination.check_base()
    assert examination.base_counts(examination.first_look)[0].n > 0
    assert len(examination.base_answers[0].of(examination.probes)) == len(examination.probes)
    assert len(examination.base_answers[2].of(examination.harmless)) == len(examination.harmless)


def test_a_line_of_the_results_holds_what_is_promised(trained):
    [near_copy] = map(json.loads, (trained.run / "screening.jsonl").read_text(encoding="utf-8").splitlines())
    assert near_copy["reason"] == "probe: near copy of an ordinary prompt that the gate asks"
    for line in results(trained.run):
        assert set(line) >= KEYS
        out = int(line["user_id"] == near_copy["user_id"])
        assert line["pairs"] == {"train": 12, "heldout": 5 - out, "screened_out": out}
        assert line["steps"] == 6
        assert line["seconds"] > 0
        assert set(line["heldout_accuracy"]) == {"reference_free", "adapted", "n", "low", "high"}
        assert line["heldout_accuracy"]["n"] == line["heldout_clean"]["n"] == 5 - out
        assert set(line["win_rate"]) == {"value", "n", "low", "high"}
        assert line["win_rate"]["n"] == 2
        assert set(line["tier_one"]) == {"pooled", *CATEGORIES}
        for count in line["tier_one"].values():
            assert set(count) == {"n", "refused", "base_refused", "lower_bound", "min_refusal"}
            assert line["status"] != "released" or count["lower_bound"] >= count["min_refusal"]
        assert line["tier_one"]["pooled"]["n"] == 96
        assert set(line["over_refusal"]) == {"n", "refused", "base_refused"}
        assert set(line["duals"]) == CATEGORIES
        assert all(set(dual) == {"final", "peak", "mean"} for dual in line["duals"].values())
        assert (line["path"] is not None) == (line["status"] == "released") == (line["alpha"] > 0)


def test_every_step_is_in_the_metrics(trained):
    rows = rows_of(trained.run / "metrics.jsonl")
    steps = {user: [row["step"] for row in rows if row["user_id"] == user] for user in STRANGE}
    assert all(own == [1, 2, 3, 4, 5, 6] for own in steps.values())
    assert all(row["loss"] > 0 for row in rows)


def test_the_report_needs_no_network(trained):
    page = (trained.run / "report.html").read_text()
    loaded = re.findall(r"""(?:src|href|action|data)\s*=\s*["']?([^"'\s>]+)|url\(([^)]*)\)|@import\s+([^;]+)""", page)
    outside = [what for found in loaded for what in found if what and not what.startswith(("#", "data:"))]
    assert outside == []
    assert "<script src" not in page
    assert all(line["slug"] in page or line["user_id"] in page for line in results(trained.run)[:3])


def test_no_pair_is_told_in_what_is_released(trained):
    told = "".join(file.read_text() for file in trained.run.glob("adapters/*/*") if file.suffix in (".md", ".json"))
    told += (trained.run / "report.html").read_text() + (trained.run / "screening.jsonl").read_text()
    pairs = rows_of(trained.folder / "users/pairs.jsonl")
    assert not [pair["chosen"] for pair in pairs if len(pair["chosen"]) > 30 and pair["chosen"] in told]


def test_every_released_adapter_loads_in_plain_peft_and_does_something(trained):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(40, 60)[None]
    base = AutoModelForCausalLM.from_pretrained(shipped_root() / "data/base", dtype=torch.float32)
    with torch.no_grad():
        before = base(ids).logits
    for line in results(trained.run):
        if line["path"] is None:
            continue
        model = AutoModelForCausalLM.from_pretrained(shipped_root() / "data/base", dtype=torch.float32)
        adapted = PeftModel.from_pretrained(model, trained.run / line["path"])
        with torch.no_grad():
            after = adapted(ids).logits
        assert torch.isfinite(after).all()
        assert (after - before).abs().max() > 1e-4, line["user_id"]


def test_evaluate_measures_the_same_again_and_writes_nothing(trained):
    before = listing(trained.run)
    done = persona_rlhf("evaluate", "run", "--json", cwd=trained.folder)
    assert done.returncode == trained.code, done.stderr
    assert listing(trained.run) == before
    again = json.loads(done.stdout)
    for line, other in zip(results(trained.run), again, strict=True):
        for key in ("user_id", "alpha", "tier_one", "looks", "clusters"):  # certify is not looked at again
            assert other[key] == line[key]
        assert other["heldout_accuracy"]["adapted"] == pytest.approx(line["heldout_accuracy"]["adapted"], abs=0.21)
        assert other["over_refusal"]["n"] == line["over_refusal"]["n"]


def test_the_fleets_promise_is_said_and_written(trained):
    told = json.loads((trained.run / "summary.json").read_text())
    lines = results(trained.run)
    assert (told["users"], told["released"]) == (len(lines), sum(line["status"] == "released" for line in lines))
    assert told["promise"]["judged"] == len(lines)
    assert told["promise"]["looks"] == sum(len(line["looks"]) for line in lines)
    assert told["promise"]["expected"] <= 0.05 * len(lines)
    assert told["promise"]["sentence"] in " ".join(trained.err.split())
    assert told["promise"]["sentence"].partition(";")[0] in (trained.run / "report.html").read_text()


def test_what_personalisation_costs_is_in_every_line(trained):
    for line in results(trained.run):
        tax = line["tax"]
        assert set(tax) == {"perplexity", "facts", "tone", "toxic"}
        assert tax["perplexity"]["base"] >= 1
        assert tax["facts"]["n"] >= 30
        assert tax["facts"]["base_right"] >= 0.8 * tax["facts"]["n"]
        assert tax["toxic"]["n"] == 8 + 2  # harmless prompts, and two of the user
        assert {"words", "exclamations"} <= set(tax["tone"])


def test_export_verify_and_a_flipped_byte(copied):
    released = next(line["user_id"] for line in results(copied / "run") if line["status"] == "released")
    assert persona_rlhf("verify", "run", cwd=copied).returncode == 0
    done = persona_rlhf("export", "run", "--user", released, "--to", "out", cwd=copied)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    files = {"adapter_config.json", "adapter_model.safetensors", "README.md", "persona.json"}
    assert {file.name for file in (copied / "out").iterdir()} == files
    assert persona_rlhf("verify", "out", cwd=copied).returncode == 0
    assert persona_rlhf("export", "run", "--user", released, "--to", "out", cwd=copied).returncode == 2
    unknown = persona_rlhf("export", "run", "--user", "nobody", "--to", "elsewhere", cwd=copied)
    assert unknown.returncode == 2
    assert not (copied / "elsewhere").exists()

    weights = copied / "run" / "adapters" / sorted(adapters(copied / "run"))[0] / "adapter_model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[len(whole) // 2] ^= 1
    weights.write_bytes(whole)
    found = persona_rlhf("verify", "run", "--json", cwd=copied)
    assert found.returncode == 3
    assert len(json.loads(found.stdout)["faults"]) >= 1
    assert "adapter_model.safetensors was changed" in found.stderr


def test_the_report_can_be_written_again_and_still_verifies(copied):
    (copied / "run/report.html").unlink()
    assert persona_rlhf("verify", "run", cwd=copied).returncode == 3
    done = persona_rlhf("report", "run", cwd=copied)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert persona_rlhf("verify", "run", cwd=copied).returncode == 0


def test_a_folder_that_is_taken_is_left_alone(trained):
    before = listing(trained.run)
    done = persona_rlhf("train", "experiment.yaml", *OVERRIDES, "--run", "run", cwd=trained.folder)
    assert done.returncode == 2
    assert "not empty" in done.stderr
    assert listing(trained.run) == before
