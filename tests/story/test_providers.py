"""Two application providers over one tier one, with the same users: what differs is theirs, and what may not is not."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from persona_rlhf.cli.app import app
from persona_rlhf.common.files import shipped_root
from tests.story.experiment import adapters, persona_rlhf, results, rows_of, shrink, write_yaml

OVERRIDES = ("dpo.epochs=1", "gate.alphas=[1.0]", "constraint.rows_per_step=2", "constraint.refusals_per_probe=1")
SILENT = (
    "evaluation.utilities=null",
    "evaluation.facts=null",
    "evaluation.win_rate_prompts=0",
    "evaluation.test_probes=4",
)
_PROMPTS = 40


@pytest.fixture(scope="module")
def providers(tmp_path_factory):
    """A folder with two experiments, `first.yaml` and `second.yaml`, and a run of each."""
    place = tmp_path_factory.mktemp("providers")
    assert persona_rlhf("init", "mine", cwd=place).returncode == 0
    folder = place / "mine"
    shrink(folder, ["Ann", "Bob"])
    shipped = shipped_root() / "data/policy/requirements/everyday.jsonl"
    prompts = shipped.read_text(encoding="utf-8").splitlines(keepends=True)[:_PROMPTS]
    (folder / "banks" / "everyday.jsonl").write_text("".join(prompts), encoding="utf-8")
    config = yaml.safe_load((folder / "experiment.yaml").read_text(encoding="utf-8"))
    for name, rule in (("first", {"max_words": 60}), ("second", {"must_not_include": "!"})):
        document = {
            "tier": "two",
            "issuer": {"role": "application_provider", "name": f"The {name}"},
            "version": "1",
            "rules": [{"id": f"t2.{name}", "kind": "requirement", "probes": "banks/everyday.jsonl", **rule}],
        }
        write_yaml(folder / "policy" / f"{name}.yaml", document)
        own = {"name": name, "policy": {"documents": ["policy/tier_one.yaml", f"policy/{name}.yaml"]}}
        write_yaml(folder / f"{name}.yaml", config | own)
        done = persona_rlhf("train", f"{name}.yaml", *OVERRIDES, *SILENT, "--run", name, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_each_gets_adapters_of_his_own_over_the_same_tier_one(providers, monkeypatch):
    monkeypatch.chdir(providers)
    first, second = (adapters(providers / name) for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert len(first) == 2
    assert not set(first.values()) & set(second.values())
    for name in ("first", "second"):
        done = CliRunner().invoke(app, ["verify", name])
        assert done.exit_code == 0, done.stderr
    manifests = [
        json.loads((providers / name / result["path"] / "persona.json").read_bytes())
        for name in ("first", "second")
        for result in results(providers / name)
    ]
    assert len({manifest["policy"]["tier_one_hash"] for manifest in manifests}) == 1
    assert len({manifest["policy"]["hash"] for manifest in manifests}) == 2
    for name in ("first", "second"):  # whoever falls short of what is required goes back, and the line says how far
        assert all(0 <= result["retreat"] <= 1 for result in results(providers / name))
        assert all(set(result["requirements"]) == {f"t2.{name}"} for result in results(providers / name))
    screened = [rows_of(providers / name / "screening.jsonl") for name in ("first", "second")]
    assert screened[0] != screened[1]  # the second provider's rule takes other pairs out


@pytest.mark.slow
def test_the_difference_is_told_and_tier_one_is_none_of_it(providers, monkeypatch):
    monkeypatch.chdir(providers)
    done = CliRunner().invoke(app, ["policy", "diff", "first.yaml", "second.yaml", "--json"])
    assert done.exit_code == 0, done.stderr
    changes = json.loads(done.stdout)
    assert {change["about"] for change in changes} >= {"t2.first", "t2.second"}
    assert all(change["tier"] == 2 for change in changes)
    assert not any(change["refused"] for change in changes)
