"""The sides of a comparison of two runs, by hand."""

import pytest

from persona_rlhf.release.results import PairCounts, Result
from tests.scripts.loading import SCRIPTS, load_script


@pytest.fixture
def comparison(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return load_script("compare_runs")


def test_users_with_the_populations_adapter_are_released_and_counted_apart(comparison):
    states = [("released", 1.0), ("prior", 1.0), ("prior", 0.5), ("held_back", 0.0)]
    results = [
        Result(user_id=str(n), slug=str(n), status=status, reason="", pairs=PairCounts(1, 1, 0), alpha=alpha)
        for n, (status, alpha) in enumerate(states)
    ]
    side = comparison.side(results)
    assert [side[key] for key in ("released", "prior", "held_back", "share_at_full_strength")] == [3, 2, 1, 0.5]


def test_a_ratio_of_seven_users_has_no_interval(comparison):
    gains = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    assert comparison.ratio_of_means(gains[:7], gains[:7]) == (1.0, None)
    assert comparison.ratio_of_means(gains, gains) == (1.0, (1.0, 1.0))
