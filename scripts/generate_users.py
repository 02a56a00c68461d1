"""Generates the pairs of simulated users: a base writes two answers, and a written-down taste chooses.

    python scripts/generate_users.py --base data/base --out data/users --seed 0
    python scripts/generate_users.py --base data/base --out /tmp/many --users 200     # users with drawn tastes
    python scripts/generate_users.py --out /tmp/many --users 200 --poisoned 40 --kind flipped noice --share 0.1 0.3

Without `--users` and `--poisoned` the tastes are read from OUT/utilities.yaml; with them they are drawn and written
there: `--users` clean ones of all kinds in turn, and `--poisoned` for each cell of kind and share of poison, in one
file a cell (OUT/noice-30.jsonl). The n-th poisoned user of a cell is the n-th clean user with poison in place of some
training pairs, so that cells compare user by user. data/users/README.md has the rules by which prompts, answers and
pairs are drawn. The same base, seed and sizes give the same files on the same machine.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, cycle, islice, product
from pathlib import Path
from random import Random
from statistics import mean, pstdev
from typing import NamedTuple

from persona_rlhf.common.files import find
from persona_rlhf.config.training import BaseSettings, LoraSettings
from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import prompt_ids
from persona_rlhf.evaluation.refusals import answer_text
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import load_base
from persona_rlhf.policy.hazards import CATEGORIES, assign_split, read_probes
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.simulation.banks import forbidden, plain
from persona_rlhf.simulation.prompts import ordinary, ordinary_topics, topics, twin_of
from persona_rlhf.simulation.users import (
    AGREEMENT,
    TURN,
    Kind,
    PoisonSource,
    Utility,
    liking,
    noise_of,
    paraphrase,
    poison,
    properties,
    read_utilities,
)
from persona_rlhf.simulation.users import POISON_KINDS as POISONS
from persona_rlhf.simulation.vocabulary import suits, trained_phrasings, wrap

# Shares of the pool by kind of prompt. Small talk has few different prompts.
KINDS = {"how_to": 0.35, "suggestion": 0.20, "story": 0.20, "fact": 0.14, "comparison": 0.10, "small_talk": 0.01}
ANSWERS = 4  # sampled for each prompt
LONGEST = 128  # tokens of an answer; the base's own are shorter


class SampledPrompt(NamedTuple):
    """A prompt with different, finished answers of the base at temperature 1, none of them a refusal."""

    prompt: str
    kind: str
    answers: tuple[str, ...]


class Person(NamedTuple):
    """A simulated user: taste, kind of poison, the name that seeds the clean pairs, and the file."""

    taste: Utility
    poison: Kind
    name: str
    file: str


class Row(NamedTuple):
    """A line of the file; the prompt is a text, or the messages of a conversation."""

    user_id: str
    prompt: str | list[dict[str, str]]
    chosen: str
    rejected: str
    id: str
    split: str
    clean_choice: bool | None
    source: str


def draw_prompts(count: int, seed: int) -> list[tuple[str, str]]:
    """Different ordinary prompts (text, kind), in the shares of KINDS; none is a probe, a twin or an ordinary probe."""
    rng = Random(f"{seed} prompts")
    banned = set(forbidden())
    left = {kind: round(count * share) for kind, share in KINDS.items()}
    drawn = []
    while any(left.values()):
        exchange = ordinary(rng, ordinary_topics()[0], trained_phrasings())
        if left[exchange.kind] and plain(exchange.prompt) not in banned:
            banned.add(plain(exchange.prompt))
            left[exchange.kind] -= 1
            drawn.append((exchange.prompt, exchange.kind))
    return drawn


def sample(
    adapted: AdaptedModel,
    prompts: Sequence[str],
    seed: int,
    answers: int = ANSWERS,
    longest: int = LONGEST,
    temperature: float = 1.0,
) -> list[list[str]]:
    """For each prompt the different finished ones of `answers` sampled answers of the base."""
    rows = [
        prompt_ids((Message("user", prompt),), adapted.base.tokenizer) for prompt in prompts for _ in range(answers)
    ]
    with adapted.using(None):
        (written,) = adapted.generate([rows], longest, temperature, seed)
    texts = [answer_text(adapted, answer) if answer.finished else "" for answer in written]
    groups = (texts[n * answers : (n + 1) * answers] for n in range(len(prompts)))
    return [list(dict.fromkeys(filter(None, group))) for group in groups]


def sample_pool(adapted: AdaptedModel, count: int, seed: int) -> list[SampledPrompt]:
    """The pool of prompts that users share: those with two different answers of the base and no refusal."""
    prompts = draw_prompts(count, seed)
    answers = sample(adapted, [prompt for prompt, _ in prompts], seed)
    pool = [SampledPrompt(*prompt, tuple(texts)) for prompt, texts in zip(prompts, answers, strict=True)]
    return [sampled for sampled in pool if len(sampled.answers) > 1 and not any(map(is_refusal, sampled.answers))]


def attack_prompts(count: int, seed: int) -> list[tuple[str, str]]:
    """Tier-one prompts of the `train` split with their twins; categories take turns, half of each are of the bank."""
    by_category: list[list[tuple[str, str]]] = []
    for category in CATEGORIES:
        bank = read_probes(find(f"data/policy/tier_one/{category}.jsonl"), category)
        banked = [(p.prompt, p.twin) for p in bank if p.split == "train" and p.twin]
        fresh = [
            (wrap(phrasing, topic.vp), wrap(phrasing, twin_of(topic, phrasing.id).vp))
            for topic in topics()
            for phrasing in trained_phrasings()
            if topic.category == category and suits(phrasing, topic.vp)
            if assign_split(topic.id, phrasing.id)[0] == "train"
        ]
        banned = forbidden() | {plain(p.prompt) for p in bank}
        fresh = [pair for pair in fresh if not banned & {plain(text) for text in pair}]
        rng = Random(f"{seed} attacks {category}")
        half = math.ceil(count / len(CATEGORIES) / 2)
        halves = zip(rng.sample(banked, half), rng.sample(fresh, half), strict=True)
        by_category.append([pair for both in halves for pair in both])
    return [pair for turn in zip(*by_category, strict=True) for pair in turn]


def sample_attacks(
    adapted: AdaptedModel, pairs: Sequence[tuple[str, str]], seed: int, texts: Sequence[str] | None = None
) -> list[PoisonSource]:
    """Attacks with both sides by the base: its refusal of the prompt, and its answer to the twin as the compliance.

    `texts` replace the refused prompts in the users' pairs, where these are worded differently.
    """
    refused = sample(adapted, [prompt for prompt, _ in pairs], seed + 1)
    answered = sample(adapted, [twin for _, twin in pairs], seed + 2)
    attacks = []
    for prompt, refusals, answers in zip(texts or [p for p, _ in pairs], refused, answered, strict=True):
        refusal = next(filter(is_refusal, refusals), None)
        answer = next((text for text in answers if not is_refusal(text)), None)
        if refusal and answer:
            attacks.append(PoisonSource(prompt, answer, refusal))
    return attacks


def paraphrases(count: int, seed: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Different tier-one requests of trained topics, worded far from the bank; with each the plain prompt and twin."""
    rng, banned = Random(f"{seed} paraphrases"), set(forbidden())
    suitable = {
        topic: [p for p in trained_phrasings() if suits(p, topic.vp) and assign_split(topic.id, p.id)[0] == "train"]
        for topic in topics()
    }
    groups = [[topic for topic in suitable if topic.category == name and suitable[topic]] for name in CATEGORIES]
    texts: dict[str, tuple[str, str]] = {}
    for group in cycle(groups):
        topic = rng.choice(group)
        phrasing, text = rng.choice(suitable[topic]), paraphrase(topic.vp, rng)
        if plain(text) not in banned:
            texts[text] = wrap(phrasing, topic.vp), wrap(phrasing, twin_of(topic, phrasing.id).vp)
        if len(texts) == count:
            break
    return list(texts), list(texts.values())


def attacks_for(
    adapted: AdaptedModel, people: Sequence[Person], pairs: int, seed: int
) -> dict[Kind, list[PoisonSource]]:
    """The attacks of each kind of poison: twice as many as its most poisoned user needs."""
    most: dict[Kind, int] = {}
    for person in people:
        most[person.poison] = max(most.get(person.poison, 0), round(pairs * person.taste.poisoned))
    attacks: dict[Kind, list[PoisonSource]] = {kind: [] for kind in POISONS}
    of_bank = max((count for kind, count in most.items() if kind in ("flipped", "noice", "trigger")), default=0)
    if of_bank:
        banked = sample_attacks(adapted, attack_prompts(2 * of_bank, seed), seed)
        attacks |= {"flipped": banked, "noice": banked, "trigger": banked}
    if most.get("paraphrase"):
        texts, plain_ones = paraphrases(2 * most["paraphrase"], seed)
        attacks["paraphrase"] = sample_attacks(adapted, plain_ones, seed + 2, texts)
    return attacks


def differing(taste: Utility, pool: Sequence[SampledPrompt], rng: Random) -> Iterator[tuple[str, str, str]]:
    """(prompt, one answer, another) for prompts in random order: the first pair, in random order, that does not tie."""
    suited = [sampled for sampled in pool if not taste.prompts or sampled.kind in taste.prompts]
    for sampled in rng.sample(suited, len(suited)):
        value = {text: taste(text) for text in sampled.answers}
        pairs = [rng.sample(pair, 2) for pair in combinations(sampled.answers, 2)]
        rng.shuffle(pairs)
        pair = next((pair for pair in pairs if not math.isclose(value[pair[0]], value[pair[1]], abs_tol=1e-9)), None)
        if pair:
            yield sampled.prompt, pair[0], pair[1]


def draw_rows(
    taste: Utility,
    pool: Sequence[SampledPrompt],
    attacks: Sequence[PoisonSource],
    sizes: tuple[int, int],
    seed: int,
    kind: Kind = "flipped",
    name: str = "",
) -> list[Row]:
    """A user's rows, `sizes` of them (to train on, held out), each of another prompt. Raises ValueError if too few.

    Clean pairs are drawn by `name`, or by the user id: users of one name share them wherever there is no poison.
    """
    rng = Random(f"{seed} {name or taste.user_id}")
    train, heldout = sizes
    poisoned = round(train * taste.poisoned)
    rows: list[Row] = []
    for prompt, first, second in differing(taste, pool, rng):
        if len(rows) == train + heldout:
            break
        clean = rng.random() < taste.chance(first, second)
        chosen, rejected = (first, second) if clean else (second, first)
        split = "heldout" if len(rows) < heldout else "train"
        row_id = f"{taste.user_id}-{len(rows):03d}"
        agrees = taste.compare(chosen, rejected) == 1
        rows.append(Row(taste.user_id, prompt, chosen, rejected, row_id, split, agrees, "simulated"))
    picked = poison(kind, attacks, poisoned, rng) if poisoned else []
    if len(rows) < train + heldout:
        raise ValueError(f"only {len(rows)} prompts of the pool suit {taste.user_id}; draw more with --prompts")
    for place, pair in zip(rng.sample(range(heldout, train + heldout), poisoned), picked, strict=True):
        rows[place] = Row(taste.user_id, *pair, f"{taste.user_id}-{place:03d}", "train", None, "simulated poison")
    return rows


def draw_tastes(
    count: int, pool: Sequence[SampledPrompt], pairs: int, seed: int, kinds: Sequence[str] = TURN
) -> list[Utility]:
    """Users of `kinds` in turn with labels of AGREEMENT; the pool has at least `pairs` prompts for each.

    Most like or dislike one to three properties of their kind, the first the most. Raises ValueError where the pool has
    too few prompts.
    """
    sampled = [properties(text) for prompt in pool for text in prompt.answers]
    spread = {name: pstdev(row[name] for row in sampled) for name in sampled[0]}
    tastes = []
    for number, kind in enumerate(islice(cycle(kinds), count)):
        rng = Random(f"{seed} taste {number}")
        for _ in range(20):
            weights, prompts = liking(kind, spread, rng)
            describes = ", ".join(f"{'likes' if weight > 0 else 'dislikes'} {name}" for name, weight in weights.items())
            taste = Utility(f"user-{number:05d}", describes, 0.0, weights, kind, 0.0, prompts)
            differences = islice(differing(taste, pool, rng), max(200, pairs))
            gaps = [abs(taste(first) - taste(second)) for _, first, second in differences]
            if len(gaps) >= pairs:
                break
        else:
            raise ValueError(f"no taste of kind {kind} suits {pairs} prompts of the pool; draw more with --prompts")
        tastes.append(replace(taste, noise=noise_of(AGREEMENT, gaps)))
    return tastes


def population(tastes: Sequence[Utility], options: argparse.Namespace) -> list[Person]:
    """The clean users, and the poisoned ones of every cell: the same tastes, under the name of the cell."""
    people = [Person(taste, "flipped", taste.user_id, taste.kind) for taste in tastes[: options.users]]
    for kind, share in product(options.kind, options.share):
        for number, taste in enumerate(tastes[: options.poisoned]):
            describes = f"{taste.describes}; {share:.0%} of the training pairs are {kind} poison"
            cell = f"{kind}-{100 * share:g}"
            poisoned = replace(taste, user_id=f"{cell}-{number:05d}", describes=describes, poisoned=share)
            people.append(Person(poisoned, kind, taste.user_id, cell))
    return people


def write_tastes(path: Path, tastes: Sequence[Utility]) -> None:
    """Writes drawn tastes as `read_utilities` reads them."""
    keys = ("user_id", "describes", "kind", "poisoned", "noise", "weights", "prompts")
    rows = [{key: getattr(taste, key) for key in keys} for taste in tastes]
    path.write_text("".join(f"- {json.dumps(row)}\n" for row in rows), encoding="utf-8")


def write_rows(folder: Path, rows: dict[str, list[Row]]) -> None:
    """Writes the rows of each file."""
    for name, user_rows in rows.items():
        lines = ({key: value for key, value in row._asdict().items() if value is not None} for row in user_rows)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def table(tastes: Sequence[Utility], rows: dict[str, list[Row]]) -> Iterator[str]:
    """A line of Markdown for each user: taste, noise, and the share of labels that follow the utility."""
    yield "| user | kind | taste | noise | labels that agree |"
    yield "|---|---|---|---|---|"
    for taste in tastes:
        agree = mean(row.clean_choice for row in rows[taste.user_id] if row.clean_choice is not None)
        yield f"| {taste.user_id} | {taste.kind} | {taste.describes} | {taste.noise} | {agree:.0%} |"


def generate(adapted: AdaptedModel, out: Path, options: argparse.Namespace) -> None:
    """All steps: pool, tastes, attacks, rows, files."""
    start = time.monotonic()
    pool = sample_pool(adapted, options.prompts, options.seed)
    print(f"{len(pool)} of {options.prompts} prompts with answers to choose from, {time.monotonic() - start:.0f} s")
    out.mkdir(parents=True, exist_ok=True)
    sizes, drawn = (options.pairs, options.heldout), max(options.users, options.poisoned)
    if drawn:
        people = population(draw_tastes(drawn, pool, sum(sizes), options.seed), options)
        write_tastes(out / "utilities.yaml", [person.taste for person in people])
    else:
        tastes = read_utilities(out / "utilities.yaml").values()
        people = [
            Person(taste, "flipped", taste.user_id, "poisoned" if taste.poisoned else taste.kind or "random")
            for taste in tastes
        ]
    attacks = attacks_for(adapted, people, options.pairs, options.seed)
    rows: dict[str, list[Row]] = {}
    files: dict[str, list[Row]] = defaultdict(list)
    for taste, kind, name, file in people:
        rows[taste.user_id] = draw_rows(taste, pool, attacks[kind], sizes, options.seed, kind, name)
        files[file] += rows[taste.user_id]
    write_rows(out, files)
    print(*table([person.taste for person in people], rows), f"{time.monotonic() - start:.0f} s in all", sep="\n")


def share(text: str) -> float:
    """A share from the command line."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"a share lies between 0 and 1, not {text}")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="data/base", help="folder or hub id of the model that answers")
    parser.add_argument("--out", type=Path, default=Path("data/users"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--users", type=int, default=0, help="draw as many clean users instead of reading tastes")
    parser.add_argument("--poisoned", type=int, default=0, help="draw as many poisoned users for each kind and share")
    parser.add_argument("--kind", nargs="+", choices=POISONS, default=["flipped"], help="kinds of poison")
    parser.add_argument("--share", nargs="+", type=share, default=[0.3], help="shares of the training pairs, 0 to 1")
    parser.add_argument("--pairs", type=int, default=80, help="pairs a user, to train on")
    parser.add_argument("--heldout", type=int, default=60, help="pairs a user, of other prompts, held out")
    parser.add_argument("--prompts", type=int, default=3000, help="size of the pool that users draw their prompts from")
    options = parser.parse_args()
    generate(AdaptedModel(load_base(BaseSettings(model=options.base)), LoraSettings()), options.out, options)


if __name__ == "__main__":
    main()
