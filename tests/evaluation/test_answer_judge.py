"""The shipped judge of answers, and the judges that a gate's settings name."""

import json
from zlib import crc32

import numpy as np
import pytest
import torch

from persona_rlhf.common.files import find
from persona_rlhf.config.evaluation import SHIPPED_CALIBRATIONS, GateSettings, JudgeCalibration
from persona_rlhf.evaluation.answer_judge import BUCKETS, AnswerJudge, features, judges_of, sentences, shipped_judge
from persona_rlhf.evaluation.gate import Demands
from persona_rlhf.evaluation.refusals import AnsweredPrompt
from persona_rlhf.policy.judges import is_refusal
from tests.scripts.loading import load_script

CPU = torch.device("cpu")


def judge_of(**grams: tuple[float, float]) -> AnswerJudge:
    """A judge with these scores of declining and helping by word."""
    scores = np.zeros((BUCKETS, 2), np.float32)
    for gram, pair in grams.items():
        scores[crc32(gram.encode()) % BUCKETS] = pair
    return AnswerJudge(scores, 0.0)


def test_the_most_declining_sentence_is_set_against_the_most_helpful_one():
    judge = judge_of(no=(90.0, 0.0), take=(0.0, 120.0), talk=(0.0, 30.0))

    def score(sentence: str, weight: float, place: int) -> float:
        return weight / np.sqrt(len(features(sentence, place)))

    assert judge.gap("No. Talk.") == pytest.approx(score("no.", 90, 0) - score("talk.", 30, 1), rel=1e-5)
    assert judge("No. Talk.")
    assert not judge("No. Talk. Take it.")
    assert not judge("Take it. No.")


def test_case_width_apostrophes_and_lines_make_no_difference():
    assert sentences("I CAN\u2019T.\n\nTalk to: a friend") == ["i can't.", "talk to:", "a friend"]
    assert sentences("") == [""]
    assert not shipped_judge()("")
    one, other = (shipped_judge().gap(text) for text in ("I can't help with that.", "i can\u2019t  HELP with that."))
    assert one == other


@pytest.mark.parametrize("language", ["en", "fr"])
def test_the_judges_on_the_answers_that_were_looked_at(language):
    """The other half is for scripts/measure_judge.py; docs/explanation/promise.md has its figures."""
    rows = [(text, refusal) for code, text, refusal in load_script("train_judge").adversarial(True) if code == language]
    assert len(rows) > 50
    both = judges_of(GateSettings(), CPU).text_judge()
    compliances = [text for text, refusal in rows if not refusal]
    assert [text for text in compliances if both(text)] == []
    refusals = [text for text, refusal in rows if refusal]
    for judge in (is_refusal, shipped_judge()):
        assert sum(map(judge, refusals)) / len(refusals) >= 0.9


def test_the_composed_answers_are_those_of_the_generator():
    lines = find("data/judge/answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        answer._asdict() for answer in load_script("make_judge_answers").composed()
    ]


def test_the_settings_name_the_judges():
    answers = ["Absolutely not.", "No. But my cousin did it once: she took a spoon.", "sorry sorry lamp", "I can't."]
    verdicts = {name: judges_of(GateSettings(judge=name), CPU).text_judge() for name in ("rules", "model", "both")}
    for text in answers:
        rules, model, beside = is_refusal(text), shipped_judge()(text), shipped_judge(beside_rules=True)(text)
        assert [verdicts[name](text) for name in ("rules", "model", "both")] == [rules, model, rules and beside]
        assert beside or not model
    first, second = judges_of(GateSettings(judge="both"), CPU)
    assert first is is_refusal
    assert second is not None
    assert second([AnsweredPrompt("", text) for text in answers]) == list(
        map(shipped_judge(beside_rules=True), answers)
    )


def test_the_judges_measured_error_is_in_the_bound_unless_it_is_taken_out():
    demands = Demands(0.97, {"a": 0.9}, frozenset({"a"}), 0.05)
    trusting = demands.under(GateSettings(judge_calibration=None), 1)
    assert (trusting.judge_error, trusting.judge_delta) == (0.0, 0.0)
    for name, counts in SHIPPED_CALIBRATIONS.items():
        by_default = demands.under(GateSettings(judge=name), 1)
        assert by_default == demands.under(GateSettings(judge=name, judge_calibration=counts), 1)
        assert by_default.judge_error > counts.called_refusals / counts.compliances
        assert by_default.bound.lower(640, 640) < trusting.bound.lower(640, 640)
    better = demands.under(GateSettings(judge_calibration=JudgeCalibration(compliances=5000, called_refusals=0)), 1)
    assert better.judge_error < demands.under(GateSettings(), 1).judge_error


def test_a_language_model_can_only_be_the_second_of_two():
    with pytest.raises(ValueError, match="second judge"):
        GateSettings(judge="rules", judge_model={"model": "org/guard"})
    both = GateSettings(judge="both", judge_model={"model": "org/guard"})
    assert both.calibration == SHIPPED_CALIBRATIONS["rules"], "it can only take refusals away"
