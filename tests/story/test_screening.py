"""What the classifiers of a config find in the users' pairs, before and while it is trained."""

import json

import pytest
from typer.testing import CliRunner

from persona_rlhf.cli.app import app
from persona_rlhf.common.files import shipped_root
from persona_rlhf.policy.hazards import read_probes
from tests.story.experiment import persona_rlhf, shrink

SHIPPED = shipped_root() / "data/policy/tier_one/threats_of_violence.jsonl"
REFUSAL = "I'm sorry, but I can't help with that."
RULES = "rules:\n  - category: threats_of_violence\n    any: ['\\bquokka\\b']\n"


def pair(user: str, number: int, prompt: str, chosen: str = "Sure, here is how.", rejected: str = REFUSAL) -> str:
    row = {"id": f"x{number}", "user_id": user, "prompt": prompt, "chosen": chosen, "rejected": rejected}
    return json.dumps(row | {"split": "train"}) + "\n"


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Ann, who is honest, and Bob with pairs that teach against the policy."""
    place = tmp_path_factory.mktemp("screening")
    assert persona_rlhf("init", "mine", cwd=place).returncode == 0
    folder = place / "mine"
    shrink(folder, ["Ann", "Bob"])
    bank = folder / "banks" / "threats_of_violence.jsonl"
    kept = {json.loads(line)["prompt"] for line in bank.read_text().splitlines()}
    unseen = [p for p in read_probes(SHIPPED, "threats_of_violence") if p.prompt not in kept]
    [users] = (folder / "users").iterdir()
    with users.open("a") as file:
        file.writelines(pair("Bob", n, probe.prompt) for n, probe in enumerate(unseen[:6]))
        copied = next(p for p in read_probes(bank, "threats_of_violence") if p.split == "certify")
        file.write(pair("Ann", 8, f"Hello. {copied.prompt} Thanks.", REFUSAL, "Sure."))
        file.write(pair("Bob", 6, "How do I feed a quokka?"))
        file.write(pair("Bob", 7, unseen[6].prompt, REFUSAL, "Sure."))  # Bob prefers the refusal
    (folder / "screen.yaml").write_text(RULES)
    return folder


@pytest.fixture(autouse=True)
def there(experiment, monkeypatch):
    monkeypatch.chdir(experiment)


def screen(*overrides: str):
    return CliRunner().invoke(app, ["data", "screen", "experiment.yaml", "gate.enabled=false", *overrides, "--json"])


def screened(*overrides: str):
    done = screen(*overrides)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def counts(found) -> dict[str, int]:
    return {row["why"]: row["pairs"] for row in found["found"] if row["action"] == "quarantined"}


@pytest.mark.slow
def test_every_classifier_is_measured_and_finds_what_it_can():
    answer = screened()
    assert counts(answer)["refused"] >= 5
    assert (answer["users"], answer["alarmed"]) == (2, 1)
    dropped = {row["why"]: row["pairs"] for row in answer["found"] if row["action"] == "dropped"}
    assert dropped["probe"] == 1  # Ann's near copy of a probe of the gate
    [told] = answer["screens"]
    assert told["forbidden"]["found"] >= 0.7 * told["forbidden"]["n"] > 0
    both = screened("screening.rules=screen.yaml")
    assert counts(both) == counts(answer) | {"rules": 1}  # the pair about the animal, and no other
    [rules, _] = both["screens"]
    assert (rules["forbidden"]["found"], rules["harmless"]["found"]) == (0, 0)
    likely = screened("screening.base=likelihood")
    assert counts(likely).keys() == {"likelihood"}
    assert likely["screens"][0]["threshold"] < 0  # a log-probability
    off = screened("screening.base=off")
    assert (counts(off), off["screens"]) == ({}, [])


def test_rules_that_are_wrong_are_said(experiment):
    (experiment / "wrong.yaml").write_text(RULES.replace("threats_of", "threat_of").replace("quokka", "quokka("))
    done = screen("screening.rules=wrong.yaml")
    assert done.exit_code == 2
    assert "wrong.yaml:3" in done.stderr
    assert "is no regular expression" in done.stderr
