#!/usr/bin/env python3
"""Whether answers get better as users of the feedback page choose, and their adapters are trained. One table.

    python scripts/measure_feedback_loop.py RUN [--users 24] [--choices 40] [--rounds 2] [--seed 901]

RUN is a finished run of the quickstart; it gets new users, so take a copy. Drawn users whom neither run nor basis has
seen compare the page's own pairs of answers, by their noisy tastes; equal utility is a tie. After a round `collect
--export` and `add` train all of them, and the next pairs come from the released adapters.

Before the first round and after each one, a user's model answers prompts that no round uses, twice each. Wins are the
noise-free share of these answers that are better than those of the stage before to the same prompt, ties counting half.
Users whose adapter was held back take part with what they are served. Intervals (95%) are over users.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from statistics import fmean
from typing import NamedTuple

import torch
from generate_users import SampledPrompt, draw_tastes, sample_pool

from persona_rlhf.config.experiment import read_run_config
from persona_rlhf.data.choice_ledger import CHOICES, ChoiceLedger, Verdict
from persona_rlhf.evaluation.metrics import win_rate
from persona_rlhf.evaluation.statistics import bootstrap
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import load_base
from persona_rlhf.release.results import RunResults
from persona_rlhf.serving.answer_sampler import AnswerSampler
from persona_rlhf.serving.comparisons import AnswerPair
from persona_rlhf.serving.local_engine import local_run
from persona_rlhf.serving.pair_writing import written_pair
from persona_rlhf.serving.policy_filter import PolicyFilter, policy_of_run
from persona_rlhf.simulation.users import Utility

TEST = 20  # prompts of a user that no round uses
LONGEST = 64  # tokens of an answer
AT_ONCE = 24  # users whose answers are sampled together


class Person(NamedTuple):
    """A drawn user, the prompts of each round, and those of the test."""

    taste: Utility
    rounds: list[list[str]]
    test: list[str]


def draw_people(pool: Sequence[SampledPrompt], users: int, choices: int, rounds: int, seed: int) -> list[Person]:
    """Users with prompts of their own kinds, each of which comes once."""
    needed = choices * rounds + TEST
    people = []
    for taste in draw_tastes(users, pool, needed, seed):
        prompts = [one.prompt for one in pool if not taste.prompts or one.kind in taste.prompts]
        drawn = Random(f"{seed} {taste.user_id}").sample(prompts, needed)
        parts = [drawn[TEST + choices * n :][:choices] for n in range(rounds)]
        people.append(Person(taste, parts, drawn[:TEST]))
    return people


def verdict(taste: Utility, comparison: AnswerPair, rng: Random) -> Verdict:
    """A noisy choice; a tie where both answers are worth the same."""
    left, right = comparison.left.text, comparison.right.text
    if taste(left) == taste(right):
        return "tie"
    return "left" if rng.random() < taste.chance(left, right) else "right"


class Loop:
    """The rounds of all users in one run."""

    def __init__(self, run: Path, people: Sequence[Person]) -> None:
        self.run, self.people = run, people
        self.config = read_run_config(run)
        self.policy_filter = PolicyFilter.of(policy_of_run(run, self.config.policy.documents))

    def compared(self, prompts: Sequence[Sequence[str]], candidates: int) -> list[list[AnswerPair]]:
        """The page's pairs for the prompts of each user, from what the user is served at present."""
        config = self.config
        with (
            local_run(self.run, config.judged_base, config.lora, 1 << 30, lambda line: None) as served,
            ThreadPoolExecutor(AT_ONCE) as threads,
        ):
            base = served.access.weights_hash
            sampler = AnswerSampler(served.generator, served.access, self.policy_filter, base, LONGEST, candidates)

            def of_user(number: int) -> list[AnswerPair]:
                user_id = self.people[number].taste.user_id
                return [written_pair(sampler.begin(user_id, prompt)) for prompt in prompts[number]]

            return list(threads.map(of_user, range(len(self.people))))

    def answers(self) -> list[list[str]]:
        """Two answers of each user's model to each of the user's test prompts."""
        pairs = self.compared([person.test for person in self.people], 2)
        return [[text for pair in of_user for text in (pair.left.text, pair.right.text)] for of_user in pairs]

    def choose(self, number: int) -> dict[str, int]:
        """The choices of a round, into the ledger; their verdicts counted."""
        pairs = self.compared([person.rounds[number] for person in self.people], 4)
        verdicts = dict.fromkeys(("left", "right", "tie"), 0)
        ledger = ChoiceLedger(self.run / CHOICES)
        for person, of_user in zip(self.people, pairs, strict=True):
            rng = Random(f"{number} {person.taste.user_id}")
            ledger.record_consent(person.taste.user_id, "own")
            for pair in of_user:
                chosen = verdict(person.taste, pair, rng)
                verdicts[chosen] += 1
                ledger.append(pair.decided(chosen, "", "own"))
        ledger.close()
        return verdicts

    def train(self, number: int) -> None:
        """`collect --export` and `add`."""
        source = self.run / "state" / f"loop-{number}.jsonl"
        for words in (["collect", self.run, "--export", source], ["add", self.run, "--users", source]):
            done = subprocess.run([sys.executable, "-m", "persona_rlhf", *map(str, words)], stdout=subprocess.DEVNULL)
            if done.returncode not in (0, 3):  # 3: finished, and some users are held back
                raise SystemExit(done.returncode)

    def statuses(self) -> dict[str, int]:
        """How many users have which status."""
        names = {person.taste.user_id for person in self.people}
        counts: dict[str, int] = {}
        for result in RunResults(self.run):
            if result.user_id in names:
                counts[result.status] = counts.get(result.status, 0) + 1
        return counts


def wins(people: Sequence[Person], answers: Sequence[list[str]], others: Sequence[list[str]]) -> str:
    """The mean over users of the win rate against other answers, with its interval."""
    rates = [win_rate(p.taste, mine, other) for p, mine, other in zip(people, answers, others, strict=True)]
    shares = [rate.value for rate in rates if rate is not None]
    between = bootstrap(shares)
    return f"{fmean(shares):.3f} ({between.low:.3f} to {between.high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--users", type=int, default=24)
    parser.add_argument("--choices", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=900, help="Prompts that are drawn for all users.")
    parser.add_argument("--seed", type=int, default=901)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = read_run_config(options.run)
    pool = sample_pool(AdaptedModel(load_base(config.judged_base), config.lora), options.prompts, options.seed)
    people = draw_people(pool, options.users, options.choices, options.rounds, options.seed)
    loop = Loop(options.run, people)
    stages = [loop.answers()]
    print(f"{options.users} users, {options.choices} choices a round, {TEST} test prompts, two answers each\n")
    print(
        "| after round | choices with a preference | ties | status | wins against the stage before | against the base |"
    )
    print("|---|---|---|---|---|---|", flush=True)
    for number in range(options.rounds):
        verdicts = loop.choose(number)
        loop.train(number)
        stages.append(loop.answers())
        status = ", ".join(f"{count} {name}" for name, count in sorted(loop.statuses().items()))
        figures = (wins(people, stages[-1], stages[-2]), wins(people, stages[-1], stages[0]))
        preferences = verdicts["left"] + verdicts["right"]
        print(f"| {number + 1} | {preferences} | {verdicts['tie']} | {status} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
