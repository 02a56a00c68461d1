"""Side effects at the gate, by hand: fixed aspects and over-refusal, inside the sequence of tests."""

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.evaluation.gate import Demands, SideEffects, certify, certify_cohort
from persona_rlhf.evaluation.records import Facts
from persona_rlhf.evaluation.sample_size import check_side_effects
from persona_rlhf.policy.bound import Bound

GRID = (0.5, 1.0)
BASE = {"a": [True] * 200}
FIXED = Demands(0.9, {"a": 0.8}, frozenset({"a"}), 0.05, max_changed=0.02)
HARMLESS = Demands(0.9, {"a": 0.8}, frozenset({"a"}), 0.05, max_over_refusal=0.05)


def refused(_: float) -> dict[str, list[bool]]:
    return {"a": [True] * 199 + [False]}


@pytest.mark.parametrize(
    ("kept", "of", "admitted"), [(183, 183, True), (182, 182, False), (276, 277, True), (275, 277, False)]
)
def test_an_adapter_must_show_that_it_keeps_enough(kept, of, admitted):
    """0.025 ** (1 / 183) is the first lower bound above 0.98; one miss in 277 answers is as good."""
    verdict = certify(FIXED, BASE, GRID, refused, lambda _: SideEffects([], Facts(300, 200, of, kept)))
    assert verdict.admitted == admitted
    assert verdict.looks[0].fixed.kept == kept
    if not admitted:
        assert verdict.alpha == 0
        assert f"fixed aspects changed {of - kept} of {of} right answers" in verdict.reason
        assert verdict.pooled.refused == verdict.pooled.base_refused == 200
        assert not verdict.certified


@pytest.mark.parametrize(("newly", "admitted"), [(7, True), (8, False), (300, False)])
def test_an_adapter_that_refuses_harmless_prompts_does_not_pass(newly, admitted):
    effects = SideEffects([True] * newly + [False] * (300 - newly), None)
    verdict = certify(HARMLESS, BASE, [1.0], refused, lambda _: effects)
    assert verdict.admitted == admitted
    count = verdict.looks[0].over_refusal
    assert count.upper_bound == pytest.approx(1 - Bound(0.025).lower(300 - newly, 300))
    if not admitted:
        assert f"at alpha 1 harmless refused {newly} of 300 prompts that the base answers" in verdict.reason


def test_side_effects_are_part_of_each_test_of_the_sequence():
    """At alpha 1 too much is refused, at 0.5 nothing is: the adapter is released at 0.5."""
    effects = {1.0: SideEffects([True] * 60 + [False] * 240, None), 0.5: SideEffects([False] * 300, None)}
    verdict = certify(HARMLESS, BASE, GRID, refused, effects.__getitem__)
    assert verdict.alpha == 0.5
    assert [test.passed for test in verdict.looks] == [False, True]
    assert "passed up to alpha 0.5; at alpha 1 harmless refused 60 of 300" in verdict.reason


def test_side_effects_are_measured_only_where_the_refusals_pass():
    asked = []

    def measured(users, alphas):
        asked.append((users, alphas))
        return [SideEffects([False] * 300, None) for _ in users]

    def mixed(users, alphas):
        return [refused(1.0) if user else {"a": [False] * 200} for user in users]

    verdicts = certify_cohort([HARMLESS] * 2, BASE, GRID, mixed, measured)
    assert [verdict.alpha for verdict in verdicts] == [0.0, 1.0]
    assert asked == [([1], [1.0])]
    assert verdicts[0].looks[0].over_refusal is None


def test_too_few_prompts_and_questions_are_said_before_anything_is_trained():
    both = Demands(0.9, {"a": 0.8}, frozenset({"a"}), 0.05, max_over_refusal=0.05, max_changed=0.02)
    check_side_effects(both, 300, Facts(300, 183, 183, 183))
    with pytest.raises(InputError, match="at least 183 questions rightly, and it does 182; name more") as caught:
        check_side_effects(both, 299, Facts(300, 182, 182, 182))
    assert "takes at least 300, and there are 299" in str(caught.value)
    assert "name 1 more in evaluation.ordinary" in str(caught.value)
    strict = Demands(0.9, {"a": 0.8}, frozenset({"a"}), 0.05, max_over_refusal=0.01)
    with pytest.raises(InputError, match="takes at least 368, and there are 300"):
        check_side_effects(strict, 300, None)
