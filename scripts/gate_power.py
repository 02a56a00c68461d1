"""The power of the gate: the chance that an adapter passes its first test, by probes and true refusal rate.

    python scripts/gate_power.py                                  # one demand, several numbers of probes
    python scripts/gate_power.py --sequential                     # looks at one bank, and with fresh draws for each
    python scripts/gate_power.py configs/quickstart.yaml          # the demands and probes of a config

A user who fails may still pass at smaller alphas, which only adds to these chances. Binomial and exact; no model is
loaded.
"""

from __future__ import annotations

import argparse
from collections import Counter

import numpy as np
from scipy.stats import binom

from persona_rlhf.config.experiment import read_config
from persona_rlhf.evaluation.gate import Demands, demands_of
from persona_rlhf.evaluation.power import chance_of_passing
from persona_rlhf.evaluation.sequential import BATCH, MOST_DRAWS
from persona_rlhf.evaluation.statistics import bettors_log_wealth
from persona_rlhf.policy.bound import GATE_TESTS, JUDGE_DELTA_SHARE, Bound, look_share
from persona_rlhf.policy.policy import Policy

RATES = (0.95, 0.97, 0.975, 0.98, 0.985, 0.99, 0.995, 0.998, 1.0)


def row(name: str, allowed: int, chances: list[float]) -> str:
    return f"| {name} | {allowed if allowed >= 0 else 'too few'} | " + " | ".join(f"{c:.3f}" for c in chances) + " |"


def table(title: str, rows: list[str]) -> None:
    print(title)
    print("\n| probes | misses allowed | " + " | ".join(f"{rate:.1%}" for rate in RATES) + " |")
    print("|" + "---|" * (len(RATES) + 2))
    print("\n".join(rows), end="\n\n")


def one_demand(min_refusal: float, delta: float) -> None:
    demands = Demands(min_refusal, {"all": 0.0}, frozenset({"all"}), delta)
    rows = []
    for n in (99, 122, 160, 300, 640, 1000, 2000):
        chances = [chance_of_passing(demands, {"all": n}, {"all": rate}) for rate in RATES]
        rows.append(row(f"{n}", demands.bound.most_misses(n, min_refusal), chances))
    table(f"Chance of release at alpha = 1; demand {min_refusal:.1%}, delta {delta:g} (each test {delta / 2:g}):", rows)


def of_config(path: str, overrides: list[str]) -> None:
    config = read_config(path, overrides)
    policy = Policy.of(config.policy, sequential=config.gate.sequential)
    sizes = Counter(probe.category for probe in policy.probes("certify"))
    total = sum(sizes[rule.category] for rule in policy.restrictions if rule.tier == 1)
    rows = []
    for users in (1, 27, 1000):
        for family in ("each", "all") if users > 1 else ("each",):
            demands = demands_of(policy, config.gate.model_copy(update={"family": family}), users)
            chances = [chance_of_passing(demands, sizes, dict.fromkeys(sizes, rate)) for rate in RATES]
            name = f"{total} (family {family}, {users} users)"
            rows.append(row(name, demands.bound.most_misses(total, demands.pooled), chances))
    table(f"{path}: pool and every category together, all at the same true rate:", rows)


def of_looks(topics: int, delta: float, users: int = 2000) -> None:
    """The k-th look at one bank of topics, and of the sequential gate after passes alone, by true rate.

    One demand of 0.97. The sequential gate's draws are simulated; `draws` are those on average until the end of a look.
    """
    rates, rest = (0.98, 0.985, 0.99, 0.995, 0.999), delta * (1 - JUDGE_DELTA_SHARE)
    source = np.random.default_rng(0)
    print(f"Chance of passing a look; demand 97%, delta {delta:g}, {topics} topics, or draws from a private bank:\n")
    print("| look | " + " | ".join(f"{rate:.1%}" for rate in rates) + " |\n|" + "---|" * (len(rates) + 1))
    for look in (1, 5, 20):
        most = Bound(rest * look_share(look) / GATE_TESTS).most_misses(topics, 0.97)
        print(
            f"| {look}, one bank | " + " | ".join(f"{binom.cdf(most, topics, 1 - rate):.3f}" for rate in rates) + " |"
        )
    for failures in (0, 4, 19):
        needed, cells = -np.log(rest * look_share(failures + 1) / GATE_TESTS), []
        for rate in rates:
            refused, passed, ended = np.zeros(users, int), np.zeros(users, bool), np.full(users, float(MOST_DRAWS))
            for drawn in range(BATCH, MOST_DRAWS + 1, BATCH):
                refused += source.binomial(BATCH, rate, size=users)
                logs = [
                    bettors_log_wealth(int(r), drawn, 0.97) if not p else 0.0
                    for r, p in zip(refused, passed, strict=True)
                ]
                now = ~passed & (np.array(logs) >= needed)
                ended[now], passed = drawn, passed | now
                if passed.all():
                    break
            cells.append(f"{passed.mean():.3f} ({ended.mean():,.0f})")
        print(f"| any, sequential, {failures} failures before (draws) | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--sequential", action="store_true")
    options = parser.parse_args()
    if options.sequential:
        of_looks(977, 0.05)
        raise SystemExit
    one_demand(0.97, 0.05)
    if options.config:
        of_config(options.config, options.overrides)
