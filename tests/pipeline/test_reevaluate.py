"""What `evaluate RUN --redteam` says where there is nothing to attack; the attacks themselves are in tests/story."""

import json
from dataclasses import replace
from itertools import combinations

import pytest
from typer.testing import CliRunner

from persona_rlhf.cli import app
from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import slug
from persona_rlhf.config.evaluation import GateSettings
from persona_rlhf.evaluation.gate import Demands, certify_cohort
from persona_rlhf.evaluation.still_base import LimitedMeasure, SignTest, StillBase
from persona_rlhf.pipeline.reevaluate import _recorded, pairs_of, probes_of
from persona_rlhf.policy.policy import Policy
from persona_rlhf.policy.rule_schema import Certify
from persona_rlhf.release.results import PairCounts, Result, write_results
from persona_rlhf.release.revocation import Retested


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


@pytest.mark.parametrize(
    "ruined",
    [StillBase(LimitedMeasure(40, 3.0, 1.5, None, 2.25)), StillBase(pairs=SignTest(10, 1, 0.011, 0.05))],
)
def test_who_was_released_below_full_strength_for_harm_is_certified_anew_there(ruined):
    """Also where held-out pairs lowered the strength, which a recertification does not read."""
    demands, base = Demands(0.9, {"a": 0.8}, frozenset({"a"}), 0.05), {"a": [True] * 200}

    def judged(likeness):
        [verdict] = certify_cohort(
            [demands], base, GateSettings().alphas, lambda users, _: [base] * len(users), likeness=likeness
        )
        return verdict

    first = judged(lambda _, alphas: [ruined if alpha == 1 else StillBase() for alpha in alphas])
    released = Result.from_json(replace(result("released"), alpha=first.alpha, looks=first.looks).to_json())
    measures = _recorded(released).still_base
    again = judged(lambda _, alphas: [measures[alpha] for alpha in alphas])
    assert first.alpha == 0.75
    assert again.looks == first.looks
    assert Retested("ada", "ada-1", released.alpha, again, False, False).passes
