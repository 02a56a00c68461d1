"""The script that compares constraints: every contender trains and is measured, and nothing is done twice."""

import json

import pytest

from tests.scripts.loading import SCRIPTS, load_script
from tests.story.experiment import environment
from tests.story.forked import run_forked

SMALL = (
    "dpo.epochs=1",
    "constraint.rows_per_step=2",
    "constraint.refusals_per_probe=4",
    "evaluation.win_rate_prompts=0",
    "evaluation.harmless_prompts=0",
)


def compare(folder, *words):
    return run_forked([str(SCRIPTS / "compare_constraints.py"), *words], folder, environment(), timeout=200)


@pytest.mark.slow
def test_every_contender_once(copied, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    names = set(load_script("contenders").CONTENDERS)
    pairs = (copied / "users/pairs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (copied / "users/pairs.jsonl").write_text("".join(line for line in pairs if '"Ann"' in line), encoding="utf-8")
    asked = ("experiment.yaml", *SMALL, "evaluation.utilities=utilities.yaml", "evaluation.test_probes=4", "--gate")
    alone = compare(copied, *asked, "constraint.refusals_per_probe=1", "--records", "records.jsonl")
    assert alone.returncode == 2
    assert "constraint.refusals_per_probe=4" in alone.stderr
    assert not (copied / "records.jsonl").exists()
    first = compare(copied, *asked, "--records", "records.jsonl")
    assert first.returncode == 0, first.stderr
    kept = (copied / "records.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in kept.splitlines()]
    assert sorted(record["contender"] for record in records) == sorted(names | {"gate alone", "ours + gate"})
    assert {record["user_id"] for record in records} == {"Ann"}
    again = compare(copied, *asked, "--records", "records.jsonl")
    assert again.returncode == 0, again.stderr
    assert (copied / "records.jsonl").read_text(encoding="utf-8") == kept
    assert again.stdout == first.stdout
    pooled = compare(copied, "--pool", "records.jsonl")
    assert pooled.stdout == first.stdout
