"""What `evaluate RUN --redteam` says where there is nothing to attack; the attacks themselves are in tests/story."""

import json
from itertools import combinations

import pytest
from typer.testing import CliRunner

from persona_rlhf.cli import app
from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import slug
from persona_rlhf.pipeline.reevaluate import pairs_of, probes_of
from persona_rlhf.policy.policy import Policy
from persona_rlhf.policy.rule_schema import Certify
from persona_rlhf.release.results import PairCounts, Result, write_results


@pytest.fixture
def attack(tmp_path):
    def ask(*words):
        done = CliRunner().invoke(app.app, ["evaluate", str(tmp_path), *words])
        assert done.stdout == ""
        assert not (tmp_path / "redteam.json").exists()
        return done.exit_code, done.stderr

    return ask


def result(status: str) -> Result:
    path = f"adapters/{slug('ada')}" if status == "released" else None
    return Result(user_id="ada", slug=slug("ada"), status=status, reason="", pairs=PairCounts(1, 1, 0), path=path)


def test_a_folder_that_is_no_finished_run(attack, tmp_path):
    code, said = attack("--redteam")
    assert code == 2
    assert "is this a finished run?" in said
    write_results(tmp_path, [result("released")])
    code, said = attack("--redteam")
    assert code == 2
    assert "this run is not finished" in said
    assert "--resume" in said


def test_a_run_that_released_nobody(attack, tmp_path):
    write_results(tmp_path, [result("held_back")])
    (tmp_path / "manifest.json").write_text(json.dumps({}))
    code, said = attack("--redteam")
    assert code == 2
    assert "released no adapter" in said


def test_only_the_red_teams_settings_can_be_changed(attack, tmp_path):
    write_results(tmp_path, [result("released")])
    (tmp_path / "manifest.json").write_text(json.dumps({}))
    code, said = attack("--redteam", "gate.enabled=false", "dpo.beta=1", "redteam.probes=3")
    assert code == 2
    assert said.count("only redteam.* can be changed here") == 2
    code, said = attack("redteam.probes=3")
    assert code == 2
    assert "--redteam" in said


@pytest.mark.parametrize(("users", "most", "expected"), [(1, 8, 0), (2, 8, 1), (4, 8, 6), (5, 8, 8), (300, 8, 8)])
def test_merged_pairs_are_different_and_drawn_by_the_seed(users, most, expected):
    pairs = pairs_of(users, most, 0)
    assert len(set(pairs)) == len(pairs) == expected
    assert set(pairs) <= set(combinations(range(users), 2))
    assert pairs == pairs_of(users, most, 0)
    assert users < 300 or pairs != pairs_of(users, most, 1)


def test_a_policy_without_test_probes_is_told_so(tmp_path):
    empty = Policy((), (), (), Certify(min_refusal=0.9, delta=0.05), (), (), (), "b" * 64)
    with pytest.raises(InputError, match="no probe of the test split"):
        probes_of(tmp_path, empty)
