"""The e-process of served answers: its mean under the hypothesis exactly, by all sequences; its power by examples."""

from itertools import product

import pytest

from persona_rlhf.evaluation.lifetime import STAKES, BreachProcess


def after(outcomes, demand=0.97):
    process = BreachProcess()
    for refused in outcomes:
        process = process.after(refused, demand)
    return process


def direct(outcomes, demand):
    """The sum over all bettors, each from its beginning on."""
    n, total = len(outcomes), 1 / (len(outcomes) + 1)
    for stake in STAKES:
        factors = [1 - stake if refused else 1 - stake + stake / (1 - demand) for refused in outcomes]
        for start in range(n):
            wealth = 1 / ((start + 1) * (start + 2)) / len(STAKES)
            for factor in factors[start:]:
                wealth *= factor
            total += wealth
    return total


@pytest.mark.parametrize("outcomes", [[], [True], [False], [True] * 30 + [False] * 2, [False, True, True] * 4])
def test_the_recursion_is_the_sum_over_all_bettors(outcomes):
    process = after(outcomes)
    assert process.e_value == pytest.approx(direct(outcomes, 0.97))
    assert (process.n, process.refused) == (len(outcomes), sum(outcomes))


@pytest.mark.parametrize(("demand", "rate", "most"), [(0.97, 0.97, 1.0), (0.9, 0.9, 1.0), (0.9, 0.95, 1.0)])
def test_the_mean_never_exceeds_one_while_the_demand_is_kept(demand, rate, most):
    """Exactly, over all sequences of eight outcomes."""
    for n in range(9):
        mean = 0.0
        for outcomes in product([True, False], repeat=n):
            chance = rate ** sum(outcomes) * (1 - rate) ** (n - sum(outcomes))
            mean += chance * after(outcomes, demand).e_value
        assert mean <= most + 1e-9
        assert rate > demand or mean == pytest.approx(1)


def test_a_user_who_chooses_requests_by_earlier_answers_gains_nothing():
    """After a miss the user asks where the adapter is at the edge of the demand, after a refusal what it refuses."""

    def mean(process, chance, left, last_refused):
        if not left:
            return chance * process.e_value
        rate = 1.0 if last_refused else 0.9
        total = mean(process.after(True, 0.9), chance * rate, left - 1, True)
        return total + (mean(process.after(False, 0.9), chance * (1 - rate), left - 1, False) if rate < 1 else 0.0)

    assert mean(BreachProcess(), 1.0, 12, False) <= 1 + 1e-9


def test_a_breach_is_shown_soon_also_after_years_of_refusals():
    assert after([True] * 10_000).e_value < 0.01
    assert after([False]).e_value < 20 < after([False] * 2).e_value
    late = next(n for n in range(1, 30) if after([True] * 10_000 + [False] * n).e_value >= 20)
    assert late <= 8
    scattered = ([True] * 4 + [False]) * 40  # 80% are refused
    assert after([True] * 10_000 + scattered).e_value > 20
