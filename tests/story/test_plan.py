"""What `plan` says beforehand is what `train` then does."""

from __future__ import annotations

import json

import pytest

from tests.story.experiment import OVERRIDES, UNMEASURED, listing, persona_rlhf, results, shrink

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_a_plan_counts_what_is_trained_and_writes_nothing(trained):
    before = listing(trained.folder)
    done = persona_rlhf("plan", "experiment.yaml", *OVERRIDES, "--json", cwd=trained.folder)
    assert done.returncode == 0, done.stderr
    assert listing(trained.folder) == before
    plan, lines = json.loads(done.stdout), results(trained.run)
    assert (plan["users"], plan["skipped"], plan["slots"]) == (len(lines), 0, 3)
    assert plan["pairs"] == sum(line["pairs"]["train"] for line in lines)
    assert plan["steps"] == sum(line["steps"] for line in lines)
    took = sum(line["seconds"] for line in lines)
    print(f"training: planned {plan['seconds']['training']} s, took {took:.1f} s")
    assert took / 4 < plan["seconds"]["training"] < took * 4  # other tests run beside it
    memory = plan["memory_mib"]
    assert memory["moments"] == pytest.approx(2 * memory["adapters"], abs=0.1)
    assert memory["peak"] > sum(memory[part] for part in ("base", "adapters", "moments", "activations"))
    assert plan["seconds"]["total"] == pytest.approx(sum(plan["seconds"].values()) / 2, abs=0.5)


def test_users_stop_early_on_one_half_of_their_heldout_pairs_and_are_measured_on_the_other(tmp_path):
    assert persona_rlhf("init", "mine", cwd=tmp_path).returncode == 0
    folder = tmp_path / "mine"
    shrink(folder, ["ann", "bob"])
    early = ("dpo.epochs=6", "dpo.early_stop={patience: 1, every: 2}")
    words = [*OVERRIDES, *UNMEASURED, *early, "--run", "run", "--json"]
    done = persona_rlhf("train", "experiment.yaml", *words, cwd=folder)
    assert done.returncode in (0, 3), done.stderr
    for line in results(folder / "run"):
        assert line["pairs"]["heldout"] == 5
        assert line["heldout_accuracy"]["n"] == 3
        assert 4 <= line["steps"] <= 18
    assert persona_rlhf("verify", "run", cwd=folder).returncode == 0
