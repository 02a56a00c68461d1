#!/usr/bin/env python3
"""Personalisation from few pairs on simulated users: one protocol for rewards and for adapters, one JSON line a cell.

    python scripts/benchmark_personalisation.py rewards cells.jsonl --pool pool.jsonl --seeds 0 1 2
    python scripts/benchmark_personalisation.py adapters cells.jsonl --pool pool.jsonl
    python scripts/benchmark_personalisation.py table cells.jsonl

`rewards`: a population of users with drawn tastes (`--population`) and other users (`--users`), on three disjoint sets
of prompts: for the population, for a new user's N pairs, and for the test. `adapters`: the 24 clean users of
data/users, whose prompts are not in the pool. The basis is fitted on a population, or read (`--basis`); each user's
posterior labels pairs of answers to prompts of the pool, and the adapter is trained on the real pairs and on those, by
the shipped engine.

Accuracy is noise-free: the share of test pairs whose truly better answer gets the higher reward. Win rate: the share of
sampled answers to held-out prompts that are truly better than the base's, ties counting half. The pool (prompts with
four answers of the base each) is sampled once and kept in `--pool`. A cell that is in the file is not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, islice, pairwise, product
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, NamedTuple

import torch
from experiment_table import mean_text
from generate_users import SampledPrompt, differing, draw_prompts, draw_tastes, sample
from jaxtyping import Float
from reward_rivals import agreed, fit_prototypes, flipped
from torch import Tensor

from persona_rlhf.common.files import atomic_write, find
from persona_rlhf.config.training import BaseSettings, DpoSettings, FleetSettings, LoraSettings, TopLayers
from persona_rlhf.data.pairs import Message, PreferencePair
from persona_rlhf.data.tokenize import Row, UserRows, tokenize
from persona_rlhf.evaluation.metrics import (
    Samples,
    clean_accuracy,
    distinct_prompts,
    score_pairs,
    score_pairs_of_base,
    win_rate,
)
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import load_base
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.simulation.users import Utility, properties, read_utilities
from persona_rlhf.training.answer_features import BUCKETS, scaled_features
from persona_rlhf.training.cache import Reference, rows_ahead
from persona_rlhf.training.engine import Engine
from persona_rlhf.training.labelled_pairs import AnswerPool, answer_pool, with_labels
from persona_rlhf.training.reward_basis import (
    Population,
    Posterior,
    Prior,
    RewardBasis,
    approximate,
    fit_basis,
    laplace,
    load_basis,
)

COUNTS = (0, 1, 3, 5, 10, 20, 40, 80)
POISONED = (0, 5, 20, 80)  # pairs of users whose basis was fitted on a poisoned population
PAIRS, TEST, LEAST_TEST = 80, 100, 40
SPARE = 1.25  # some drawn users have too few prompts where their taste shows
SHARES = (0.3, 0.4, 0.3)  # of the pool's prompts: the population's, the new users' pairs, the test
RIDGES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)  # prior variances of individual rewards
TUNED = 40  # users on which the variance is chosen; none of them is reported
TRIES = 3  # answers of the pool, of which the user's reward picks one, against a further answer
WON = 200  # prompts of the pool on which that is judged
DPO = DpoSettings(learning_rate=4e-3)  # plain DPO of 80 pairs, as before there was a basis
LORA = LoraSettings(layers=TopLayers(top=0.25))
SHIPPED = DpoSettings(learning_rate=1e-2, epochs=1, beta=0.3)  # as configs/quickstart.yaml
LABELLED = 160  # pairs of the base's answers that the posterior labels


class Choices(NamedTuple):
    """A user's choices: texts of chosen and rejected answers, and the label's agreement with the taste."""

    chosen: list[str]
    rejected: list[str]
    clean: list[bool]


class Cells:
    """The file of results; a line a cell, which its `key` names."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def missing(self, **key: Any) -> bool:
        """Whether no line has these values."""
        return not any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def add(self, **row: Any) -> None:
        """Appends a line and prints it, lists as their means."""
        self.rows.append(row)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        print({name: round(fmean(v), 3) if isinstance(v, list) else v for name, v in row.items()}, flush=True)


def users_rows() -> list[dict[str, Any]]:
    """The rows of data/users."""
    files = sorted(find("data/users").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def read_pool(file: Path, adapted: Callable[[], AdaptedModel], prompts: int) -> list[SampledPrompt]:
    """Prompts that are in no file of data/users, with different answers of the base; sampled if there is no file."""
    if not file.exists():
        used = {row["prompt"] for row in users_rows()}
        drawn = [p for seed in (23, 24) for p in draw_prompts(prompts // 2, seed)]
        fresh = [prompt for prompt in dict.fromkeys(drawn) if prompt[0] not in used]
        answers = sample(adapted(), [text for text, _ in fresh], 23)
        pool = [(*prompt, texts) for prompt, texts in zip(fresh, answers, strict=True)]
        kept = [row for row in pool if len(row[2]) > 1 and not any(map(is_refusal, row[2]))]
        atomic_write(file, "".join(json.dumps(row) + "\n" for row in kept))
    rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    return [SampledPrompt(prompt, kind, tuple(answers)) for prompt, kind, answers in rows]


def draw_choices(taste: Utility, pool: Sequence[SampledPrompt], count: int, rng: Random) -> Choices:
    """A user's noisy choices; a prompt comes again, with other answers, only when all others were used."""
    choices, seen = Choices([], [], []), set[tuple[str, frozenset[str]]]()
    for prompt, first, second in (pair for _ in range(4) for pair in differing(taste, pool, rng)):
        key = prompt, frozenset((first, second))
        if key in seen or len(choices.chosen) == count:
            continue
        seen.add(key)
        chosen, rejected = (first, second) if rng.random() < taste.chance(first, second) else (second, first)
        choices.chosen.append(chosen)
        choices.rejected.append(rejected)
        choices.clean.append(taste.compare(chosen, rejected) == 1)
    return choices


class World:
    """The pool's answers with their features, in three disjoint sets of prompts."""

    def __init__(self, pool: Sequence[SampledPrompt], seed: int) -> None:
        self.pool = list(pool)
        order = Random(f"{seed} prompts").sample(self.pool, len(self.pool))
        first, second = int(SHARES[0] * len(order)), int((SHARES[0] + SHARES[1]) * len(order))
        self.shared, self.fresh, self.test = order[:first], order[first:second], order[second:]
        self.texts = list(dict.fromkeys(answer for prompt in self.pool for answer in prompt.answers))
        self.place = {text: number for number, text in enumerate(self.texts)}
        self.features = scaled_features(self.texts)
        self.rows = self.features(self.texts)

    def population(self, tastes: Sequence[Utility], seed: int) -> Population:
        """The choices of users on the population's prompts."""
        choices = [draw_choices(t, self.shared, PAIRS, Random(f"{seed} shared {t.user_id}")) for t in tastes]
        return Population(
            self.rows,
            torch.tensor([self.place[text] for user in choices for text in user.chosen]),
            torch.tensor([self.place[text] for user in choices for text in user.rejected]),
            torch.tensor([number for number, user in enumerate(choices) for _ in user.chosen]),
            tuple(taste.user_id for taste in tastes),
        )

    def differences(self, values: Float[Tensor, "answers width"], choices: Choices) -> Float[Tensor, "pairs width"]:
        """Values of the chosen answers less those of the rejected ones."""
        first, second = ([self.place[text] for text in texts] for texts in (choices.chosen, choices.rejected))
        return values[first] - values[second]


class NewUser(NamedTuple):
    """A user whom no basis has seen: choices to learn from, and test choices."""

    learnt: Choices
    test: Choices


def accuracy(margins: Float[Tensor, " pairs"], clean: Sequence[bool]) -> float:
    """The share of pairs whose truly better answer has the higher reward; ties count half."""
    sign = torch.where(torch.tensor(clean), 1.0, -1.0)
    return float((torch.sign(margins.cpu() * sign) + 1).mean() / 2)


def ridge_margins(
    learnt: Float[Tensor, "pairs width"], test: Float[Tensor, "tests width"], variance: float
) -> Float[Tensor, " tests"]:
    """Rewards of a logistic regression with a normal prior; its weights lie in the span of the pairs."""
    if not len(learnt):
        return torch.zeros(len(test))
    span = torch.linalg.qr(learnt.double().T).Q
    inside = learnt.double() @ span
    zeros = torch.zeros(inside.shape[1], dtype=torch.float64)
    mode = laplace(inside[None], zeros, torch.full((1, inside.shape[1]), variance, dtype=torch.float64)).mean[0]
    return test.double() @ (span @ mode)


def measure_rewards(cells: Cells, pool: Sequence[SampledPrompt], seed: int, options: argparse.Namespace) -> None:
    """One seed: population, new users, and every reward at every number of pairs."""
    world, setting = World(pool, seed), {"seed": seed, "population": options.population}
    tastes = draw_tastes(options.population + round(SPARE * (options.users + TUNED)), pool, PAIRS, seed + 1000)
    population = world.population(tastes[: options.population], seed)
    started = time.process_time()
    basis = fit_basis(world.features, population, seed=seed)
    fitted = time.process_time() - started
    print(f"seed {seed}: {basis.directions.shape[1]} directions, scale {basis.prior.scale}, {fitted:.0f} CPU-seconds")
    people = []
    for taste in tastes[options.population :]:
        rng = Random(f"{seed} new {taste.user_id}")
        learnt, test = (draw_choices(taste, part, n, rng) for part, n in ((world.fresh, PAIRS), (world.test, TEST)))
        if len(learnt.chosen) == PAIRS and len(test.chosen) >= LEAST_TEST:
            people.append(NewUser(learnt, test))
    tuned, unseen = people[:TUNED], people[TUNED : TUNED + options.users]
    truth = torch.tensor([list(properties(text).values()) for text in world.texts], dtype=torch.float64)
    truth = truth / truth.std(0).clamp_min(1e-9)
    words = world.rows[:, -BUCKETS:]
    spaces = {"ridge on the features": world.rows, "bag of words": words}
    pooled, prototypes = population_margin(population, world.rows), fit_prototypes(population, seed=seed)

    def individual(rows: Tensor, variance: float) -> Callable[[NewUser, int], Tensor]:
        def margins(user: NewUser, count: int) -> Tensor:
            learnt = world.differences(rows, user.learnt)[:count]
            return ridge_margins(learnt, world.differences(rows, user.test), variance)

        return margins

    def best(rows: Tensor) -> float:
        def score(variance: float) -> float:
            method = individual(rows, variance)
            return fmean(accuracy(method(user, 40), user.test.clean) for user in tuned)

        return max(RIDGES, key=score)

    def shared(basis: RewardBasis) -> Callable[[NewUser, int], Tensor]:
        coordinates = basis.coordinates(world.rows)
        return lambda user, count: basis.posterior(world.differences(coordinates, user.learnt)[:count]).margin(
            world.differences(coordinates, user.test)
        )

    methods: dict[str, Callable[[NewUser, int], Tensor]] = {
        "population": lambda user, count: world.differences(pooled[:, None], user.test)[:, 0],
        "prototypes": lambda user, count: prototypes.margins(
            world.differences(world.rows, user.learnt)[:count], world.differences(world.rows, user.test)
        ),
        **{name: individual(rows, best(rows)) for name, rows in spaces.items()},
        "reward basis": shared(basis),
        "true properties": lambda user, count: (
            world.differences(truth, user.test)
            @ approximate(
                world.differences(truth, user.learnt)[None, :count], Prior(torch.zeros(truth.shape[1]).double(), 0.2)
            ).mean[0]
        ),
    }
    for name, method in methods.items():
        for count in COUNTS[:1] if name == "population" else COUNTS:
            if cells.missing(part="rewards", **setting, method=name, pairs=count):
                started = time.process_time()
                values = [round(accuracy(method(user, count), user.test.clean), 4) for user in unseen]
                seconds = round((time.process_time() - started) / len(unseen), 5)
                row = {"accuracy": values, "seconds": seconds}
                cells.add(part="rewards", **setting, method=name, pairs=count, **row)
    measure_calibration(cells, world, basis, unseen, setting)
    for attack, share in product((flipped, agreed), options.poisoned):
        name = f"reward basis, {share:.0%} of its users {attack.__name__}"
        missing = [n for n in POISONED if cells.missing(part="rewards", **setting, method=name, pairs=n)]
        if missing:
            method = shared(fit_basis(world.features, attack(population, share, seed), seed=seed))
            for count in missing:
                values = [round(accuracy(method(user, count), user.test.clean), 4) for user in unseen]
                cells.add(part="rewards", **setting, method=name, pairs=count, accuracy=values)


def population_margin(population: Population, rows: Float[Tensor, "answers width"]) -> Float[Tensor, " answers"]:
    """Rewards of one logistic regression over the pairs of all users: the same for everybody."""
    weights = torch.zeros(rows.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        rewards = rows @ weights
        margins = rewards[population.chosen] - rewards[population.rejected]
        value = torch.nn.functional.softplus(-margins).sum() + 50 * weights.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return rows @ weights.detach()


def measure_calibration(
    cells: Cells, world: World, basis: RewardBasis, people: Sequence[NewUser], setting: dict[str, int]
) -> None:
    """Mean predicted probability of the preferred answer, and the share of (noisy) test choices that agree, by bin."""
    coordinates = basis.coordinates(world.rows)
    for count in (5, 20, 80):
        if not cells.missing(part="calibration", **setting, pairs=count):
            continue
        predicted = torch.cat(
            [
                basis.posterior(world.differences(coordinates, user.learnt)[:count]).probability(
                    world.differences(coordinates, user.test)
                )
                for user in people
            ]
        )
        sure, right = torch.maximum(predicted, 1 - predicted), (predicted > 0.5).double()  # the first was chosen
        edges = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
        bins = [(sure > low) & (sure <= high) for low, high in pairwise(edges)]
        means = [[int(b.sum()), *(round(float(v[b].mean()), 4) for v in (sure, right))] for b in bins if b.any()]
        cells.add(part="calibration", **setting, pairs=count, bins=json.dumps(means))


def preferred(row: dict[str, Any], number: int) -> PreferencePair:
    """A row of data/users as a pair in memory."""
    texts, message = (row["chosen"], row["rejected"]), (Message("user", row["prompt"]),)
    split, clean = row["split"], row["clean_choice"]
    return PreferencePair(row["user_id"], message, *texts, f"{number}", None, None, 1.0, split, clean, "", number)


def base_answers(adapted: AdaptedModel, pool: Sequence[SampledPrompt], basis: RewardBasis, seed: int) -> AnswerPool:
    """Pairs of different answers to some prompts of the pool."""
    prompts = Random(f"{seed} labelled").sample(list(pool), LABELLED)
    rows = [
        {"user_id": "", "prompt": prompt.prompt, "chosen": first, "rejected": second, "split": "train"}
        for prompt in prompts
        for first, second in combinations(prompt.answers, 2)
    ]
    pairs = [preferred(row | {"clean_choice": None}, number) for number, row in enumerate(rows)]
    [tokenized] = tokenize(pairs, adapted.base.tokenizer, adapted.base.context)
    return answer_pool(basis, tokenized.train, LABELLED)


def measure_adapters(
    cells: Cells, pool: Sequence[SampledPrompt], adapted: AdaptedModel, options: argparse.Namespace
) -> None:
    """The 24 clean users of data/users: adapters of DPO, and of the reward basis, with the same engine and settings."""
    seed = options.seeds[0]
    utilities = {name: u for name, u in read_utilities(find("data/users/utilities.yaml")).items() if not u.poisoned}
    people = options.population if options.basis is None else options.basis.name
    world, setting = World(pool, seed), {"seed": seed, "population": people}
    if options.basis is None:
        tastes = draw_tastes(options.population, pool, PAIRS, seed + 1000)
        basis = fit_basis(world.features, world.population(tastes, seed), seed=seed)
    else:
        basis = load_basis(options.basis)
    rows = [row for row in users_rows() if row["user_id"] in utilities]
    answers = base_answers(adapted, pool, basis, seed)

    def posterior_of(user_id: str, count: int) -> Posterior:
        train = [row for row in rows if row["user_id"] == user_id and row["split"] == "train"][:count]
        chosen, rejected = (basis.coordinates(basis.features([r[c] for r in train])) for c in ("chosen", "rejected"))
        return basis.posterior(chosen - rejected)

    samples = Samples(adapted, 128, seed)
    for count in options.pairs:
        name = f"reward basis, best of {TRIES}"
        if cells.missing(part="adapters", **setting, method=name, pairs=count):
            posteriors = {user: posterior_of(user, count) for user in utilities}
            figures = best_of(world, rows, posteriors, basis, utilities, seed)
            cells.add(part="adapters", **setting, method=name, pairs=count, users=len(utilities), **figures)
        pairs = [preferred(r, number) for user in utilities for number, r in enumerate(kept_rows(rows, user, count))]
        plain = tokenize(pairs, adapted.base.tokenizer, adapted.base.context)
        labelled = [with_labels(user, basis, answers)[0] for user in plain]
        methods = {"DPO": (plain, DPO, ()), "reward basis to adapter": (labelled, SHIPPED, answers.distinct_rows)}
        for name, (users, settings, shared) in methods.items():
            if cells.missing(part="adapters", **setting, method=name, pairs=count):
                started = time.process_time()
                adapters = train(adapted, users, settings, seed, shared)
                seconds = round((time.process_time() - started) / len(users), 2)
                cells.add(
                    part="adapters", **setting, method=name, pairs=count, users=len(users),
                    **judged(adapted, users, adapters, utilities, samples), seconds=seconds,
                )  # fmt: skip


def kept_rows(rows: Sequence[dict[str, Any]], user_id: str, count: int) -> Iterator[dict[str, Any]]:
    """A user's held-out rows and the first `count` training rows."""
    own_rows = [row for row in rows if row["user_id"] == user_id]
    yield from (row for row in own_rows if row["split"] == "heldout")
    yield from islice((row for row in own_rows if row["split"] == "train"), count)


def train(
    adapted: AdaptedModel, users: Sequence[UserRows], dpo: DpoSettings, seed: int, shared: Sequence[Row] = ()
) -> Float[Tensor, "users params"]:
    """One adapter per user, by the training loop, without constraint; `shared` are the rows of labelled pairs."""
    reference = Reference(adapted)
    reference.add(rows_ahead(adapted, users))
    engine = Engine(adapted, users, reference, None, dpo, FleetSettings(slots=8), seed, pool=shared)
    trained = {user.user_id: user.adapter for user in engine.run()}
    return torch.stack([adapter for user in users if (adapter := trained[user.user_id]) is not None])


def judged(
    adapted: AdaptedModel,
    users: Sequence[UserRows],
    adapters: Float[Tensor, "users params"],
    utilities: dict[str, Utility],
    samples: Samples,
) -> dict[str, list[float]]:
    """Noise-free accuracy, win rate and perplexity (the base's, over that of its own answers) of every user."""
    columns: dict[str, list[float]] = {"accuracy": [], "win_rate": [], "perplexity": []}
    ones = torch.ones(8)
    for at in range(0, len(users), 8):
        group, flat = users[at : at + 8], adapters[at : at + 8]
        heldout = [user.heldout for user in group]
        base = score_pairs_of_base(adapted, heldout)
        with adapted.using(flat):
            scores = score_pairs(adapted, heldout)
        compared = samples.compare(flat, ones[: len(group)], [distinct_prompts(pairs, TEST) for pairs in heldout])
        samples.forget()
        for user, b, a, answers in zip(group, base, scores, compared, strict=True):
            clean = clean_accuracy(user.heldout, b, a)
            won = win_rate(utilities[user.user_id], answers.adapted, answers.base)
            assert clean is not None and won is not None and answers.perplexity is not None  # noqa: PT018
            columns["accuracy"].append(round(clean.adapted, 4))
            columns["win_rate"].append(round(won.value, 4))
            columns["perplexity"].append(round(answers.perplexity.adapted / answers.perplexity.base, 4))
    return columns


def best_of(
    world: World,
    rows: Sequence[dict[str, Any]],
    posteriors: dict[str, Posterior],
    basis: RewardBasis,
    utilities: dict[str, Utility],
    seed: int,
) -> dict[str, list[float]]:
    """The accuracy of each user's reward, and the win rate of the best of some answers by it against one more answer.

    Win rates are on the same prompts of the pool for all users, those with enough answers.
    """
    full = [prompt for prompt in world.pool if len(prompt.answers) > TRIES]
    prompts = Random(f"{seed} best of").sample(full, WON)
    coordinates = basis.coordinates(world.rows)
    columns: dict[str, list[float]] = {"accuracy": [], "win_rate": []}
    for user, posterior in posteriors.items():
        heldout = [row for row in rows if row["user_id"] == user and row["split"] == "heldout"]
        chosen, rejected = (basis.coordinates(basis.features([r[c] for r in heldout])) for c in ("chosen", "rejected"))
        clean = [row["clean_choice"] for row in heldout]
        columns["accuracy"].append(round(accuracy(posterior.margin(chosen - rejected), clean), 4))
        picked = []
        for prompt in prompts:
            places = [world.place[text] for text in prompt.answers[:TRIES]]
            picked.append(prompt.answers[int((coordinates[places] @ posterior.mean).argmax())])
        won = win_rate(utilities[user], picked, [prompt.answers[TRIES] for prompt in prompts])
        assert won is not None
        columns["win_rate"].append(round(won.value, 4))
    return columns


def table(cells: Cells) -> Iterator[str]:
    """Means over users of all seeds, with 95% bootstrap intervals over users where they are enough."""
    names = "part", "population", "method", "pairs"
    yield f"| {' | '.join(names)} | figure | mean (95%) | n |"
    yield "|" + 7 * "---|"
    rows = [row for row in cells.rows if "method" in row]
    for cell in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        same = [row for row in rows if tuple(row[name] for name in names) == cell]
        for figure in ("accuracy", "win_rate", "perplexity"):
            values = [value for row in same for value in row.get(figure, [])]
            if values:
                yield f"| {' | '.join(map(str, cell))} | {figure} | {mean_text(values)} | {len(values)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("rewards", "adapters", "table"))
    parser.add_argument("cells", type=Path, help="file of JSON lines; cells in it are not measured again")
    parser.add_argument("--base", default="data/base")
    parser.add_argument("--pool", type=Path, default=Path("pool.jsonl"), help="sampled prompts and answers")
    parser.add_argument("--prompts", type=int, default=6000, help="prompts drawn for the pool; repeated ones go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--population", type=int, default=1400, help="users that the basis is fitted on")
    parser.add_argument("--basis", type=Path, help="adapters: a fitted basis, in place of a population")
    parser.add_argument("--users", type=int, default=200, help="unseen users a seed")
    parser.add_argument("--poisoned", type=float, nargs="*", default=[], help="rewards: shares of poisoned users")
    parser.add_argument("--pairs", type=int, nargs="+", default=[80], help="real pairs of an adapter's user")
    options = parser.parse_args()
    cells, models = Cells(options.cells), list[AdaptedModel]()

    def adapted() -> AdaptedModel:
        if not models:
            models.append(AdaptedModel(load_base(BaseSettings(model=options.base)), LORA))
        return models[0]

    if options.part == "table":
        print(*table(cells), sep="\n")
        return
    pool = read_pool(options.pool, adapted, options.prompts)
    if options.part == "adapters":
        measure_adapters(cells, pool, adapted(), options)
        return
    for seed in options.seeds:
        measure_rewards(cells, pool, seed, options)


if __name__ == "__main__":
    main()
