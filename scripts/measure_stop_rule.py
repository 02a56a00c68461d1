#!/usr/bin/env python3
"""The regret of the rule that tells users of the feedback page when to stop. One table.

    python scripts/measure_stop_rule.py --pool pool.jsonl [--users 60] [--seed 777]

Simulated users whom the basis has not seen choose between two answers of the base to random prompts, by their noisy
tastes; ties are dropped. The rule (`training/stopping.py`) stops a user where the expected gain of 20 more choices, on
200 other pairs, falls below a threshold. Accuracy is noise-free on pairs of test prompts.
Regret is the accuracy after 80 choices less that at the stop. Beside it stands the regret of a fixed number of choices:
the mean number at which the rule stopped. Intervals (95%) are over users.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from statistics import fmean, median
from typing import NamedTuple

import torch
from benchmark_personalisation import World, accuracy, draw_choices
from experiment_table import mean_text
from measure_active_choice import Questions, simulation

from persona_rlhf.simulation.users import Utility
from persona_rlhf.training.labelled_pairs import text_differences
from persona_rlhf.training.reward_basis import RewardBasis
from persona_rlhf.training.stopping import expected_gain

MOST = 80
THRESHOLDS = (0.04, 0.02, 0.01, 0.005)
_POOL = 200  # pairs that the rule looks at


class UserPath(NamedTuple):
    """A user's noise-free accuracy and the rule's expected gain after 0 to MOST choices."""

    accuracy: list[float]
    gain: list[float]


def path_of(taste: Utility, world: World, basis: RewardBasis, questions: Questions) -> UserPath:
    """The choices of one user, one after the other."""
    rng = Random(f"stop {taste.user_id}")
    test = draw_choices(taste, world.test, 100, Random(f"test {taste.user_id}"))
    tested = text_differences(basis, test.chosen, test.rejected)
    order = rng.sample(range(len(questions.texts)), len(questions.texts))
    pool = questions.differences[torch.tensor(order[-_POOL:])]
    learnt, reached, gains = list[torch.Tensor](), list[float](), list[float]()
    while True:
        posterior = basis.posterior(torch.stack(learnt) if learnt else questions.differences[:0])
        reached.append(accuracy(tested @ posterior.mean, test.clean))
        gains.append(expected_gain(posterior, pool))
        if len(learnt) == MOST:
            return UserPath(reached, gains)
        first, second = questions.texts[place := order.pop(0)]
        while math.isclose(taste(first), taste(second), abs_tol=1e-9):
            first, second = questions.texts[place := order.pop(0)]
        sign = 1 if rng.random() < taste.chance(first, second) else -1
        learnt.append(sign * questions.differences[place])


def stop_of(gains: Sequence[float], threshold: float) -> int:
    """The number of choices after which the rule stops."""
    return next((n for n, gain in enumerate(gains) if gain < threshold), MOST)


def main() -> None:
    tastes, world, basis, questions = simulation(__doc__)
    paths = [path_of(taste, world, basis, questions) for taste in tastes]
    print(
        f"{len(tastes)} users, {len(questions.texts)} pairs; accuracy after {MOST} choices: "
        f"{mean_text([path.accuracy[-1] for path in paths])}\n"
    )
    print("| threshold | choices: median (least to most) | accuracy at the stop | regret | regret of a fixed number |")
    print("|---|---|---|---|---|")
    for threshold in THRESHOLDS:
        stops = [stop_of(path.gain, threshold) for path in paths]
        fixed = round(fmean(stops))
        at = [path.accuracy[stop] for path, stop in zip(paths, stops, strict=True)]
        regret = [path.accuracy[-1] - value for path, value in zip(paths, at, strict=True)]
        plain = [path.accuracy[-1] - path.accuracy[fixed] for path in paths]
        counts = f"{median(stops):g} ({min(stops)} to {max(stops)})"
        cells = (f"{threshold:g}", counts, mean_text(at), mean_text(regret), f"{fixed}: {mean_text(plain)}")
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
