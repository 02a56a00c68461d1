"""Asks whether imported pairs of real people hold a signal: can a person's words tell their answers from another's?

persona-rlhf data import chitchat WHEEL pairs.jsonl && python scripts/measure_chitchat.py pairs.jsonl

For each person a naive Bayes classifier of words is counted on the train pairs: the words of chosen answers against
those of rejected ones. It ranks the two answers of every held-out pair, without the prompt; a tie is half a success.
Printed is the mean over people with its 95% bootstrap interval over people, from eight on. Beside it stand three
controls: the classifier of the next person in the file, the one of all other people together, and the longer answer.
Chance is 0.5.
The one of all others is a little below it by design: a person's train answers are rejected ones in pairs of others.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from experiment_table import mean_text

from persona_rlhf.data.pairs import PreferencePair, read_pairs
from persona_rlhf.policy.judges import plain

Score = Callable[[str], float]


class WordCounts:
    """The numbers of chosen and of rejected answers that hold a word."""

    def __init__(self, pairs: Iterable[PreferencePair] = ()) -> None:
        self.chosen, self.rejected = Counter[str](), Counter[str]()
        for pair in pairs:
            self.chosen.update(set(plain(pair.chosen).split()))
            self.rejected.update(set(plain(pair.rejected).split()))

    def without(self, other: WordCounts) -> WordCounts:
        """The counts without those of some of the pairs."""
        rest = WordCounts()
        rest.chosen, rest.rejected = self.chosen - other.chosen, self.rejected - other.rejected
        return rest

    def score(self, text: str) -> float:
        """The log odds of an answer's words; each is counted once more on both sides."""
        words = sorted(set(plain(text).split()))
        return sum(math.log((self.chosen[word] + 1) / (self.rejected[word] + 1)) for word in words)


def accuracy(pairs: Iterable[PreferencePair], score: Score) -> float:
    """The share of pairs whose chosen answer has the higher score; a tie is half a success."""
    scores = [(score(pair.chosen), score(pair.rejected)) for pair in pairs]
    return statistics.fmean((chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--least", type=int, nargs="+", default=[50, 100, 500], help="pairs that a person has")
    options = parser.parse_args()
    people: dict[str, dict[str, list[PreferencePair]]] = {}
    for pair in read_pairs(options.pairs, 0.25):
        people.setdefault(pair.user_id, {"train": [], "heldout": []})[pair.split].append(pair)
    everyone = WordCounts(pair for person in people.values() for pair in person["train"])
    for least in options.least:
        chosen = [p for p in people.values() if len(p["train"]) + len(p["heldout"]) >= least and all(p.values())]
        if len(chosen) < 2:
            print(f"{len(chosen)} people with {least} pairs or more and both splits: too few to compare")
            continue
        counts = [WordCounts(person["train"]) for person in chosen]
        rows: dict[str, list[Score]] = {
            "the person's words": [each.score for each in counts],
            "the next person's words": [each.score for each in (*counts[1:], *counts[:1])],
            "all other people's words": [everyone.without(each).score for each in counts],
            "the longer answer": [len] * len(counts),
        }
        held = sum(len(person["heldout"]) for person in chosen)
        print(f"{len(chosen)} people with {least} pairs or more and both splits, {held:,} held-out pairs")
        for name, scores in rows.items():
            shares = [accuracy(person["heldout"], score) for person, score in zip(chosen, scores, strict=True)]
            print(f"| {name} | {mean_text(shares)} |")


if __name__ == "__main__":
    main()
