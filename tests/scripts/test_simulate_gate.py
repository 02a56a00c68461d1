"""The promise, over thousands of simulated users of the worst kinds: at most delta of them are released in breach."""

import numpy as np
import pytest
from scipy.stats import binom

from persona_rlhf.config.evaluation import JudgeCalibration
from persona_rlhf.evaluation.gate import Demands, certify
from persona_rlhf.policy.clusters import Clusters
from persona_rlhf.policy.hazards import Probe
from tests.scripts.loading import load_script

USERS, DELTAS = 20_000, (0.2, 0.05, 0.01)


def significantly_above(share: float, most: float) -> bool:
    """Would so many of the users be seen in fewer than one of a thousand simulations of a share of `most`?"""
    return bool(binom.sf(round(share * USERS) - 1, USERS, most) < 0.001)


@pytest.fixture(scope="module")
def simulated():
    return load_script("simulate_gate")


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
    worst, _ = simulated.curve(simulated.gate, simulated.FOUR, "under everywhere", "independent", 0.05, USERS)
    assert worst.share > 0.01
    _, alpha = simulated.curve(
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
    """The oracle: `certify` itself, user by user, on the same counts."""
    demands = Demands(simulated.DEMAND, {"fire": 0.0}, frozenset({"fire"}), 0.2)
    base = {"fire": [True] * simulated.N}
    source, seen = np.random.default_rng(1), set()
    for curve in simulated.CURVES.values():
        rates = [curve(alpha) for alpha in simulated.FOUR]
        counts = simulated.draw(source, rates, 40, dependence)
        released = simulated.gate(counts, demands.delta)
        for row, place in zip(counts.tolist(), released.tolist(), strict=True):
            table = dict(zip(simulated.FOUR, row, strict=True))
            verdict = certify(
                demands, base, simulated.FOUR, lambda a, t=table: {"fire": [k < t[a] for k in range(simulated.N)]}
            )
            assert verdict.alpha == (simulated.FOUR[place] if place >= 0 else 0.0)
            seen.add(verdict.alpha)
    assert len(seen) >= 3, "too few kinds of ends to show anything"


def test_comonotone_draws_go_together_and_keep_their_rates(simulated):
    rates = [0.9, 0.97, 0.95, 0.97]
    counts = simulated.draw(np.random.default_rng(2), rates, 4000, "comonotone")
    assert (counts[:, 1] == counts[:, 3]).all()
    assert (counts[:, 0] <= counts[:, 2]).all()
    assert (counts[:, 2] <= counts[:, 1]).all()
    assert counts.mean(axis=0) / simulated.N == pytest.approx(rates, abs=0.001)


def test_the_promise_holds_for_users_of_every_kind_and_wrong_rules_are_caught(simulated):
    rows = simulated.table(2000, JudgeCalibration(compliances=96, called_refusals=2), 0.01)
    assert [row.name for row in rows if not row.as_it_should] == []
    assert sum(not row.must_hold for row in rows) == 3
    old = {row.name: row.old[1] for row in rows if row.old}
    assert not old["languages correlated 1, a quarter in two"].holds
    assert old["near copies of the whole bank, 1% pass the screen"].share == 1.0


def test_a_rule_that_is_known_to_be_wrong_fails_the_table(simulated):
    cells = [simulated.Cell(0.01, 0.005, 0.05)]
    assert not simulated.Row("wrong", cells, None, must_hold=False).as_it_should
    assert not simulated.Row("gate", [simulated.Cell(0.2, 0.19, 0.05)], None).as_it_should


@pytest.mark.parametrize("level", [0.1, 0.01])
def test_the_simulated_tests_are_those_of_the_gate_with_clusters(simulated, level):
    """The oracle: `Demands.test` on outcomes laid out from the same counts."""
    source, users = np.random.default_rng(6), 60
    languages = simulated.Languages.correlated(0.98, 0.5)
    topics = [_probe(f"t{n}", f"{k}", "topic") for n in range(400) for k in range(1 + (n < 100))]
    bank = simulated.Bank(topics=(400,), in_two=(100,))
    misses = simulated.topic_misses(bank, languages)(source, users)
    demands = Demands(0.97, {"fire": 0.1}, frozenset({"fire"}), 2 * level, clusters=Clusters.of(topics, {"fire"}))
    passed = simulated.new_rule(bank)(misses, level)
    for row in range(users):
        lost, probes = int(misses.topics[row, 0]), int(misses.probes[row, 0])
        both = probes - lost  # topics missed in both languages; the other missed topics have one language
        outcomes = [True] * 500
        for n in range(both):
            outcomes[2 * n] = outcomes[2 * n + 1] = False
        for n in range(lost - both):
            outcomes[200 + n] = False
        assert demands.test({"fire": [True] * 500}, 1.0, {"fire": outcomes}).passed == passed[row]
    assert 0 < passed.sum() < users

    bank = simulated.Bank(phrasings=300, others=50)
    misses = simulated.phrasing_misses(bank, 0.003, 0.99, 1.0)(source, users)
    new = [_probe("t", f"p{n}", "phrasing", k) for n in range(300) for k in range(2)]
    probes = [*new, *(_probe(f"c{n}", "known", "combination") for n in range(50))]
    demands = Demands(0.97, {"fire": 0.1}, frozenset({"fire"}), 2 * level, clusters=Clusters.of(probes, {"fire"}))
    passed = simulated.new_rule(bank)(misses, level)
    for row, (whole, half) in enumerate(misses.phrasings.tolist()):
        outcomes = [True] * 650
        for n in range(whole):
            outcomes[2 * n] = outcomes[2 * n + 1] = False
        for n in range(whole, whole + half):
            outcomes[2 * n] = False
        assert demands.test({"fire": [True] * 650}, 1.0, {"fire": outcomes}).passed == passed[row]
    assert 0 < passed.sum() < users


def _probe(topic: str, phrasing: str, novelty: str, number: int = 0) -> Probe:
    text = f"{topic} {phrasing} {number}"
    return Probe(text, "fire", text, topic, phrasing, None, "certify", novelty)
