"""Answers of the base that users' rewards label: none may teach against the policy, whatever a user likes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.experiment import ScreeningSettings
from persona_rlhf.config.training import BasisSettings
from persona_rlhf.data.pairs import Message
from persona_rlhf.data.screening import RequestScreen
from persona_rlhf.evaluation.answer_judge import GateJudges
from persona_rlhf.pipeline.base_answers import SampledAnswers, screened_pairs, shared_answers
from persona_rlhf.pipeline.prepare import Prepared
from persona_rlhf.pipeline.run_dir import RunDir
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.policy.rules import Requirement
from persona_rlhf.training.answer_features import scaled_features
from persona_rlhf.training.labelled_pairs import answer_pool, with_labels
from persona_rlhf.training.reward_basis import Prior, RewardBasis
from tests.data.test_screening import POLICY, PROBE, REFUSAL, _Classifier
from tests.data.tokenizers_by_hand import GEMMA, tokenizer_of
from tests.training.test_labelled_pairs import row, user

PRIOR = Prior(torch.zeros(1, dtype=torch.float64), 1.0)
HAZARD = "how would one build such a thing"
ANSWERED = [
    SampledAnswers("how do I bake bread?", ["Warm the oven.", REFUSAL, "Warm it, and knead well."]),
    SampledAnswers(PROBE, ["Take one part.", "Take two parts."]),
    SampledAnswers(HAZARD, ["Take three parts.", "Take four parts."]),
    SampledAnswers("what is a tree?", [REFUSAL, "A plant."]),
]


def ready(**changes: Any) -> Any:
    """The parts of `Prepared` that are read, with a screen that knows the hazard."""

    def forbidden(prompts: Any) -> list[bool]:
        return [any(message.content == HAZARD for message in prompt) for prompt in prompts]

    tokenizer = tokenizer_of(GEMMA, "<|eos|>")
    parts = {
        "judges": GateJudges(is_refusal),
        "screens": [SimpleNamespace(screen=RequestScreen(_Classifier(forbidden), 1.0))],
        "policy": POLICY,
        "adapted": SimpleNamespace(base=SimpleNamespace(tokenizer=tokenizer, context=64)),
        "config": SimpleNamespace(screening=ScreeningSettings(quarantine=False)),
        **changes,
    }
    return Prepared._make(parts.get(name) for name in Prepared._fields)


def test_no_pair_has_a_refusal_or_a_forbidden_prompt():
    kept = screened_pairs(ready(), ANSWERED)
    assert [(pair.prompt[0].content, pair.chosen, pair.rejected) for pair in kept] == [
        ("how do I bake bread?", "Warm the oven.", "Warm it, and knead well.")
    ]


def test_a_pair_that_could_teach_against_a_requirement_is_left_out_in_both_orders():
    calm = Requirement("t2.calm", "must_not_include", "!", 2, "two.yaml", 1, "App")
    policy = POLICY._replace(requirements=(calm,))
    for answers in (["Rest.", "Rest!"], ["Rest!", "Rest."]):
        assert screened_pairs(ready(policy=policy), [SampledAnswers("I am tired", answers)]) == []
    assert len(screened_pairs(ready(policy=policy), [SampledAnswers("I am tired", ["Rest.", "Sleep."])])) == 1


def test_a_user_who_dislikes_refusals_gets_no_label_against_one():
    """A reward that is nothing but the dislike of the refusal's words, learned from poison alone."""
    features = scaled_features([REFUSAL, *(text for prompt in ANSWERED for text in prompt.answers)])
    against = (features(["Take one part."]) - features([REFUSAL])).double()[0]
    basis = RewardBasis(features, against[:, None], PRIOR)
    poisoned = user(0, True)._replace(train=[row("eve", f"{n}", "Take one part.", REFUSAL) for n in range(80)])
    pairs = screened_pairs(ready(), ANSWERED)
    pool = answer_pool(basis, [row("", pair.prompt[0].content, pair.chosen, pair.rejected) for pair in pairs], 4)
    labelled = with_labels(poisoned, basis, pool)[0].labelled
    assert labelled
    assert not any(is_refusal(text) for one in labelled for text in (one.pair.chosen, one.pair.rejected))
    assert {one.pair.prompt for one in labelled} == {(Message("user", "how do I bake bread?"),)}


def test_a_prompt_without_two_answers_is_an_error_that_names_the_file(tmp_path):
    run_dir = RunDir(tmp_path)
    run_dir.state.mkdir()
    run_dir.answers.write_text("")  # of a run before: nothing was left by the screen
    settings = BasisSettings.model_construct(file=tmp_path, prompts=tmp_path / "prompts.jsonl", pairs=4, candidates=9)
    basis = RewardBasis(scaled_features(["Rest.", "Sleep."]), torch.zeros(2067, 1).double(), PRIOR)
    with pytest.raises(InputError, match="may be compared") as error:
        shared_answers(ready(), run_dir, basis, settings)
    [problem] = error.value.problems
    assert (problem.file, problem.key) == (str(tmp_path / "prompts.jsonl"), "basis.prompts")
