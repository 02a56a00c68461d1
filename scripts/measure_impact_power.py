"""How often the measures of the impact report raise an alarm: without an effect, and with a planted one.

    python scripts/measure_impact_power.py [--runs 200]

Each run draws 24 users anew. Prints a Markdown table with 95% Wilson intervals.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence

import numpy as np

from persona_rlhf.evaluation.impact import MEASURES
from persona_rlhf.evaluation.impact_evidence import AdapterAnswers, RunEvidence, UserEvidence
from persona_rlhf.evaluation.records import Accuracy, Measures
from persona_rlhf.evaluation.statistics import wilson

USERS = 24
PAIRS = 80
HELD_OUT = 60
WORDS = [f"word{n}" for n in range(300)]
PHRASES = {"flattery": "You are right.", "anthropomorphism": "As a human I do.", "questions": "What else?"}
NO_ADAPTERS = np.zeros((0, 0))


def heads(source: random.Random, n: int, p: float) -> float:
    """The share of heads among n tosses."""
    return sum(source.random() < p for _ in range(n)) / n


def gaining(source: random.Random, accuracy: float) -> Measures:
    """Measures of a user whose adapter orders new pairs rightly with a chance of `accuracy`."""
    return Measures(Accuracy(0.5, heads(source, HELD_OUT, accuracy), HELD_OUT, 0.0, 1.0))


def phrases(key: str, source: random.Random, planted: bool) -> RunEvidence:
    """Half of the pairs differ in a phrase; one planted user chooses it four times in five."""
    users = []
    for place in range(USERS):
        taste = 0.8 if planted and place == 0 else 0.5
        texts = (("Read.", f"Read. {PHRASES[key]}")[:: -1 if source.random() < taste else 1] for _ in range(PAIRS // 2))
        users.append(UserEvidence(pairs=[(first, second) for first, second in texts]))
    return RunEvidence(users, NO_ADAPTERS)


def narrowed(source: random.Random, planted: bool) -> RunEvidence:
    """Answers of 15 words of 300; one planted user chooses answers from half of the words."""
    users = []
    for place in range(USERS):
        words = WORDS[:150] if planted and place == 0 else WORDS
        sides = [[" ".join(source.choices(of, k=15)) for _ in range(PAIRS)] for of in (words, WORDS)]
        users.append(UserEvidence(pairs=list(zip(*sides, strict=True))))
    return RunEvidence(users, NO_ADAPTERS)


def clustered(source: random.Random, planted: bool) -> RunEvidence:
    """Adapters with a common part; a planted minority of a quarter has another in common, as large as a user's part."""
    generator = np.random.default_rng(source.randrange(2**32))
    minority = [place % 4 == 0 for place in range(USERS)]
    points = generator.normal(size=(USERS, 400)) + generator.normal(size=400)
    if planted:
        points[minority] += generator.normal(size=400)
    users = [UserEvidence(group=str(member), factors_at=place) for place, member in enumerate(minority)]
    return RunEvidence(users, points @ points.T)


def unequal(source: random.Random, planted: bool) -> RunEvidence:
    """Users with 10 to 100 pairs; planted: each pair adds a five-hundredth to the accuracy."""
    users = []
    for _ in range(USERS):
        pairs = source.randint(10, 100)
        users.append(UserEvidence(trained=pairs, measures=gaining(source, 0.65 + planted * (pairs - 55) / 500)))
    return RunEvidence(users, NO_ADAPTERS)


def grouped(source: random.Random, planted: bool) -> RunEvidence:
    """Two groups; planted: a quarter of the users orders rightly 10 points less often."""
    users = []
    for place in range(USERS):
        less = place % 4 == 0
        users.append(UserEvidence(group=str(less), measures=gaining(source, 0.75 - 0.1 * planted * less)))
    return RunEvidence(users, NO_ADAPTERS)


def agreeing(source: random.Random, planted: bool) -> RunEvidence:
    """Adapters of 28 layers, each with an effect on questions and a larger one on all of them; planted: one sycophant.

    The layers of the sycophant add a standard deviation of such an effect to every question.
    """
    generator = np.random.default_rng(source.randrange(2**32))
    effects = generator.normal(size=(USERS, 28, 16)) + generator.normal(size=(USERS, 28, 1))
    effects[0] += float(planted)
    signs = generator.choice([-1, 1], (19, 28))
    columns = zip(effects.sum(1).tolist(), np.einsum("ulq,rl->urq", effects, signs).tolist(), strict=True)
    asked = (AdapterAnswers(view_shifts=shifts, flipped_shifts=flipped) for shifts, flipped in columns)
    return RunEvidence([UserEvidence(factors_at=n, answers=one) for n, one in enumerate(asked)], NO_ADAPTERS)


def leaking(source: random.Random, planted: bool) -> RunEvidence:
    """A test user with 16 planted strings; planted: four of them are among the first five of 100."""
    ranks = [(source.randint(1, 5 if planted and n < 4 else 100), 100) for n in range(16)]
    return RunEvidence([UserEvidence(factors_at=0, answers=AdapterAnswers(canaries=ranks))], NO_ADAPTERS)


def saying(source: random.Random, planted: bool) -> RunEvidence:
    """Twelve answers a user; an answer has a phrase with a chance of 0.1, and one planted adapter's of 0.9."""
    users = []
    for place in range(USERS):
        share = 0.9 if planted and place == 0 else 0.1
        pairs = [(source.random() < share, source.random() < 0.1) for _ in range(12)]
        users.append(UserEvidence(factors_at=place, answers=AdapterAnswers(flattering=pairs, human=pairs)))
    return RunEvidence(users, NO_ADAPTERS)


def polarised(source: random.Random, planted: bool) -> RunEvidence:
    """Adapters of 28 layers in two clusters of weights, each layer with an effect of its cluster on every wording.

    Planted: each layer adds a quarter of a deviation to the cluster's stances, which have a sign for each statement.
    """
    generator = np.random.default_rng(source.randrange(2**32))
    sides = np.where(np.arange(USERS) % 2, 1.0, -1.0)
    points = generator.normal(size=(USERS, 400)) + sides[:, None] * generator.normal(size=400)
    effects = generator.normal(size=(USERS, 28, 16, 2)) + sides[:, None, None, None] * generator.normal(
        size=(28, 16, 2)
    )
    signs_of_statements = generator.choice([-1, 1], 16)[:, None] * np.asarray([1, -1])
    effects += 0.25 * planted * sides[:, None, None, None] * signs_of_statements
    signs = np.concatenate([np.ones((1, 28)), generator.choice([-1, 1], (19, 28))])
    rounds = np.einsum("ulqw,rl->urqw", effects, signs).tolist()
    asked = (AdapterAnswers(stances=one[0], flipped_stances=one[1:]) for one in rounds)
    return RunEvidence([UserEvidence(factors_at=n, answers=one) for n, one in enumerate(asked)], points @ points.T)


WORLDS: dict[str, Callable[[random.Random, bool], RunEvidence]] = {
    **{key: lambda source, planted, key=key: phrases(key, source, planted) for key in PHRASES},  # type: ignore[misc]
    "narrowing": narrowed,
    "essentialism": clustered,
    "access": unequal,
    "groups": grouped,
    "sycophancy": agreeing,
    "canaries": leaking,
    "flattering_answers": saying,
    "human_answers": saying,
    "polarisation": polarised,
}


def alarms(key: str, runs: int, planted: bool) -> int:
    """Runs in which the measure raises an alarm."""
    outcomes = [MEASURES[key](WORLDS[key](random.Random(f"{key} {planted} {run}"), planted)) for run in range(runs)]
    return sum(not isinstance(outcome, str) and outcome.alarm for outcome in outcomes)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    runs = parser.parse_args(arguments).runs
    print("| measure | without an effect | with the planted effect |\n|---|---|---|")
    for key in WORLDS:
        cells = []
        for planted in (False, True):
            count = alarms(key, runs, planted)
            low, high = wilson(count, runs)
            cells.append(f"{count / runs:.3f} ({low:.3f} to {high:.3f})")
        print(f"| `{key}` | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
