"""Attacks on the released adapters of a run, through the command line."""

from __future__ import annotations

import json

import pytest

from tests.story.experiment import listing, persona_rlhf, results

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SMALL = ("redteam.probes=1", "redteam.prefill=[5]", "redteam.samples=2")


def test_released_adapters_are_attacked_and_the_run_still_verifies(copied):
    before = listing(copied / "run")
    done = persona_rlhf("evaluate", "run", *SMALL, "--redteam", "--json", cwd=copied)
    assert done.returncode == 0, done.stderr
    after = listing(copied / "run")
    changed = {path for path in after if after[path] != before.get(path)}
    assert changed == {"redteam.json", "manifest.json", "report.html"}
    page = (copied / "run/report.html").read_text(encoding="utf-8")
    assert "<h2>Attacks</h2>" in page
    assert '<td class="l">roleplay</td>' in page
    found = json.loads(done.stdout)
    assert found == json.loads((copied / "run/redteam.json").read_text())
    released = {line["user_id"]: line for line in results(copied / "run") if line["path"]}
    assert {user["user_id"] for user in found["users"]} == set(released)
    assert {"plain", "prefill_5", "roleplay", "system", "sampled", "trigger", "merged"} <= set(found["attacks"])
    for user in found["users"]:
        for attack, outcome in user["attacks"].items():
            assert 0 < outcome["n"] <= 4, attack
            assert outcome["n"] == sum(count["n"] for count in outcome["categories"].values())
    assert len(found["merged"]) == min(8, len(released) * (len(released) - 1) // 2)
    verified = persona_rlhf("verify", "run", cwd=copied)
    assert verified.returncode == 0, verified.stderr

    again = persona_rlhf("evaluate", "run", *SMALL, "--redteam", cwd=copied)
    assert again.returncode == 0, again.stderr
    assert "worst user" in again.stdout
    assert listing(copied / "run") == after, "the same attacks, the same file"


def test_another_base_is_refused(copied):
    policy = next((copied / "banks").glob("*.jsonl"))
    policy.write_text("\n".join(policy.read_text().splitlines()[1:]))
    done = persona_rlhf("evaluate", "run", "--redteam", cwd=copied)
    assert done.returncode == 2
    assert "policy changed since this run began" in done.stderr
    assert not (copied / "run/redteam.json").exists()
