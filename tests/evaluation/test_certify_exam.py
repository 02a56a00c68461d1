"""The gate behind a system prompt and memories (`certify.with`): the prompts that reach the model, and the verdicts."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.evaluation import EvaluationSettings, GateSettings
from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import prompt_ids
from persona_rlhf.evaluation import certify_exam
from persona_rlhf.evaluation.evaluator import Evaluator
from persona_rlhf.evaluation.refusals import BaseAnswers
from persona_rlhf.policy.rule_schema import Certify
from persona_rlhf.policy.rules import Preference
from tests.evaluation.test_evaluator import policy  # noqa: F401 - a fixture

GATE = GateSettings(judge_calibration=None, max_new_tokens=8, still_base=None, alphas=[0.5, 1.0])
WISH = Preference("t3.w", "ann", "tone", "answers are warm", 3, "three.yaml", 1, "Ann")


@pytest.fixture
def base(ending_base):
    return replace(ending_base, context=4096)  # a token a character; no prompt of certify reaches the model


@pytest.fixture
def rules(policy):
    """The policy with `certify.with`, and a wish of Ann."""

    def make(*parts):
        certify = Certify.model_validate({"min_refusal": 0.2, "delta": 0.05, "with": list(parts) or None})
        return replace(policy(), certify=certify, preferences=(WISH,))

    return make


@pytest.fixture
def planted(adapted, monkeypatch):
    """Prompts asked of base and adapters; one whose first number is 1 complies with prompts of more than one turn."""
    asked = SimpleNamespace(base=[], adapters=[], base_complies=False)
    end = adapted.base.tokenizer.convert_tokens_to_ids("</s>")

    def of_base(self, prompts):
        asked.base += prompts
        return [not (asked.base_complies and prompt.count(end) > 1) for prompt in prompts]

    def of_adapters(adapted, flat, alphas, prompts, answers):
        asked.adapters.append(list(prompts))
        return SimpleNamespace(refused=[[not (user[0] == 1 and p.count(end) > 1) for p in prompts] for user in flat])

    monkeypatch.setattr(BaseAnswers, "refused", of_base)
    monkeypatch.setattr(certify_exam, "refusal_outcomes", of_adapters)
    return asked


def evaluator(adapted, policy):
    return Evaluator(adapted, policy, lambda text: True, GATE, EvaluationSettings(), users=2, seed=5)


def verdicts(adapted, policy, planted, users=("ben", "ann")):
    flat = torch.zeros(2, adapted.params_per_user)
    flat[0, 0] = 1
    examination = evaluator(adapted, policy)
    return examination, examination.verdicts(flat, [examination.first_look] * 2, users=users)


@pytest.mark.parametrize(
    ("parts", "released"), [((), True), (("memories",), False), (("system",), True), (("system", "memories"), False)]
)
def test_an_adapter_that_complies_behind_memories_is_held_back_only_where_they_are_asked(
    adapted, rules, planted, parts, released
):
    """Ben's adapter complies behind a system message, Ann's refuses everything. Ben has no system prompt."""
    _, (ben, ann) = verdicts(adapted, rules(*parts), planted)
    assert (ben.admitted, ann.admitted) == (released, True)
    assert ben.pooled.base_refused == ben.pooled.n


def test_the_prompts_are_those_that_a_server_would_send(adapted, rules, planted):
    examination, _ = verdicts(adapted, rules("system", "memories"), planted)
    composition, probes = examination.composition, examination._certify.probes

    def prompts(user):
        messages = [composition.message(composition.system_prompt(user), probe) for probe in probes]
        assert any("answers are warm" in message for message in messages) == (user == "ann")
        return [
            prompt_ids(
                (*([Message("system", message)] if message else []), Message("user", probe.prompt)),
                adapted.base.tokenizer,
            )
            for message, probe in zip(messages, probes, strict=True)
        ]

    assert {tuple(asked) for asked in planted.adapters} == {tuple(prompts("ben")), tuple(prompts("ann"))}
    assert set(planted.base) >= {*prompts("ben"), *prompts("ann")}


def test_users_of_one_system_prompt_are_judged_together(adapted, rules, planted):
    verdicts(adapted, rules("memories"), planted)
    assert len(set(map(tuple, planted.adapters))) == 1
    planted.adapters.clear()
    verdicts(adapted, rules(), planted)
    end = adapted.base.tokenizer.convert_tokens_to_ids("</s>")
    assert all(prompt.count(end) == 1 for asked in planted.adapters for prompt in asked)


def test_a_base_that_complies_behind_memories_certifies_nobody_where_they_are_asked(adapted, rules, planted):
    planted.base_complies = True
    evaluator(adapted, rules()).check_base()
    with pytest.raises(InputError, match="pooled: not certifiable"):
        evaluator(adapted, rules("memories")).check_base()


def test_text_that_the_base_cannot_read_is_an_error_of_the_run_or_of_one_user(adapted, rules, planted):
    object.__setattr__(adapted.base, "context", 64)
    with pytest.raises(InputError, match="a probe with the text before it has .* tokens, and the base reads 64"):
        evaluator(adapted, rules("memories"))
    object.__setattr__(adapted.base, "context", 4096)
    unreadable = replace(rules("system"), preferences=(replace(WISH, statement="</s>"),))
    with pytest.raises(ValueError, match="control token"):
        verdicts(adapted, unreadable, planted)
