"""Compares two runs over the same clean users, such as one with the constraint on and one with it off.

python scripts/compare_runs.py runs/on runs/off
python scripts/compare_runs.py runs/on runs/off --utilities data/users/utilities.yaml --json

Clean users are those that the utilities call `poisoned: 0` and that both runs released or held back (who is held back
is measured as the base). A user with the population's adapter (`prior`) counts as released and is also counted apart.
Intervals are 95% bootstraps over users, the two runs of a user drawn together. Fewer than eight users have none.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from math import ceil, floor
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import find
from persona_rlhf.evaluation.statistics import FEWEST_OF_INTERVAL, Interval, interval_over_users
from persona_rlhf.release.results import Result, plain, read_results
from persona_rlhf.simulation.users import read_utilities

Gain = Callable[[Result], float | None]


class Ratio(NamedTuple):
    """Mean of A over mean of B, with its interval; None where B's mean is not above zero."""

    value: float | None
    interval: Interval | None


def clean_gain(result: Result) -> float | None:
    """Held-out accuracy on noise-free labels over chance."""
    return None if result.measures.heldout_clean is None else result.measures.heldout_clean.adapted - 0.5


def win_gain(result: Result) -> float | None:
    """Win rate against the base over a tie."""
    return None if result.measures.win_rate is None else result.measures.win_rate.value - 0.5


GAINS: dict[str, Gain] = {"noise-free accuracy - 0.5": clean_gain, "win rate - 0.5": win_gain}


def ratio_of_means(a: Sequence[float], b: Sequence[float], draws: int = 2000, seed: int = 0) -> Ratio:
    """mean(a) / mean(b) over users who stand at the same place of both; the percentile bootstrap draws users.

    Fewer users than `FEWEST_OF_INTERVAL` have no interval.
    """
    if fmean(b) <= 0:
        return Ratio(None, None)
    if len(b) < FEWEST_OF_INTERVAL:
        return Ratio(fmean(a) / fmean(b), None)
    source, places = random.Random(seed), range(len(a))
    drawn = []
    for _ in range(draws):
        users = source.choices(places, k=len(a))
        below = fmean(b[n] for n in users)
        drawn.append(fmean(a[n] for n in users) / below if below > 0 else float("inf"))
    drawn.sort()
    return Ratio(fmean(a) / fmean(b), Interval(drawn[floor(0.025 * (draws - 1))], drawn[ceil(0.975 * (draws - 1))]))


def clean_users(utilities: Path) -> set[str]:
    """Users whose entry says `poisoned: 0`."""
    return {user for user, utility in read_utilities(find(utilities)).items() if utility.poisoned == 0}


def side(results: Sequence[Result]) -> dict[str, Any]:
    """What one run says of the users, on its own."""
    counts = (result.measures.over_refusal for result in results)
    over = [count for count in counts if count is not None and count.n]
    pooled = [r.pooled for r in results if r.pooled is not None and r.pooled.n]
    rates = [count.refused / count.n for count in pooled]
    points = [100 * (count.refused - count.base_refused) / count.n for count in over]
    return {
        "released": sum(r.has_adapter for r in results),
        "prior": sum(r.status == "prior" for r in results),
        "held_back": sum(r.status == "held_back" for r in results),
        "share_at_full_strength": fmean(r.has_adapter and r.alpha == 1 for r in results),
        "over_refusal_points": fmean(points) if points else None,
        "over_refusal_interval": interval_over_users(points),
        "refusal_mean": fmean(rates) if rates else None,
        "refusal_worst": min(rates) if rates else None,
        "alarms": sum(r.alarm for r in results),
    }


def compare(run_a: Path, run_b: Path, utilities: Path) -> dict[str, Any]:
    """Everything that is reported, as plain JSON values; over-refusal in percentage points against the base."""
    clean = clean_users(utilities)
    sides = [{r.user_id: r for r in read_results(run) if r.user_id in clean and r.judged} for run in (run_a, run_b)]
    users = [user for user in sides[0] if user in sides[1]]
    if not users:
        raise SystemExit("the two runs have no clean user in common")
    gains: dict[str, dict[str, Any] | None] = {}
    for name, gain in GAINS.items():
        both = [(gain(sides[0][user]), gain(sides[1][user])) for user in users]
        known = [(a, b) for a, b in both if a is not None and b is not None]
        if not known:
            gains[name] = None
            continue
        a, b = ([pair[n] for pair in known] for n in (0, 1))
        ratio = ratio_of_means(a, b)
        intervals = {
            "a_interval": interval_over_users(a),
            "b_interval": interval_over_users(b),
            "ratio_interval": ratio.interval,
        }
        gains[name] = {"users": len(known), "a": fmean(a), "b": fmean(b), "ratio": ratio.value, **intervals}
    return {
        "a": str(run_a),
        "b": str(run_b),
        "users": len(users),
        "gains": gains,
        **{f"run_{name}": side([found[user] for user in users]) for name, found in zip("ab", sides, strict=True)},
    }


def rendered(found: dict[str, Any]) -> Table:
    """The same for people."""
    title = f"{found['users']} clean users: A = {found['a']}, B = {found['b']}"
    table = Table("what", "A", "B", "A / B (95%)", title=title, title_justify="left")

    def between(interval: Sequence[float] | None, form: str = ".3f") -> str:
        return "" if interval is None else f" ({interval[0]:{form}} to {interval[1]:{form}})"

    for name, gain in found["gains"].items():
        if gain is not None:
            a, b = (f"{gain[run]:.3f}{between(gain[f'{run}_interval'])}" for run in "ab")
            ratio = "" if gain["ratio"] is None else f"{gain['ratio']:.3f}{between(gain['ratio_interval'])}"
            table.add_row(f"mean of {name}", a, b, ratio)
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "released at alpha = 1": lambda run: f"{run['share_at_full_strength']:.1%}",
        "released (with the population's adapter) / held back": lambda run: (
            f"{run['released']} ({run['prior']}) / {run['held_back']}"
        ),
        "over-refusal against the base, points": lambda run: (
            ""
            if run["over_refusal_points"] is None
            else f"{run['over_refusal_points']:+.2f}{between(run['over_refusal_interval'], '+.2f')}"
        ),
        "pooled refusal, mean": lambda run: "" if run["refusal_mean"] is None else f"{run['refusal_mean']:.4f}",
        "pooled refusal, worst user": lambda run: "" if run["refusal_worst"] is None else f"{run['refusal_worst']:.4f}",
        "alarms": lambda run: str(run["alarms"]),
    }
    for name, show in rows.items():
        table.add_row(name, show(found["run_a"]), show(found["run_b"]), "")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_a", type=Path)
    parser.add_argument("run_b", type=Path)
    parser.add_argument("--utilities", type=Path, default=Path("data/users/utilities.yaml"))
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    try:
        found = compare(asked.run_a, asked.run_b, asked.utilities)
    except InputError as fault:
        raise SystemExit(str(fault)) from None
    print(json.dumps(plain(found), indent=2)) if asked.json else Console(width=140).print(rendered(found))


if __name__ == "__main__":
    main()
