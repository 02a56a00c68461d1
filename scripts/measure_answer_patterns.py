"""Measures how well patterns of choices are recognised: planted ones among simulated users with tastes and noise.

    python scripts/measure_answer_patterns.py

The honest users are the clean users of data/users, each with N of their pairs; the answers are shown in random order. A
quarter of the pairs comes a second time, and is answered by the same taste with the user's rate of noise, drawn anew.
The planted users have the same pairs and one fault: they choose the first answer shown, choose the longer one, or
answer by a coin. Each fault is followed in a share of the choices; the rest is honest. Printed are, for each fault and
N, the share of planted users who are reported for it (recall), and the share of planted users among all users reported
for it (precision; as many honest as planted users). Intervals are Clopper and Pearson's, 95%.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from persona_rlhf.common.files import shipped_root
from persona_rlhf.config.experiment import PatternSettings
from persona_rlhf.data.answer_patterns import answer_patterns
from persona_rlhf.data.pairs import PreferencePair, read_pairs
from persona_rlhf.evaluation.statistics import interval

FAULTS = {"place": "the first answer", "longer": "the longer answer", "changed": "a coin"}
REPEATED = 0.25
CLEAN = ("surface", "manner", "content", "hazard_adjacent")


def judged(
    pairs: Sequence[PreferencePair], fault: str | None, share: float, random: Random
) -> Iterator[PreferencePair]:
    """Pairs as a user with a fault in a share of the choices would answer them; the first answers are honest labels."""
    pairs = list(pairs)
    noise = sum(pair.clean_choice is False for pair in pairs) / len(pairs)
    for again in (False, True):
        for pair in pairs[: round(REPEATED * len(pairs))] if again else pairs:
            better, worse = (pair.chosen, pair.rejected) if pair.clean_choice else (pair.rejected, pair.chosen)
            wrong = random.random() < noise if again else not pair.clean_choice
            chosen, rejected = (worse, better) if wrong else (better, worse)
            first = random.choice((chosen, rejected))
            if fault is not None and random.random() < share:
                choice = {
                    "place": first,
                    "longer": max(better, worse, key=len),
                    "changed": random.choice((better, worse)),
                }
                chosen = choice[fault]
                rejected = worse if chosen == better else better
            place = (1, 2) if chosen == first else (2, 2)
            yield replace(pair, chosen=chosen, rejected=rejected, place=place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[40, 80, 140])
    parser.add_argument("--share", type=float, nargs="+", default=[1.0, 0.9], help="of the choices that are faulty")
    parser.add_argument("--draws", type=int, default=10, help="users drawn anew from each taste")
    options = parser.parse_args()
    files = [shipped_root() / "data" / "users" / f"{name}.jsonl" for name in CLEAN]
    pairs_of: dict[str, list[PreferencePair]] = {}
    for pair in (pair for file in files for pair in read_pairs(Path(file), 0.25)):
        pairs_of.setdefault(pair.user_id, []).append(pair)
    random, settings = Random(0), PatternSettings()
    for n in options.pairs:
        drawn = [random.sample(pairs, n) for pairs in pairs_of.values() for _ in range(options.draws)]
        n_users = len(drawn)
        reported = [answer_patterns(judged(pairs, None, 0.0, random), settings) for pairs in drawn]
        for fault, words in FAULTS.items():
            false = sum(any(one.kind == fault for one in patterns) for patterns in reported)
            for share in options.share:
                planted = [answer_patterns(judged(pairs, fault, share, random), settings) for pairs in drawn]
                true = sum(any(one.kind == fault for one in patterns) for patterns in planted)
                counts = {"recall": (true, n_users), "precision": (true, true + false), "honest": (false, n_users)}
                shares = ", ".join(f"{name} {shown(*count)}" for name, count in counts.items())
                print(f"{n} pairs, {words} in {share:.0%}: {shares}")


def shown(count: int, n: int) -> str:
    """A share with its 95% interval."""
    if n == 0:
        return "none"
    low, high = interval(count, n)[:2]
    return f"{count / n:.2f} ({low:.2f} to {high:.2f}; {count} of {n})"


if __name__ == "__main__":
    main()
