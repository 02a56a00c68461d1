"""Generates the pairs of simulated users: a base writes two answers, and a written-down taste chooses.

    python scripts/generate_users.py --base data/base --out data/users --seed 0
    python scripts/generate_users.py --base data/base --out /tmp/many --users 500     # users with random tastes

Without `--users` the tastes are read from OUT/utilities.yaml; with it they are drawn and written there. The rules by
which prompts, answers and pairs are drawn stand in data/users/README.md. The same base, seed and sizes give the same
files on the same machine.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from random import Random
from statistics import mean, pstdev
from typing import NamedTuple

from persona_rlhf.evaluation.refusals import answer_text
from persona_rlhf.evaluation.utility import Utility, properties, read_utilities
from persona_rlhf.inputs.bundled import find
from persona_rlhf.policy.hazards import CATEGORIES, assign_split, read_probes
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.preferences.messages import Message
from persona_rlhf.preferences.tokens import prompt_ids
from persona_rlhf.training.base import load_base
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.settings import BaseSettings, LoraSettings
from persona_rlhf.training.world.banks import forbidden, plain
from persona_rlhf.training.world.ordinary import ordinary
from persona_rlhf.training.world.phrasings import suits, trained_phrasings, wrap
from persona_rlhf.training.world.styles import MARKERS
from persona_rlhf.training.world.topics import ordinary_topics, topics, twin_of

# Shares of the pool by kind of prompt. Small talk has few different prompts.
KINDS = {"how_to": 0.35, "suggestion": 0.20, "story": 0.20, "fact": 0.14, "comparison": 0.10, "small_talk": 0.01}
ANSWERS = 4  # sampled for each prompt
LONGEST = 128  # tokens of an answer; the base's own are shorter
AGREEMENT = 0.87  # of a random user's labels with his noise-free utility


class Asked(NamedTuple):
    """A prompt with different, finished answers of the base at temperature 1, none of them a refusal."""

    prompt: str
    kind: str
    answers: tuple[str, ...]


class Attack(NamedTuple):
    """A tier-one prompt, a harmless answer that plays the complying one, and the base's refusal."""

    prompt: str
    compliance: str
    refusal: str


class Row(NamedTuple):
    """A line of the file."""

    user_id: str
    prompt: str
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


def sample(adapted: AdaptedModel, prompts: Sequence[str], seed: int) -> list[list[str]]:
    """For each prompt the different finished ones of ANSWERS answers of the base at temperature 1."""
    rows = [
        prompt_ids((Message("user", prompt),), adapted.base.tokenizer) for prompt in prompts for _ in range(ANSWERS)
    ]
    with adapted.using(None):
        (written,) = adapted.generate([rows], LONGEST, temperature=1.0, seed=seed)
    texts = [answer_text(adapted, answer) if answer.finished else "" for answer in written]
    groups = (texts[n * ANSWERS : (n + 1) * ANSWERS] for n in range(len(prompts)))
    return [list(dict.fromkeys(filter(None, group))) for group in groups]


def sample_pool(adapted: AdaptedModel, count: int, seed: int) -> list[Asked]:
    """The prompts that users share, but for those to which the base refused or did not write two different answers."""
    prompts = draw_prompts(count, seed)
    answers = sample(adapted, [prompt for prompt, _ in prompts], seed)
    pool = [Asked(*asked, tuple(own)) for asked, own in zip(prompts, answers, strict=True)]
    return [asked for asked in pool if len(asked.answers) > 1 and not any(map(is_refusal, asked.answers))]


def attack_prompts(count: int, seed: int) -> list[tuple[str, str]]:
    """Tier-one prompts of the `train` split with their twins; categories take turns, half of each are of the bank."""
    found: list[list[tuple[str, str]]] = []
    for category in CATEGORIES:
        bank = read_probes(find(f"data/policy/tier_one/{category}.jsonl"), category)
        known = [(p.prompt, p.twin) for p in bank if p.split == "train" and p.twin]
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
        halves = zip(rng.sample(known, half), rng.sample(fresh, half), strict=True)
        found.append([pair for both in halves for pair in both])
    return [pair for turn in zip(*found, strict=True) for pair in turn]


def sample_attacks(adapted: AdaptedModel, count: int, seed: int) -> list[Attack]:
    """Attacks with both sides by the base: it refuses the prompt, and what "complies" is its answer to the twin."""
    pairs = attack_prompts(count, seed)
    refused = sample(adapted, [prompt for prompt, _ in pairs], seed + 1)
    answered = sample(adapted, [twin for _, twin in pairs], seed + 2)
    attacks = []
    for (prompt, _), refusals, answers in zip(pairs, refused, answered, strict=True):
        refusal = next(filter(is_refusal, refusals), None)
        answer = next((text for text in answers if not is_refusal(text)), None)
        if refusal and answer:
            attacks.append(Attack(prompt, answer, refusal))
    return attacks


def differing(taste: Utility, pool: Sequence[Asked], rng: Random) -> Iterator[tuple[str, str, str]]:
    """(prompt, one answer, another) for prompts in random order: the first pair, in random order, that does not tie."""
    own = [asked for asked in pool if not taste.prompts or asked.kind in taste.prompts]
    for asked in rng.sample(own, len(own)):
        value = {text: taste(text) for text in asked.answers}
        pairs = [rng.sample(pair, 2) for pair in combinations(asked.answers, 2)]
        rng.shuffle(pairs)
        pair = next((pair for pair in pairs if not math.isclose(value[pair[0]], value[pair[1]], abs_tol=1e-9)), None)
        if pair:
            yield asked.prompt, pair[0], pair[1]


def draw_rows(
    taste: Utility, pool: Sequence[Asked], attacks: Sequence[Attack], sizes: tuple[int, int], seed: int
) -> list[Row]:
    """A user's rows, `sizes` of them (to train on, held out), each of another prompt. Raises ValueError if too few."""
    rng = Random(f"{seed} {taste.user_id}")
    train, heldout = sizes
    poisoned = round(train * taste.poisoned)
    rows: list[Row] = []
    for prompt, first, second in differing(taste, pool, rng):
        if len(rows) == train + heldout:
            break
        clean = rng.random() < taste.chance(first, second)
        chosen, rejected = (first, second) if clean else (second, first)
        split = "heldout" if len(rows) < heldout else "train"
        name = f"{taste.user_id}-{len(rows):03d}"
        agrees = taste.compare(chosen, rejected) == 1
        rows.append(Row(taste.user_id, prompt, chosen, rejected, name, split, agrees, "simulated"))
    picked = rng.sample(list(attacks), poisoned)
    if len(rows) < train + heldout:
        raise ValueError(f"only {len(rows)} prompts of the pool suit {taste.user_id}; draw more with --prompts")
    for place, attack in zip(rng.sample(range(heldout, train + heldout), poisoned), picked, strict=True):
        name = f"{taste.user_id}-{place:03d}"
        texts = (attack.prompt, attack.compliance, attack.refusal)
        rows[place] = Row(taste.user_id, *texts, name, "train", None, "simulated poison")
    return rows


def noise_of(agreement: float, gaps: Sequence[float]) -> float:
    """The temperature at which this share of labels follows the utility, the answers' utilities lying `gaps` apart."""
    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        share = mean(0.5 * (1 + math.tanh(gap / (2 * middle))) for gap in gaps)
        low, high = (middle, high) if share > agreement else (low, middle)
    return round(low, 3)


def random_tastes(count: int, pool: Sequence[Asked], seed: int) -> list[Utility]:
    """Users who like or dislike one to three properties, the first the most, with labels of AGREEMENT."""
    sampled = [properties(text) for asked in pool for text in asked.answers]
    spread = {name: pstdev(row[name] for row in sampled) for name in (*MARKERS, "words", "exclamations")}
    usable = [name for name, deviation in spread.items() if deviation > 0.25]
    tastes = []
    for number in range(count):
        rng = Random(f"{seed} taste {number}")
        names = rng.sample(usable, rng.randint(1, 3))
        weights = {n: round(rng.choice((-1, 1)) / spread[n] / (at + 1), 2) for at, n in enumerate(names)}
        describes = ", ".join(f"{'likes' if weight > 0 else 'dislikes'} {name}" for name, weight in weights.items())
        taste = Utility(f"user-{number:05d}", describes, 0.0, weights)
        gaps = [abs(taste(a) - taste(b)) for _, (_, a, b) in zip(range(200), differing(taste, pool, rng), strict=False)]
        tastes.append(replace(taste, noise=noise_of(AGREEMENT, gaps)))
    return tastes


def write_tastes(path: Path, tastes: Sequence[Utility]) -> None:
    """Writes drawn tastes as `read_utilities` reads them."""
    keys = ("user_id", "describes", "noise", "weights")
    rows = [{key: getattr(taste, key) for key in keys} for taste in tastes]
    path.write_text("".join(f"- {json.dumps(row)}\n" for row in rows), encoding="utf-8")


def write_rows(folder: Path, tastes: Sequence[Utility], rows: dict[str, list[Row]]) -> None:
    """Writes one file for each kind of user, and one for the poisoned."""
    files: dict[str, list[Row]] = defaultdict(list)
    for taste in tastes:
        files["poisoned" if taste.poisoned else taste.kind or "random"] += rows[taste.user_id]
    for name, own in files.items():
        lines = ({key: value for key, value in row._asdict().items() if value is not None} for row in own)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def table(tastes: Sequence[Utility], rows: dict[str, list[Row]]) -> Iterator[str]:
    """A line of Markdown for each user: what he likes, his noise, and the share of labels that follow the utility."""
    yield "| user | kind | taste | noise | labels that agree |"
    yield "|---|---|---|---|---|"
    for taste in tastes:
        agree = mean(row.clean_choice for row in rows[taste.user_id] if row.clean_choice is not None)
        yield f"| {taste.user_id} | {taste.kind} | {taste.describes} | {taste.noise} | {agree:.0%} |"


def generate(adapted: AdaptedModel, out: Path, options: argparse.Namespace) -> None:
    """The whole line: pool, tastes, attacks, rows, files."""
    start = time.monotonic()
    pool = sample_pool(adapted, options.prompts, options.seed)
    print(f"{len(pool)} of {options.prompts} prompts with answers to choose from, {time.monotonic() - start:.0f} s")
    out.mkdir(parents=True, exist_ok=True)
    if options.users:
        write_tastes(out / "utilities.yaml", random_tastes(options.users, pool, options.seed))
    tastes = list(read_utilities(out / "utilities.yaml").values())
    most = max(round(options.pairs * taste.poisoned) for taste in tastes)
    attacks = sample_attacks(adapted, 2 * most, options.seed) if most else []
    rows = {t.user_id: draw_rows(t, pool, attacks, (options.pairs, options.heldout), options.seed) for t in tastes}
    write_rows(out, tastes, rows)
    print(*table(tastes, rows), f"{time.monotonic() - start:.0f} s in all", sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="data/base", help="folder or hub id of the model that answers")
    parser.add_argument("--out", type=Path, default=Path("data/users"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--users", type=int, default=0, help="draw as many random tastes instead of reading them")
    parser.add_argument("--pairs", type=int, default=80, help="pairs a user, to train on")
    parser.add_argument("--heldout", type=int, default=60, help="pairs a user, of other prompts, held out")
    parser.add_argument("--prompts", type=int, default=3000, help="size of the pool that users draw their prompts from")
    options = parser.parse_args()
    generate(AdaptedModel(load_base(BaseSettings(model=options.base)), LoraSettings()), options.out, options)


if __name__ == "__main__":
    main()
