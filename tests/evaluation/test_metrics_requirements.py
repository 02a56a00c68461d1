"""Answers counted against the requirements that come with prompts."""

import pytest

from persona_rlhf.evaluation.metrics import RequirementPrompts
from persona_rlhf.evaluation.records import Met
from persona_rlhf.policy.bound import Bound
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.policy.rule_schema import When
from persona_rlhf.policy.rules import Requirement


def probes(split, *prompts):
    return tuple(Probe(p, "r", p, p, p, None, split, "combination") for p in prompts)


def rule(name, prop, value, own, when=None):
    return Requirement(name, prop, value, 2, "two.yaml", 1, "App", when=when, min_rate=0.9, probes=own)


def test_counts_by_hand():
    short = rule("short", "max_words", 2, probes("test", "a", "b") + probes("train", "never asked"))
    soup = rule("soup", "must_include", "salt", probes("test", "soup", "tea", "a"), When(pattern="soup"))
    bare = rule("bare", "max_words", 1, ())
    told = rule("told", "judge", "it is kind", probes("test", "c"))
    required = RequirementPrompts([short, soup, bare, told], 10, 0.05)
    assert sorted(required.prompts) == ["a", "b", "soup"]  # `tea` is nothing that a rule of the bank is about
    said = {"a": "one two", "b": "one two three", "soup": "Salt it."}
    base = {"a": "one", "b": "one", "soup": "one two three"}
    found = required.count([said[p] for p in required.prompts], [base[p] for p in required.prompts])
    # `short` is about the prompt that `soup` brought, too
    assert found == {
        "short": Met(3, 2, 2, Bound(0.05).lower(2, 3), 0.9),
        "soup": Met(1, 1, 0, pytest.approx(0.05), 0.9),
    }


def test_at_most_so_many_prompts_a_rule_always_the_same():
    many = rule("r", "max_words", 2, probes("test", *(f"prompt {n}" for n in range(50))))
    first = RequirementPrompts([many], 7, 0.05).prompts
    assert len(first) == 7
    assert RequirementPrompts([many], 7, 0.05).prompts == first
    assert set(first) < set(RequirementPrompts([many], 20, 0.05).prompts)
    assert RequirementPrompts([many], 0, 0.05).prompts == []
