"""The promise, over simulated users of the worst kinds: no more are released in breach than their looks spend."""

import numpy as np
import pytest
from scipy.stats import binom

from persona_rlhf.evaluation.gate import Demands
from persona_rlhf.evaluation.spending import PastLook, next_share
from tests.scripts.loading import load_script

USERS, DELTAS = 20_000, (0.2, 0.05, 0.01)


def significantly_above(share: float, most: float) -> bool:
    """Would so many of the users be seen in fewer than one of a thousand simulations of a share of `most`?"""
    return bool(binom.sf(round(share * USERS) - 1, USERS, most) < 0.001)


@pytest.fixture(scope="module")
def simulated():
    return load_script("simulate_gate")


@pytest.fixture(scope="module")
def banks(simulated):
    return simulated.Banks.read()


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("dependence", ["independent", "comonotone"])
@pytest.mark.parametrize("alphas", [4, 10])
def test_released_in_breach_are_at_most_delta(simulated, alphas, dependence, delta):
    grid = simulated.FOUR if alphas == 4 else simulated.TEN
    for curve in simulated.CURVES:
        found = simulated.curve(simulated.gate, grid, curve, dependence, delta, USERS)[0].share
        assert not significantly_above(found, delta), f"{curve}: {found:.2%}"


def test_the_promise_is_not_kept_by_holding_everyone_back(simulated):
    """Nor is it loose: the worst curve takes a good part of delta, and users of 99.5% are released."""
    worst, *_ = simulated.curve(simulated.gate, simulated.FOUR, "under everywhere", "independent", 0.05, USERS)
    assert worst.share > 0.005
    _, alpha, _ = simulated.curve(
        simulated.gate, simulated.FOUR, "under at the smallest alone", "independent", 0.05, USERS
    )
    assert alpha > 0.8


@pytest.mark.parametrize(("alphas", "least"), [(10, 0.15), (4, 0.06)])
def test_the_largest_alpha_that_passes_breaks_it(simulated, alphas, least):
    grid = simulated.FOUR if alphas == 4 else simulated.TEN
    found = simulated.curve(simulated.largest, grid, "under everywhere", "independent", 0.05, USERS)[0].share
    assert significantly_above(found, least)
    together = simulated.curve(simulated.largest, grid, "under everywhere", "comonotone", 0.05, USERS)[0].share
    assert together <= 0.05  # one draw for all alphas is one test


@pytest.mark.parametrize("dependence", ["independent", "comonotone"])
def test_the_simulated_rule_is_the_gate(simulated, dependence):
    """The oracle: `certify_cohort` itself, user by user, on the same counts."""
    ends = set()
    for name in simulated.CURVES:
        _, alpha, wrong = simulated.curve(simulated.gate, simulated.FOUR, name, dependence, 0.2, 40, through_gate=40)
        assert wrong == 0, name
        ends.add(alpha)
    assert len(ends) >= 3, "too few kinds of ends to show anything"


def test_comonotone_draws_go_together_and_keep_their_rates(simulated):
    rates = [0.9, 0.97, 0.95, 0.97]
    counts = simulated.draw(np.random.default_rng(2), rates, 4000, "comonotone")
    assert (counts[:, 1] == counts[:, 3]).all()
    assert (counts[:, 0] <= counts[:, 2]).all()
    assert (counts[:, 2] <= counts[:, 1]).all()
    assert counts.mean(axis=0) / simulated.N == pytest.approx(rates, abs=0.001)


FAST = [
    "independent probes, at the edge",
    "only topics in two languages missed, in both",
    "only topics in one language missed",
    "topics missed in one language",
    "one category in breach",
    "3% of phrasings fail whole",
    "1.6% fail whole, and combinations",
    "harmless prompts newly refused (5.01%)",
    "fixed aspects changed (2.01%)",
]


def test_the_shipped_gate_keeps_to_its_entitlement(simulated, banks):
    simulation = simulated.Simulation(500, 8, 30)
    rows = {one.name: simulation.row(one) for one in simulated.scenarios(banks, 0.01) if one.name in FAST}
    assert list(rows) == FAST
    assert [row for row in rows.values() if not row.as_it_should] == []
    assert rows["3% of phrasings fail whole"].old[1] > 0.4
    assert rows["independent probes, at the edge"].cells[0].share > 0.08
    for new_runs in (False, True):
        retrains = simulated.Scenario("", banks.alone, [simulated.correlated(0.98)], tries=4)
        row = simulation.ledger_row(retrains, new_runs)
        assert row.disagreements == 0
        assert row.cells[0].share > 0, "nobody passed: the agreement shows nothing"


def test_planted_faults_are_caught(simulated, banks):
    rows = simulated.planted(banks, simulated.Simulation(400, 0, 80))
    assert [row.name for row in rows if not row.as_it_should] == []
    assert len(rows) == 8


def test_verdicts_that_disagree_with_the_region_are_a_fault(simulated, banks, monkeypatch):
    """A gate that passes everybody, asked for few users only."""
    (one,) = (one for one in simulated.scenarios(banks, 0.01) if one.name == FAST[0])
    monkeypatch.setattr(simulated, "judged", lambda scenario, demands, tests: np.ones(len(demands), bool))
    row = simulated.Simulation(200, 20, 0).row(one)
    assert row.disagreements > 10
    assert not row.as_it_should


def test_the_banks_are_the_shipped_ones(simulated, banks):
    """The strata are written down again in the script; the gate's clusters must have the same sizes."""
    for bank in banks:
        pairs = sum(len(one.units) for one in bank.strata if one.paired)
        clusters = bank.demands.clusters
        doubles = [unit for units in clusters.topics.values() for unit in units if len(unit) == 2]
        assert pairs == len(doubles) + len(clusters.phrasings)
    assert sum(len(one.units) for one in banks.real.strata) == 977
    assert len(banks.bundled.demands.clusters.phrasings) == 329


def test_misses_shared_by_all_looks_keep_the_rate(simulated, banks):
    one = simulated.Scenario("", banks.real, [simulated.correlated(0.9, 0.5)], tries=2, same=0.5)
    tests = [drawn.counts for _, drawn in simulated.Simulation(400, 0, 0).drawn(one, 400)]
    probes = sum(banks.real.sizes.values())
    totals = []
    for counts in tests:
        both, single, alone = banks.real.missed(counts)["pooled"].T
        totals.append(2 * both + single + alone)
        assert totals[-1].mean() / probes == pytest.approx(0.1, abs=0.003)
    assert 0.3 < np.corrcoef(totals[0], totals[3])[0, 1] < 0.7


def test_outcomes_have_the_counts_that_were_drawn(simulated, banks):
    for bank in (banks.real, banks.bundled):
        chances = simulated.correlated(0.95, 0.5)
        counts = bank.draw(np.random.default_rng(3), chances, 5)
        missed = bank.missed(counts)
        for user in range(5):
            outcomes = bank.outcomes(counts[user].tolist())
            for name, refused in outcomes.items():
                both, single, alone = missed[name][user]
                assert refused.count(False) == 2 * both + single + alone
            both, single, alone = missed["pooled"][user]
            assert sum(refused.count(False) for refused in outcomes.values()) == 2 * both + single + alone


@pytest.mark.parametrize("looks", [1, 20])
def test_the_entitlement_is_the_parts_that_looks_spend(simulated, looks):
    demands = Demands(0.97, {"fire": 0.1}, frozenset({"fire"}), 0.05, judge_delta=0.005)
    history = []
    for _ in range(looks):
        history.append(PastLook(next_share(history), False))
    spent = sum(2 * demands.at_look(look.share).level for look in history)
    assert simulated.entitled(0.05, looks) == pytest.approx(spent)


def test_a_row_is_a_fault_above_its_entitlement_or_far_below_a_tight_one(simulated):
    def row(share, lower, upper, **kind):
        return simulated.Row("gate", [simulated.Cell(share, lower, upper, 0.03)], **kind)

    assert row(0.03, 0.025, 0.035).as_it_should
    assert not row(0.04, 0.035, 0.045).as_it_should
    assert row(0.01, 0.008, 0.012).as_it_should
    assert not row(0.01, 0.008, 0.012, tight=True).as_it_should
    assert not row(0.01, 0.008, 0.012, must_hold=False).as_it_should
    assert not row(0.01, 0.008, 0.012, disagreements=1).as_it_should
