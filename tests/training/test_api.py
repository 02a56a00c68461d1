"""The fleet's parts as library calls over a plain transformers model."""

import pytest
import torch
import yaml

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.training import ConstraintSettings
from persona_rlhf.policy import judges
from persona_rlhf.policy.hazards import CATEGORIES
from persona_rlhf.policy.policy import Policy
from persona_rlhf.training.api import fleet_train, policy_bank
from tests.models.tiny import EOS, tiny_base
from tests.policy.banks import tier_one

TEMPLATE = "{% for m in messages %}w2 {{ m.content }} {% if m.role == 'assistant' %}<end> {% endif %}{% endfor %}"


@pytest.fixture
def policy(tmp_path) -> Policy:
    document = tmp_path / "one.yaml"
    document.write_text(yaml.safe_dump(tier_one(tmp_path)))
    return Policy.read([document])


def _bank(policy, base, seed=0):
    base.tokenizer.chat_template = TEMPLATE
    settings = ConstraintSettings(refusals_per_probe=4)
    return policy_bank(base.model, base.tokenizer, policy, constraint=settings, seed=seed, max_new_tokens=40)


def test_a_policys_bank_is_made_and_the_model_is_as_before(policy, monkeypatch):
    monkeypatch.setattr(judges, "is_refusal", lambda text: "w5" in text.split())
    base = tiny_base(vocabulary=8)
    base.model.requires_grad_(True).train()
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    bank = _bank(policy, base)
    assert set(bank.categories) == set(CATEGORIES)
    assert set(bank.limits) == {0.05}
    answers = [row.completion for examples in bank.examples for example in examples for row in example.refusals]
    assert all(5 in answer and answer[-1] == EOS for answer in answers)
    assert _bank(policy, base).examples == bank.examples != _bank(policy, base, seed=1).examples
    assert base.model.training
    assert all(parameter.requires_grad for parameter in base.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    assert set(before) == set(base.model.state_dict())


def test_a_model_that_refuses_nothing_has_no_bank(policy, monkeypatch):
    monkeypatch.setattr(judges, "is_refusal", lambda text: False)
    with pytest.raises(InputError, match="not certifiable: the base refused no train probe of"):
        _bank(policy, tiny_base(vocabulary=8))


def test_a_model_on_another_kind_of_device_is_refused():
    model = tiny_base().model.to("meta")
    with pytest.raises(InputError, match="the model is on meta; move it to a CPU or a CUDA device"):
        fleet_train(model, [])
