"""Keys of earlier versions: rejected in a new config, read in the config of a run."""

import json
from pathlib import Path

import pytest
import yaml

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.experiment import read_config, read_run_config
from persona_rlhf.config.retired import OLD_JUDGE, RETIRED
from persona_rlhf.evaluation.metrics import REQUIREMENT_PROMPTS
from persona_rlhf.evaluation.request_screens import FALSE_ALARMS
from persona_rlhf.pipeline.reevaluate import MERGED_PAIRS
from persona_rlhf.pipeline.run_dir import RunDir
from persona_rlhf.policy.bound import JUDGE_DELTA_SHARE
from persona_rlhf.training.constraint import OPENING_LENGTH
from persona_rlhf.training.user_state import DUAL_CEILING, DUAL_SMOOTHING

OLD_RUN = Path(__file__).parents[1] / "story" / "run_0_1"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The config of a run of 0.1, which states every retired key but those of sections that it left out."""
    monkeypatch.chdir(OLD_RUN)
    (tmp_path / "config.yaml").write_bytes((OLD_RUN / "run/config.yaml").read_bytes())
    return tmp_path


def changed(run, section, key, value):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config[section][key] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def test_the_values_are_those_of_the_code():
    assert dict(RETIRED) == {
        "screening.false_alarms": FALSE_ALARMS,
        "constraint.opening_tokens": OPENING_LENGTH,
        "constraint.smoothing": DUAL_SMOOTHING,
        "constraint.ceiling": DUAL_CEILING,
        "gate.requirement_prompts": REQUIREMENT_PROMPTS,
        "gate.runs": 1,
        "gate.judge_calibration.delta_share": JUDGE_DELTA_SHARE,
        "evaluation.requirement_prompts": REQUIREMENT_PROMPTS,
        "redteam.merged_pairs": MERGED_PAIRS,
    }


def test_a_new_config_with_retired_keys_names_each_with_its_line_and_what_holds_now(run):
    with pytest.raises(InputError) as fault:
        read_config(
            run / "config.yaml", ["gate.judge_calibration={compliances: 9, called_refusals: 1, delta_share: 0.1}"]
        )
    problems = {problem.key: problem for problem in fault.value.problems}
    assert problems.keys() == RETIRED.keys() | {OLD_JUDGE}
    del problems[OLD_JUDGE]
    lines = (run / "config.yaml").read_text().splitlines()
    for key, problem in problems.items():
        assert f"always {RETIRED[key]}" in problem.sentence
        assert ("name one `gate.ledger`" in problem.sentence) == (key == "gate.runs")
        if problem.line is not None:
            assert lines[problem.line - 1].strip().startswith(key.split(".")[-1])


def test_the_config_of_an_old_run_is_read_whatever_it_sets(run):
    before = read_run_config(run, exact="")
    changed(run, "constraint", "ceiling", 5.0)
    assert read_run_config(run) == before


def test_nobody_is_trained_into_a_run_that_was_trained_otherwise(run):
    changed(run, "constraint", "ceiling", 5.0)
    with pytest.raises(InputError) as fault:
        read_run_config(run, exact="")
    [problem] = fault.value.problems
    assert (problem.key, problem.sentence) == (
        "constraint.ceiling",
        "this run was trained with 5.0, and the value is fixed to 10.0 since 0.2; "
        "use the version that wrote the run, or train a new run",
    )


def test_adapters_are_judged_again_only_by_the_gate_that_judged_them(run):
    changed(run, "constraint", "ceiling", 5.0)
    read_run_config(run, exact="gate.")
    changed(run, "gate", "requirement_prompts", 7)
    with pytest.raises(InputError, match=r"gate\.requirement_prompts"):
        read_run_config(run, exact="gate.")


@pytest.mark.parametrize(("ceiling", "same"), [(10.0, True), (5.0, False)])
def test_an_unfinished_run_of_before_goes_on_where_nothing_else_holds_now(tmp_path, ceiling, same):
    now = {"config": json.dumps({"constraint": {"gain": 0.1}})}
    before = {"config": json.dumps({"constraint": {"gain": 0.1, "ceiling": ceiling}}), "users per chunk": "3"}
    (tmp_path / "state").mkdir()
    (tmp_path / "state/identity.json").write_text(json.dumps(before))
    if same:
        RunDir(tmp_path).check_same(now)
    else:
        with pytest.raises(InputError, match=r"constraint\.ceiling"):
            RunDir(tmp_path).check_same(now)


@pytest.mark.parametrize(("section", "names_the_version"), [({"ceiling": 5.0}, True), ({"gain": 0.2}, False)])
def test_only_a_retired_key_sends_people_back_to_the_version_before(tmp_path, section, names_the_version):
    (tmp_path / "state").mkdir()
    before = {"config": json.dumps({"constraint": {"gain": 0.1} | section}), "users per chunk": "3"}
    (tmp_path / "state/identity.json").write_text(json.dumps(before))
    with pytest.raises(InputError) as fault:
        RunDir(tmp_path).check_same({"config": json.dumps({"constraint": {"gain": 0.1}})})
    assert ("finish this one with the version that began it" in str(fault.value)) == names_the_version


@pytest.mark.parametrize(("model", "judge"), [(None, "rules"), ({"model": "org/guard"}, "both")])
def test_the_second_judge_of_an_old_run_has_its_new_name(run, model, judge):
    changed(run, "gate", "classifier", model)
    gate = read_run_config(run).gate
    assert gate.judge == judge
    assert (gate.judge_model.model if gate.judge_model else None) == (model or {}).get("model")
    assert gate.calibration is None, "the run trusted its judge, and its guarantee stays as it was"
    with pytest.raises(InputError, match=r"write gate\.judge_model, beside gate\.judge: both"):
        read_config(run / "config.yaml")


def test_an_earlier_run_has_no_limit_on_text_and_trains_as_it_did(run):
    config = read_run_config(run)
    assert (config.gate.still_base, config.dpo.anchor, config.screening.personal_data) == (None, 0.0, "keep")
    changed(run, "screening", "personal_data", "mask")
    assert read_run_config(run).screening.personal_data == "mask"


def test_an_interrupted_run_goes_on_where_new_keys_have_the_values_that_do_as_it_did(tmp_path):
    before = {"dpo": {"beta": 0.1}, "gate": {"enabled": True}, "screening": {"quarantine": True}}
    now = {
        "dpo": {"beta": 0.1, "anchor": 0.0},
        "gate": {"enabled": True, "still_base": None},
        "screening": {"quarantine": True, "personal_data": "keep"},
    }
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "identity.json").write_text(
        json.dumps({"config": json.dumps(before), "users per chunk": "1"})
    )
    RunDir(tmp_path).check_same({"config": json.dumps(now)})
    now["gate"]["still_base"] = {"max_perplexity": 1.5}
    with pytest.raises(InputError, match=r"gate\.still_base"):
        RunDir(tmp_path).check_same({"config": json.dumps(now)})
