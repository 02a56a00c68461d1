#!/usr/bin/env python3
"""How much a chosen question teaches about a user, against a random one; and how much a tie teaches. One table.

    python scripts/measure_active_choice.py --pool pool.jsonl [--users 60] [--seed 777]

Simulated users whom the basis has not seen compare two answers of the base to a prompt, by their noisy tastes; answers
of equal utility are a tie. The pair is drawn at random, or it is the pair of a random prompt whose answers differ most
(`unlike`), or the one that teaches most about the user's weights: of a random prompt (`pair`), or of all prompts
(`prompt and pair`). The information is that of one choice under the normal posterior, log(1 + p (1 - p) v) / 2 nats for
a margin of variance v (the Laplace approximation; MacKay 1992). Ties are dropped, or count as one choice each way.

Accuracy is noise-free, on 40 to 100 pairs of other prompts, by the posterior's mean. The pool of answers is that of
`benchmark_personalisation.py`. Intervals (95%) are over users.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from benchmark_personalisation import PAIRS, World, accuracy, draw_choices, read_pool
from experiment_table import mean_text
from generate_users import draw_tastes
from jaxtyping import Float, Int
from torch import Tensor

from persona_rlhf.common.files import find
from persona_rlhf.simulation.users import Utility
from persona_rlhf.training.labelled_pairs import text_differences
from persona_rlhf.training.reward_basis import Posterior, RewardBasis, load_basis

COUNTS = (5, 10, 15, 20, 40)
RANDOM = "random"


class Questions(NamedTuple):
    """Pairs of answers to be compared: their texts, prompts by number, and coordinates of first less second answer."""

    texts: list[tuple[str, str]]
    prompts: Int[Tensor, " pairs"]
    differences: Float[Tensor, "pairs rank"]


def questions_of(world: World, basis: RewardBasis) -> Questions:
    """All pairs of answers to the prompts of new users."""
    pairs = [(n, *pair) for n, prompt in enumerate(world.fresh) for pair in combinations(prompt.answers, 2)]
    texts = [(first, second) for _, first, second in pairs]
    return Questions(texts, torch.tensor([n for n, _, _ in pairs]), text_differences(basis, *zip(*texts, strict=True)))


def information(posterior: Posterior, differences: Float[Tensor, "pairs rank"]) -> Float[Tensor, " pairs"]:
    """Nats that a choice is expected to tell about the weights."""
    chance = torch.sigmoid(posterior.margin(differences))
    variance = ((differences @ posterior.covariance) * differences).sum(1)
    return torch.log1p(chance * (1 - chance) * variance) / 2


def evidence(difference: Float[Tensor, " rank"], answer: float, ties: bool) -> list[Float[Tensor, " rank"]]:
    """The differences that a choice adds to the posterior: 1 for the first answer, 0 for the second, 0.5 for a tie."""
    if answer == 0.5:
        return [difference, -difference] if ties else []
    return [difference if answer == 1 else -difference]


Chooser = Callable[[Posterior, Int[Tensor, " pairs"], Random], int]
"""The place of the next question, from the posterior, the places of a random new prompt, and a source of chance."""


def choosers(questions: Questions, asked: set[int]) -> dict[str, Chooser]:
    """The ways to choose; `asked` are the prompts so far."""
    lengths = questions.differences.norm(dim=1)

    def most_informative(posterior: Posterior, *_: object) -> int:
        nats = information(posterior, questions.differences)
        return int(nats.masked_fill(torch.isin(questions.prompts, torch.tensor(sorted(asked))), -1).argmax())

    return {
        RANDOM: lambda posterior, places, rng: rng.choice(places.tolist()),
        "unlike": lambda posterior, places, rng: int(places[lengths[places].argmax()]),
        "pair": lambda posterior, places, rng: int(
            places[information(posterior, questions.differences[places]).argmax()]
        ),
        "prompt and pair": most_informative,
    }


class Curve(NamedTuple):
    """A user's accuracy after each of COUNTS choices, and the number of ties in all."""

    accuracy: list[float]
    ties: int


def curve(taste: Utility, world: World, basis: RewardBasis, questions: Questions, method: str, ties: bool) -> Curve:
    """The choices of one user, one after the other."""
    rng, asked = Random(f"{method} {taste.user_id}"), set[int]()
    test = draw_choices(taste, world.test, 100, Random(f"test {taste.user_id}"))
    tested = text_differences(basis, test.chosen, test.rejected)
    choose, order = choosers(questions, asked)[method], rng.sample(range(len(world.fresh)), len(world.fresh))
    learnt, tied, reached = list[Tensor](), 0, list[float]()
    for count in range(1, COUNTS[-1] + 1):
        posterior = basis.posterior(torch.stack(learnt) if learnt else questions.differences[:0])
        places = (questions.prompts == order[count - 1]).nonzero()[:, 0]
        place = choose(posterior, places, rng)
        asked.add(int(questions.prompts[place]))
        first, second = questions.texts[place]
        answer = float(rng.random() < taste.chance(first, second))
        if math.isclose(taste(first), taste(second), abs_tol=1e-9):
            answer, tied = 0.5, tied + 1
        learnt += evidence(questions.differences[place], answer, ties)
        if count in COUNTS:
            mean = basis.posterior(torch.stack(learnt) if learnt else questions.differences[:0]).mean
            reached.append(accuracy(tested @ mean, test.clean))
    return Curve(reached, tied)


class Simulation(NamedTuple):
    """Unseen users, the world of prompts and answers, the basis, and the questions that the users may get."""

    tastes: Sequence[Utility]
    world: World
    basis: RewardBasis
    questions: Questions


def simulation(description: str | None) -> Simulation:
    """The simulation that the command line of a script asks for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--basis", type=Path, default=find("data/basis/quickstart.safetensors"))
    parser.add_argument("--users", type=int, default=60)
    parser.add_argument("--seed", type=int, default=777)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.pool.exists():
        parser.error(f"{options.pool} does not exist; benchmark_personalisation.py samples it")
    pool = read_pool(options.pool, lambda: None, 0)  # type: ignore[arg-type, return-value]
    basis, world = load_basis(options.basis), World(pool, options.seed)
    tastes = draw_tastes(options.users, pool, PAIRS // 2, options.seed)
    return Simulation(tastes, world, basis, questions_of(world, basis))


def main() -> None:
    tastes, world, basis, questions = simulation(__doc__)
    heads = [f"{count} choices" for count in COUNTS]
    print(f"{len(tastes)} users, {len(world.fresh)} prompts, {len(questions.texts)} pairs\n")
    print(f"| question | ties | {' | '.join(heads)} | 15 chosen less 40 random |\n|{'---|' * (len(COUNTS) + 3)}")
    random = list[float]()
    for ties in (False, True):
        for method in choosers(questions, set()):
            curves = [curve(taste, world, basis, questions, method, ties) for taste in tastes]
            columns = list(zip(*(one.accuracy for one in curves), strict=True))
            random = random or list(columns[-1])
            less = [at - base for at, base in zip(columns[COUNTS.index(15)], random, strict=True)]
            cells = [*map(mean_text, columns), mean_text(less)]
            print(f"| {method} | {'used' if ties else 'dropped'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
