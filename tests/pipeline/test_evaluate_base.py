"""`evaluate --base`: a base alone, asked what a run would ask of it."""

import json

import pytest
from typer.testing import CliRunner

from persona_rlhf.cli import app
from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import shipped_root
from persona_rlhf.evaluation.gate import POOLED
from persona_rlhf.models.base import load_base
from persona_rlhf.pipeline import evaluate_base
from persona_rlhf.policy.hazards import CATEGORIES
from persona_rlhf.policy.policy import Policy
from tests.story.experiment import tier_one, write_yaml

BUNDLED = str(shipped_root() / "data/base")


@pytest.fixture
def document(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_yaml(tmp_path / "tier_one.yaml", tier_one(tmp_path / "banks"))


@pytest.fixture(scope="module")
def mute(tmp_path_factory):
    """The bundled base with its end token made likely everywhere: it says nothing, and so refuses nothing."""
    folder = tmp_path_factory.mktemp("mute")
    base = load_base(evaluate_base.BaseSettings(model=BUNDLED))
    base.model.model.norm.weight.data.zero_()
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return str(folder)


def asked(model, document, *more):
    return evaluate_base.base_card(model, [f"policy.documents=[{document}]", "evaluation.harmless_prompts=6", *more])


def test_an_aligned_base_is_certifiable(document):
    card = asked(BUNDLED, document, "base.aligned_by=nobody's")
    assert card.shortfalls == []
    assert card.certify[POOLED].n == 4 * 24
    assert card.certify[POOLED].refused >= 95
    assert card.chance > 0.9
    assert {name: share.n for name, share in card.sampled.items()} == dict.fromkeys(card.sampled, 2)
    assert card.twins.n == 6
    assert card.ordinary.n == 0  # no file was named
    assert card.to_json()["base"]["aligned_by"] == "nobody's"


def test_a_base_that_refuses_nothing_is_told_of_every_demand(document, mute):
    card = asked(mute, document)
    assert card.certify[POOLED].refused == 0
    assert len(card.shortfalls) == 6  # the pool, four categories and new phrasings
    assert all("not certifiable" in sentence for sentence in card.shortfalls)
    assert card.chance == 0
    assert card.to_json()["certifiable"] is False


def test_the_page_and_its_json(document, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    words = ["evaluate", "--base", BUNDLED, f"policy.documents=[{document}]", "evaluation.harmless_prompts=2"]
    page = CliRunner().invoke(app.app, words)
    assert page.exit_code == 0
    assert "all of tier one" in page.stdout
    assert "Whose preferences aligned it: unknown" in page.stdout
    found = json.loads(CliRunner().invoke(app.app, [*words, "--json"]).stdout)
    assert set(found["certify"]) == {"pooled", *found["sampled"]}
    assert found["certify"]["pooled"]["passes"] is True


def test_every_mistake_is_said_at_once():
    with pytest.raises(InputError) as caught:
        evaluate_base.base_card(BUNDLED, ["gate.alphaz=[1]", "dpo.beta=1"])
    said = [str(problem) for problem in caught.value.problems]
    assert len(said) == 2


def test_without_a_policy_the_bank_for_real_models_is_asked():
    asked = evaluate_base.CardSettings(base=evaluate_base.BaseSettings(model=BUNDLED))
    rules = Policy.read(asked.policy.documents).restrictions
    assert {rule.category for rule in rules} == set(CATEGORIES)
    assert any("fr" in probe.id or "é" in probe.prompt for rule in rules for probe in rule.probes)


@pytest.mark.parametrize("words", [[], ["--base", BUNDLED, "--redteam"], ["run", "redteam.probes=2"]])
def test_what_does_not_go_together_is_a_usage_error(words):
    assert CliRunner().invoke(app.app, ["evaluate", *words]).exit_code == 2
