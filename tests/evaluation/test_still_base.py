"""The limits of `gate.still_base` by hand, and the sign test against scipy."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from persona_rlhf.config.evaluation import StillBaseSettings
from persona_rlhf.evaluation.records import Facts
from persona_rlhf.evaluation.still_base import AnswersTo, still_base, without_limit

LIMITS = StillBaseSettings()
BASE = AnswersTo(40, 1200, 1.5, 1)


@pytest.mark.parametrize(
    ("answers", "named"),
    [
        (BASE, None),
        (AnswersTo(40, 1200, 2.25, 1), None),
        (AnswersTo(40, 1200, 2.26, 1), "perplexity of ordinary answers 2.26 (base 1.5, n = 40; at most 2.25)"),
        (AnswersTo(40, 239, 1.5, 1), "tokens of an answer 5.975 (base 30, n = 40; at least 6 and at most 75)"),
        (AnswersTo(40, 3001, 1.5, 1), "tokens of an answer 75.03"),
        (AnswersTo(40, 1200, 1.5, 3), None),
        (AnswersTo(40, 1200, 1.5, 4), "empty answers 4 (base 1, n = 40; at most 3)"),
        (AnswersTo(40, 9, 8176.0, 40), "perplexity of ordinary answers 8,176 (base 1.5"),
    ],
)
def test_answers_are_held_to_the_base(answers, named):
    measured = still_base(LIMITS, answers, BASE, None, [])
    assert measured.passes == (named is None)
    assert named is None or named in measured.shortfall
    assert len(measured.sentences) == 3


@pytest.mark.parametrize(("kept", "passes"), [(45, True), (43, True), (42, False), (0, False)])
def test_of_45_right_answers_two_may_be_lost(kept, passes):
    """5% of 45 are 2.25. A new right answer is no amends: the base's own count."""
    measured = still_base(LIMITS, None, None, Facts(46, 46, 45, kept), [])
    assert measured.passes == passes
    assert measured.facts.n == 46
    assert passes or measured.shortfall == f"right facts kept {kept} (base 45, n = 46; at least 42.75)"


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_sign_test_is_the_exact_binomial_test(better, worse):
    margins = [0.3] * better + [-2.0] * worse
    pairs = still_base(LIMITS, None, None, None, margins).pairs
    if not margins:
        assert pairs is None
        return
    exact = binomtest(better, len(margins), 0.5, alternative="less").pvalue
    assert pairs.p_value == pytest.approx(exact)
    assert pairs.passes == (pairs.p_value > 0.05)


def test_fewer_than_five_pairs_hold_nobody_back():
    assert all(still_base(LIMITS, None, None, None, [-1.0] * n).passes for n in range(5))
    worse = still_base(LIMITS, None, None, None, [-1.0] * 5)
    assert worse.shortfall == "held-out pairs of 0 of 5 prompts ranked better than by the base (p = 0.031, level 0.05)"


def test_a_limit_of_null_leaves_its_measure_out():
    none = StillBaseSettings(**dict.fromkeys(StillBaseSettings.model_fields))
    measured = still_base(none, AnswersTo(40, 1, 9e9, 40), BASE, Facts(46, 0, 45, 0), [-1.0] * 60)
    assert measured.passes
    assert (measured.perplexity, measured.facts, measured.empty, measured.pairs) == (None, None, None, None)


def test_a_config_without_prompts_or_facts_says_that_there_is_no_limit():
    prompts, facts = without_limit(LIMITS, 0, 0)
    assert "evaluation.ordinary" in prompts
    assert "evaluation.facts" in facts
    assert without_limit(LIMITS, 40, 46) == without_limit(None, 0, 0) == []
    assert without_limit(StillBaseSettings(max_facts_lost=None), 40, 0) == []


@pytest.mark.parametrize(
    ("limit", "shortfall"),
    [
        ({"max_perplexity": 1.1}, "perplexity of ordinary answers 1.8"),
        ({"min_length": 0.9}, "tokens of an answer 25"),
        ({"max_length": 1.2, "min_length": None}, None),
        ({"max_empty": 0.0}, "empty answers 2"),
        ({"max_facts_lost": 0.0}, "right facts kept 44"),
        ({"pairs_level": 0.4}, "held-out pairs of 4 of 10 prompts"),
    ],
)
def test_each_limit_can_be_set(limit, shortfall):
    answers, facts, margins = AnswersTo(40, 1000, 1.8, 2), Facts(46, 45, 45, 44), [1.0] * 4 + [-1.0] * 6
    assert still_base(LIMITS, answers, BASE, facts, margins).passes
    measured = still_base(StillBaseSettings(**limit), answers, BASE, facts, margins)
    assert measured.passes == (shortfall is None)
    assert shortfall is None or measured.shortfall.startswith(shortfall)
