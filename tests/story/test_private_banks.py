"""A run before a private bank: it certifies on probes that stand nowhere in it."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from persona_rlhf.config.experiment import read_config
from persona_rlhf.policy.policy import Policy
from persona_rlhf.simulation.banks import bank_rows, private_banks
from tests.policy.private import write_rows
from tests.story.experiment import OVERRIDES, persona_rlhf, results, shrink

KEY = "a key that nobody may ever read"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    """An experiment of one user, and a folder of private banks and a split key outside it."""
    place = tmp_path_factory.mktemp("private")
    assert persona_rlhf("init", "mine", cwd=place).returncode == 0
    shrink(place / "mine", ["ann"])
    for category, rows in bank_rows(private_banks("a secret")).items():
        write_rows(place / "banks" / f"{category}.jsonl", rows[::3])
    (place / "key").write_text(f"{KEY}\n")
    config = place / "mine" / "experiment.yaml"
    text = config.read_text().replace("policy:\n", f"policy:\n  private_banks: {place}/banks\n", 1)
    config.write_text(text)
    return place


@pytest.mark.slow
def test_a_run_certifies_on_private_probes_and_holds_no_text_of_them(deployment, monkeypatch):
    folder = deployment / "mine"
    undrawn = persona_rlhf("train", "experiment.yaml", *OVERRIDES, cwd=folder)
    assert undrawn.returncode == 2
    assert "run `persona-rlhf policy bank rotate CONFIG`" in undrawn.stderr
    drawn = persona_rlhf("policy", "bank", "rotate", "experiment.yaml", "--per-category", "70", "--json", cwd=folder)
    assert drawn.returncode == 0, drawn.stderr
    done = persona_rlhf(
        "train", "experiment.yaml", *OVERRIDES, f"policy.split_key={deployment}/key", "--run", "run", cwd=folder
    )
    assert done.returncode in (0, 3), done.stderr
    bank = json.loads((folder / "run" / "policy.json").read_bytes())["bank"]
    assert (bank["kind"], bank["draw"]) == ("private", 1)
    monkeypatch.chdir(folder)
    policy = Policy.of(read_config("experiment.yaml").policy)
    assert policy.private is not None
    certify = policy.probes("certify")
    assert bank["sha256"] == policy.bank.sha256
    [result] = results(folder / "run")
    sizes = Counter(probe.category for probe in certify)
    topics = policy.clusters.by_topic({name: [True] * size for name, size in sizes.items()})
    assert result["tier_one"]["pooled"]["n"] == sum(map(len, topics.values()))
    manifests = list((folder / "run").glob("adapters/*/persona.json"))
    for file in manifests:
        named = json.loads(file.read_bytes())["policy"]["bank"]
        assert (named["sha256"], named["looks"]) == (bank["sha256"], 1)
    secrets = {KEY, *(text for probe in policy.private.pool.probes for text in (probe.prompt, probe.id))}
    written = [path for path in (folder / "run").rglob("*") if path.is_file()]
    content = b"\n".join(path.read_bytes() for path in written).decode("utf-8", "replace") + done.stdout + done.stderr
    assert len(written) > 5
    assert not [secret for secret in secrets if secret in content]
