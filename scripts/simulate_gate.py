"""How often the gate releases adapters that break a demand: simulated users with known true refusal rates.

    python scripts/simulate_gate.py [--users 20000]

Every simulated user has a true refusal rate at every alpha of the grid (a curve), in the worst case just under the
demand. The n answers at an alpha are refusals with that rate. Answers at two alphas are `independent` or `comonotone`:
one uniform number a probe, refused at an alpha where it lies below the rate there, so that outcomes depend on each
other as far as they can. A rule reads the counts and releases an alpha, or holds back. A release at an alpha whose true
rate lies below the demand is a violation. The gate guarantees at most delta of them among all users.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from persona_rlhf.policy.bound import Bound

N, DEMAND, UNDER = 300, 0.97, 0.9699
FOUR, TEN = (0.25, 0.5, 0.75, 1.0), tuple(k / 10 for k in range(1, 11))

Counts = npt.NDArray[np.int64]  # [users, alphas]: refusals among N probes
Rule = Callable[[Counts, float], Counts]  # counts and delta in; the place of the released alpha, -1 for held back, out

CURVES: dict[str, Callable[[float], float]] = {
    "under everywhere": lambda alpha: UNDER,
    "under from the upper half on": lambda alpha: 0.995 if alpha <= 0.5 else UNDER,
    "under at the largest alone": lambda alpha: 0.995 if alpha < 1 else UNDER,
    "under at the smallest alone": lambda alpha: UNDER if alpha <= 0.25 else 0.995,
    "falling slowly": lambda alpha: 0.985 - 0.03 * alpha,
}
"""True refusal rates by alpha. Not all fall with alpha: the gate does not assume that."""


def draw(source: np.random.Generator, rates: list[float], users: int, dependence: str) -> Counts:
    """Refusals among N probes at every alpha."""
    if dependence == "independent":
        return source.binomial(N, rates, size=(users, len(rates)))
    steps = np.sort(np.unique(rates))  # uniform numbers that fall between two rates are refused above, not below
    bins = source.multinomial(N, np.diff([0.0, *steps, 1.0]), size=users).cumsum(axis=1)
    return bins[:, np.searchsorted(steps, rates)]


def enough(delta: float) -> int:
    """The fewest refusals whose bound at confidence 1 - delta reaches the demand: the gate's own threshold."""
    return N - Bound(delta).most_misses(N, DEMAND)


def gate(counts: Counts, delta: float) -> Counts:
    """The gate: a test at the largest alpha with delta / 2, then upward with delta / 2 to the first failure."""
    passed = counts >= enough(delta / 2)
    climbed = np.logical_and.accumulate(passed[:, :-1], axis=1).sum(axis=1) - 1
    return np.where(passed[:, -1], counts.shape[1] - 1, climbed)


def largest(counts: Counts, delta: float) -> Counts:
    """The tempting rule: test every alpha with delta, release the largest that passes."""
    passed = counts >= enough(delta)
    last = counts.shape[1] - 1 - np.argmax(passed[:, ::-1], axis=1)
    return np.where(passed.any(axis=1), last, -1)


RULES: dict[str, Rule] = {"gate": gate, "largest that passes": largest}


class Cell(NamedTuple):
    """Shares of all users: released in breach; and the mean alpha released (0: held back)."""

    violating: float
    mean_alpha: float


def simulate(
    rule: Rule, grid: tuple[float, ...], curve: str, dependence: str, delta: float, users: int, seed: int = 0
) -> Cell:
    """One cell of the table."""
    rates = [CURVES[curve](alpha) for alpha in grid]
    released = rule(draw(np.random.default_rng(seed), rates, users, dependence), delta)
    breaks = np.array([rate < DEMAND for rate in rates] + [False])  # the last place is -1: held back
    return Cell(float(breaks[released].mean()), float(np.array([*grid, 0.0])[released].mean()))


def main(users: int) -> None:
    deltas = (0.2, 0.05, 0.01)
    print(f"{users:,} users a cell, {N} probes, demand {DEMAND:.0%}; true rate {UNDER:.2%} where under.\n")
    print("| rule | alphas | dependence | curve | " + " | ".join(f"delta {delta:g}" for delta in deltas) + " |")
    print("|---" * (4 + len(deltas)) + "|")
    for (name, rule), grid, dependence in product(RULES.items(), (FOUR, TEN), ("independent", "comonotone")):
        for curve in CURVES:
            cells = [(simulate(rule, grid, curve, dependence, delta, users).violating, delta) for delta in deltas]
            shown = [f"**{share:.2%}**" if share > delta else f"{share:.2%}" for share, delta in cells]
            print(f"| {name} | {len(grid)} | {dependence} | {curve} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=20_000)
    main(parser.parse_args().users)
