"""How often a certificate in service lapses: of adapters that keep the demand, and of those that do not; how soon.

    python scripts/simulate_lifetimes.py [--lifetimes 4000] [--requests 20000] [--json]

Each simulated life is a sequence of judged requests, each refused with a chance that its row names. The e-process is
that of `evaluation.lifetime`, computed for all lives at once; 20 lives of each row also go through `BreachProcess`, and
must lapse at the same request. The exit code is 1 where they do not, where the 95% lower limit (Clopper-Pearson) of the
lapses of adapters that keep the demand lies above delta, or where the planted fault is not caught.

The fixed test asks n requests once, and rejects by the exact binomial test at level delta. Its column is the smallest n
at which it rejects with the chance that the row's share of lapses has. The planted fault is that test, looked at after
every request.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from math import ceil, floor, sqrt
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from persona_rlhf.evaluation.lifetime import STAKES, BreachProcess
from persona_rlhf.evaluation.statistics import interval
from persona_rlhf.policy.bound import tail

DEMAND, DELTA, KEPT = 0.97, 0.05, 0.99
THROUGH_PROCESS = 20

Flags = npt.NDArray[np.bool_]
Rates = Callable[[int, Flags], "float | npt.NDArray[np.float64]"]
"""The chance of a refusal at request n (from 0) of each life, given whether its last request was refused."""


class Row(NamedTuple):
    """The lives of one kind. `within` is the number of requests until lapse, by quantile, with a 95% interval each."""

    name: str
    kept: bool
    lapsed: int
    lives: int
    within: dict[float, tuple[float, float, float]]
    fixed: dict[float, int]
    disagreements: int = 0
    wrong: bool = False

    @property
    def as_it_should(self) -> bool:
        above = self.kept and interval(self.lapsed, self.lives).low > DELTA
        return above == self.wrong and not self.disagreements


def outcomes(source: np.random.Generator, lives: int, requests: int, rates: Rates) -> Flags:
    """Whether each request of each life was refused, [requests, lives]."""
    refused, last = np.empty((requests, lives), bool), np.ones(lives, bool)
    for n in range(requests):
        last = refused[n] = source.random(lives) < rates(n, last)
    return refused


def lapses(refused: Flags) -> npt.NDArray[np.float64]:
    """The number of requests until each life lapses by the e-process; inf where it does not."""
    lives = refused.shape[1]
    stakes, gain = np.array(STAKES)[:, None], 1 / (1 - DEMAND)
    wealths, at = np.zeros((len(STAKES), lives)), np.full(lives, np.inf)
    for n, row in enumerate(refused):
        wealths += 1 / ((n + 1) * (n + 2))
        wealths *= 1 - stakes + stakes * np.where(row, 0.0, gain)
        reached = wealths.sum(0) / len(STAKES) + 1 / (n + 2) >= 1 / DELTA
        at[reached & np.isinf(at)] = n + 1
        wealths[:, reached] = 0.0  # the life is over
    return at


def peeked(refused: Flags) -> npt.NDArray[np.float64]:
    """The planted fault: the fixed test after every request, as if it were the only one."""
    lives, at, missed = refused.shape[1], np.full(refused.shape[1], np.inf), np.zeros(refused.shape[1], np.int64)
    fewest = 1
    for n, row in enumerate(refused, 1):
        missed += ~row
        while tail(fewest, n, 1 - DEMAND) > DELTA if fewest <= n else False:
            fewest += 1
        at[(missed >= fewest) & np.isinf(at)] = n
    assert at.shape == (lives,)
    return at


def through_process(refused: Flags) -> float:
    """The lapse of one life by `BreachProcess`."""
    process = BreachProcess()
    for outcome in refused:
        process = process.after(bool(outcome), DEMAND)
        if process.e_value >= 1 / DELTA:
            return float(process.n)
    return float("inf")


def quantile(at: npt.NDArray[np.float64], share: float) -> tuple[float, float, float]:
    """A quantile of the requests until lapse, with the 95% interval by order statistics."""
    ordered, n = np.sort(at), len(at)
    spread = 1.96 * sqrt(n * share * (1 - share))
    places = ceil(share * n) - 1, floor(share * n - spread) - 1, ceil(share * n + spread)
    value, low, high = (float(ordered[min(n - 1, max(0, place))]) for place in places)
    return value, low, high


def fixed_size(rate: float, power: float, most: int = 50_000) -> int:
    """The fewest requests at which the fixed test rejects with this chance; `most` where it takes more."""
    fewest = 1
    for n in range(1, most):
        while fewest <= n and tail(fewest, n, 1 - DEMAND) > DELTA:
            fewest += 1
        if fewest <= n and tail(fewest, n, 1 - rate) >= power:
            return n
    return most


def row(name: str, rates: Rates, lives: int, requests: int, breach: float | None = None, start: int = 0) -> Row:
    """One kind of life; `breach` is the rate of refusals after `start` requests, None where the demand is kept."""
    refused = outcomes(np.random.default_rng(7), lives, requests, rates)
    at = lapses(refused)
    disagreements = sum(through_process(refused[:, life]) != at[life] for life in range(THROUGH_PROCESS))
    at = np.maximum(at - start, 0.0)
    shares = () if breach is None else (0.5, 0.9)
    within = {share: quantile(at, share) for share in shares}
    fixed = {share: fixed_size(breach, share) for share in shares} if breach is not None else {}
    return Row(name, breach is None, int(np.isfinite(at).sum()), lives, within, fixed, disagreements)


def table(lives: int, requests: int) -> list[Row]:
    """All rows."""

    def constant(rate: float) -> Rates:
        return lambda _, __: rate

    def after(kept: int, rate: float) -> Rates:
        return lambda n, _: KEPT if n < kept else rate

    def chosen(_: int, last: Flags) -> npt.NDArray[np.float64]:
        return np.where(last, DEMAND, 1.0)

    rows = [
        row(f"keeps the demand: {DEMAND:g}", constant(DEMAND), lives, requests),
        row("... 0.98", constant(0.98), lives, requests),
        row("... 0.97 after 1,000 requests at 0.99", after(1_000, DEMAND), lives, requests),
        row("... 0.97 after a refusal, 1 after a miss (a user who chooses)", chosen, lives, requests),
    ]
    for rate in (0.95, 0.9, 0.8):
        rows.append(row(f"breaks it: {rate:g}", constant(rate), lives, requests, rate))
        rows.append(row(f"... {rate:g} after 1,000 requests at 0.99", after(1_000, rate), lives, requests, rate, 1_000))
    at = peeked(outcomes(np.random.default_rng(8), lives, requests, constant(DEMAND)))
    name = f"wrong: the fixed test after every request, {DEMAND:g}"
    return [*rows, Row(name, True, int(np.isfinite(at).sum()), lives, {}, {}, wrong=True)]


def shown(one: Row) -> str:
    low, high = interval(one.lapsed, one.lives)
    cells = [one.name, f"{one.lapsed / one.lives:.2%} ({low:.2%} to {high:.2%})"]
    for share in (0.5, 0.9):
        if share in one.within:
            value, least, most = one.within[share]
            cells += [f"{value:,.0f} ({least:,.0f} to {most:,.0f})", f"{one.fixed[share]:,}"]
        else:
            cells += ["", ""]
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lifetimes", type=int, default=4_000)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = table(options.lifetimes, options.requests)
    if options.json:
        report: list[dict[str, Any]] = [one._asdict() | {"as_it_should": one.as_it_should} for one in rows]
        print(json.dumps(report, indent=2))
    else:
        print(f"{options.lifetimes:,} lives of {options.requests:,} judged requests, delta {DELTA:g}")
        print("| Adapter refuses | ever lapsed (95%) | half have lapsed after | fixed test | 90% after | fixed test |")
        print("|---|---|---|---|---|---|")
        print("\n".join(map(shown, rows)))
    return 0 if all(one.as_it_should for one in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
