"""The way back to the provider's adapter, for users whose answers lack what the policy requires."""

import pytest
import torch

from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import prompt_ids
from persona_rlhf.evaluation.refusals import answer_text
from persona_rlhf.evaluation.warm_start import SHARES_BACK, WarmStartInterpolation
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.policy.properties import satisfied
from persona_rlhf.policy.rules import Requirement

TOKENS, SEED = 12, 3
TEXTS = [f"{word} {n}" for n in range(4) for word in ("hello", "why not", "tell me", "a b c", "zzz")]


def rule(prop, value, min_rate, split="dev", texts=TEXTS):
    probes = tuple(Probe(p, "r", p, p, p, None, split, "combination") for p in texts)
    return Requirement(prop, prop, value, 2, "two.yaml", 1, "App", min_rate=min_rate, probes=probes)


@pytest.fixture
def start(adapters):
    return torch.zeros_like(adapters[0])


def rate(adapted, flat, requirement, asked):
    """The oracle: one user alone, every answer looked at."""
    prompts = [prompt_ids((Message("user", text),), adapted.base.tokenizer) for text in asked]
    with adapted.using(flat[None]):
        [written] = adapted.generate([prompts], TOKENS, temperature=1.0, seed=SEED)
    met = [satisfied(requirement, text, answer_text(adapted, a)) for text, a in zip(asked, written, strict=True)]
    return sum(met) / len(met)


def test_each_goes_back_just_as_far_as_he_must(adapted, adapters, start):
    requirement = rule("must_not_include", "i", 0.6)
    retreat = WarmStartInterpolation(adapted, start, [requirement], 100, TOKENS, SEED)
    asked = retreat._required.prompts
    enough = min(requirement.aim(), rate(adapted, start, requirement, asked))
    moved, back = retreat(adapters)
    for user, own in enumerate(adapters):
        line = {share: torch.lerp(own, start, share) for share in SHARES_BACK}
        sound = (s for s in SHARES_BACK if s == 1 or rate(adapted, line[s], requirement, asked) >= enough)
        expected = next(sound)
        assert back[user] == expected
        assert torch.equal(moved[user], line[expected])
    assert 0.0 in back, "somebody must have nothing to make good, or the test shows nothing"
    assert any(share > 0 for share in back), "somebody must go back, or the test shows nothing"


def test_who_meets_it_nowhere_ends_as_the_provider(adapted, adapters, start):
    impossible = rule("must_include", "never said by anyone", 0.9)
    retreat = WarmStartInterpolation(adapted, start, [impossible], 100, TOKENS, SEED)
    assert retreat(adapters)[1] == [0.0] * len(adapters)  # the provider never says it either: nothing to go back to
    retreat = WarmStartInterpolation(adapted, start, [impossible], 100, TOKENS, SEED)
    retreat._enough = {"must_include": 0.95}
    moved, back = retreat(adapters)
    assert back == [1.0] * len(adapters)
    assert torch.equal(moved, start.expand_as(moved))


@pytest.mark.parametrize(
    "requirement",
    [
        rule("must_not_include", "e", 0.9, split="test"),
        rule("min_words", 50, 0.9),
        rule("must_not_include", "e", 0.9, texts=[]),
    ],
    ids=["no dev prompts", "not taught", "no prompts"],
)
def test_nobody_is_moved_without_a_prompt_to_tell_by(adapted, adapters, start, requirement, monkeypatch):
    monkeypatch.setattr(adapted, "generate", None)
    moved, back = WarmStartInterpolation(adapted, start, [requirement], 100, TOKENS, SEED)(adapters)
    assert back == [0.0] * len(adapters)
    assert torch.equal(moved, adapters)


def test_none_asked_for_none_moved(adapted, adapters, start, monkeypatch):
    monkeypatch.setattr(adapted, "generate", None)
    assert (
        WarmStartInterpolation(adapted, start, [rule("must_not_include", "e", 0.9)], 0, TOKENS, SEED)(adapters)[1]
        == [0.0] * 5
    )
