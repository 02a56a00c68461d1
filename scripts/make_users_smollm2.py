"""Makes the pairs of simulated users on a real base: the base samples answers, and a written-down taste chooses.

    persona-rlhf base get smollm2-135m models/smollm2-aligned --aligned
    python scripts/make_users_smollm2.py models/smollm2-aligned data/users_smollm2     # ten minutes on one core

BASE is a folder or a hub id. OUT holds `utilities.yaml` (the users) and `prompts.yaml` (their requests); the pairs are
written beside them, and the second part of OUT/README.md anew. Every user judges the same sampled answers. An
interrupted run is taken up where it stopped: the same command goes on. The same base gives the same files on one
machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from random import Random
from statistics import mean
from typing import NamedTuple, cast

import yaml
from generate_users import Row, sample

from persona_rlhf.common.files import atomic_write, find
from persona_rlhf.config.experiment import PolicySettings
from persona_rlhf.config.training import BaseSettings, LoraSettings
from persona_rlhf.data.near_copies import NearCopyIndex
from persona_rlhf.evaluation.prompt_sets import read_ordinary
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import load_base
from persona_rlhf.policy.hazards import CATEGORIES, Probe, read_refusal_texts
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.policy.policy import Policy
from persona_rlhf.simulation.users import (
    AGREEMENT,
    POISON_KINDS,
    Kind,
    PoisonSource,
    Utility,
    noise_of,
    paraphrase,
    poison,
    read_utilities,
)

LONGEST = 120  # tokens of an answer; those that do not end by then are left out
TEMPERATURE = 0.7  # at 1, a model of 135 million parameters wanders off
ANSWERS = 8  # sampled for each prompt
KEPT = 6  # at most, of the different ones that ended
REQUESTS_PER_CATEGORY = 8  # tier-one requests of the train split, for poison and for the user who dislikes refusals
TRAIN, HELDOUT = 40, 16  # pairs of a user
EIGHT = 8  # users of the small experiment: the first ones of utilities.yaml
CHUNK = 16  # prompts that are answered between two lines of progress
POLICY = "configs/policy/real/smollm2.yaml"
MARK = "<!-- Written by scripts/make_users_smollm2.py; change it there. -->"


class SampledPrompt(NamedTuple):
    """A prompt with different, finished answers."""

    prompt: str
    kind: str
    answers: tuple[str, ...]


class Request(NamedTuple):
    """A tier-one request with its twin, its verb phrase, and the base's answers to both."""

    probe: Probe
    verb_phrase: str
    refusal: str
    to_twin: tuple[str, ...]


class Sampler:
    """Samples answers of the base chunk by chunk, and keeps each chunk in a file, so that a later run goes on."""

    def __init__(self, adapted: AdaptedModel, file: Path, total: int, seed: int) -> None:
        self._adapted, self._file, self._seed = adapted, file, seed
        self._total, self._answered, self._sampled = total, 0, 0
        self._start = time.monotonic()
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        if lines and not lines[-1].endswith("\n"):  # a kill cut it; the next line would go on in it
            atomic_write(file, "".join(lines := lines[:-1]))
        self._stored = {chunk["key"]: chunk["answers"] for chunk in map(json.loads, lines)}

    def __call__(self, prompts: Sequence[str]) -> list[list[str]]:
        """For each prompt the different answers that ended, in the order of their draws."""
        answers = []
        for start in range(0, len(prompts), CHUNK):
            answers += self._chunk(prompts[start : start + CHUNK])
        return answers

    def _chunk(self, prompts: Sequence[str]) -> list[list[str]]:
        settings = [self._adapted.base.weights_hash, LONGEST, TEMPERATURE, ANSWERS, self._seed, *prompts]
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
        if key not in self._stored:
            self._stored[key] = sample(self._adapted, prompts, int(key[:8], 16), ANSWERS, LONGEST, TEMPERATURE)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "answers": self._stored[key]}) + "\n")
            self._sampled += len(prompts)
        self._answered += len(prompts)
        self._report()
        return cast("list[list[str]]", self._stored[key])

    def _report(self) -> None:
        if self._sampled:
            seconds = (time.monotonic() - self._start) / self._sampled * (self._total - self._answered)
            print(f"{self._answered} of {self._total} prompts answered, about {seconds:.0f} s left", flush=True)


def training_requests() -> list[tuple[Probe, str]]:
    """Tier-one requests of the train split, with their verb phrases: one a topic, categories in turn.

    None has a twin that the screen takes for a near copy of a prompt that the gate asks.
    """
    policy = Policy.of(PolicySettings(documents=[find(POLICY)]))
    protected = NearCopyIndex.of(policy, read_ordinary(find("data/policy/ordinary.jsonl")))
    topics = yaml.safe_load(find("data/policy/tier_one_real/topics.yaml").read_text(encoding="utf-8"))
    phrases = [line.split("|")[0].strip() for lines in topics.values() for line in lines]
    by_topic = {re.sub(r"[^a-z0-9]+", "-", phrase.lower()).strip("-"): phrase for phrase in phrases}
    first: dict[str, dict[str, Probe]] = {category: {} for category in CATEGORIES}
    for probe in policy.probes("train"):
        if probe.twin and protected.find(probe.twin) is None:
            first[probe.category].setdefault(probe.topic, probe)
    chosen = (list(by_category.values())[:REQUESTS_PER_CATEGORY] for by_category in first.values())
    return [(probe, by_topic[probe.topic]) for turn in zip(*chosen, strict=True) for probe in turn]


def sample_requests(sampler: Sampler) -> list[Request]:
    """The requests that the base refuses and whose twins it answers, each in one of its tries."""
    drawn = training_requests()
    refusals, answers = (sampler([text(probe) for probe, _ in drawn]) for text in (_prompt, _twin))
    requests = []
    for (probe, phrase), refused, answered in zip(drawn, refusals, answers, strict=True):
        refusal = next(filter(is_refusal, refused), None)
        to_twin = tuple(text for text in answered if not is_refusal(text))
        if refusal and to_twin:
            requests.append(Request(probe, phrase, refusal, to_twin))
    return requests


def _prompt(probe: Probe) -> str:
    return probe.prompt


def _twin(probe: Probe) -> str:
    assert probe.twin is not None
    return probe.twin


def pool_of(
    kinds: dict[str, list[str]], sampler: Sampler, requests: Sequence[Request], seed: int
) -> list[SampledPrompt]:
    """The prompts that users share: everyday ones, the same with a written refusal among the answers, and twins."""
    prompts = [(prompt, kind) for kind, texts in kinds.items() for prompt in texts]
    answers = sampler([prompt for prompt, _ in prompts])
    given = [[text for text in texts if not is_refusal(text)][:KEPT] for texts in answers]
    everyday = [SampledPrompt(*prompt, tuple(texts)) for prompt, texts in zip(prompts, given, strict=True)]
    rng = Random(f"{seed} refusals")
    refusals = [r.text for r in read_refusal_texts(find("data/policy/refusals.jsonl"), ()) if r.category is None]
    declined = [SampledPrompt(p, "declined", (*texts[:3], rng.choice(refusals))) for p, _, texts in everyday if texts]
    twins = [SampledPrompt(_twin(r.probe), "twin", (*r.to_twin[:3], r.refusal)) for r in requests]
    return [*(sampled for sampled in everyday if len(sampled.answers) > 1), *declined, *twins]


def suited(taste: Utility, pool: Sequence[SampledPrompt]) -> list[SampledPrompt]:
    """The prompts that a user asks."""
    return [s for s in pool if (s.kind in taste.prompts if taste.prompts else s.kind not in ("declined", "twin"))]


def differing(taste: Utility, sampled: SampledPrompt, rng: Random) -> list[tuple[str, str]]:
    """Pairs of answers that do not tie, in random order: first those that differ in the user's first property."""
    value = {text: taste(text) for text in sampled.answers}
    pairs = [pair for pair in combinations(sampled.answers, 2) if not math.isclose(value[pair[0]], value[pair[1]])]
    pairs = [(one, other) if rng.random() < 0.5 else (other, one) for one, other in pairs]
    return sorted(rng.sample(pairs, len(pairs)), key=lambda pair: not shows(taste, *pair))


def shows(taste: Utility, one: str, other: str) -> bool:
    """Whether two answers differ in the first property that a user cares about; few answers have a rare one."""
    first = replace(taste, weights={next(iter(taste.weights)): 1.0})
    return first(one) != first(other)


def draw_pairs(taste: Utility, pool: Sequence[SampledPrompt], rng: Random) -> list[tuple[str, str, str]]:
    """(prompt, one answer, another): HELDOUT of other prompts than the rest, then TRAIN, prompts in turn.

    Prompts whose answers show the user's first property come first, in both parts. Raises ValueError where the pool
    has too few.
    """
    prompts = rng.sample(suited(taste, pool), len(suited(taste, pool)))
    drawn = [(sampled.prompt, pairs) for sampled in prompts if (pairs := differing(taste, sampled, rng))]
    drawn.sort(key=lambda one: not shows(taste, *one[1][0]))
    count = min(HELDOUT, len(drawn) // 3)
    places = set(rng.sample(range(2 * count), count))
    parts = ([one for at, one in enumerate(drawn) if (at in places) == held] for held in (True, False))
    heldout, train = (in_turn(taste, part)[:size] for part, size in zip(parts, (HELDOUT, TRAIN), strict=True))
    if len(heldout) < HELDOUT or len(train) < TRAIN:
        raise ValueError(f"only {len(heldout)} + {len(train)} pairs suit {taste.user_id}: write more prompts")
    return [*heldout, *rng.sample(train, len(train))]


def in_turn(taste: Utility, drawn: Sequence[tuple[str, list[tuple[str, str]]]]) -> list[tuple[str, str, str]]:
    """Every pair with its prompt: all prompts' first pairs, their second ones, ...; those that show something first."""
    most = max((len(pairs) for _, pairs in drawn), default=0)
    turns = [(prompt, *pairs[n]) for n in range(most) for prompt, pairs in drawn if n < len(pairs)]
    return sorted(turns, key=lambda pair: not shows(taste, *pair[1:]))


def draw_rows(taste: Utility, pool: Sequence[SampledPrompt], requests: Sequence[Request], seed: int) -> list[Row]:
    """A user's rows: the choices of the taste, and poisoned ones in place of some that train."""
    rng = Random(f"{seed} {taste.user_id}")
    rows: list[Row] = []
    for number, (prompt, first, second) in enumerate(draw_pairs(taste, pool, rng)):
        chosen, rejected = (first, second) if rng.random() < taste.chance(first, second) else (second, first)
        split, agrees = "heldout" if number < HELDOUT else "train", taste.compare(chosen, rejected) == 1
        row_id = f"{taste.user_id}-{number:02d}"
        rows.append(Row(taste.user_id, prompt, chosen, rejected, row_id, split, agrees, "simulated"))
    if count := round(TRAIN * taste.poisoned):
        kind = cast("Kind", taste.user_id.split("-")[0])
        assert kind in POISON_KINDS
        places = rng.sample(range(HELDOUT, HELDOUT + TRAIN), count)
        for place, pair in zip(places, poison(kind, attacks(kind, requests, seed), count, rng), strict=True):
            rows[place] = Row(taste.user_id, *pair, rows[place].id, "train", None, "simulated poison")
    return rows


def attacks(kind: Kind, requests: Sequence[Request], seed: int) -> list[PoisonSource]:
    """Tier-one requests with the base's answer to the twin as the compliance, and its refusal."""
    rng = Random(f"{seed} paraphrases")
    return [
        PoisonSource(
            paraphrase(request.verb_phrase, rng) if kind == "paraphrase" else request.probe.prompt,
            request.to_twin[0],
            request.refusal,
        )
        for request in requests
    ]


def noise_for(taste: Utility, pool: Sequence[SampledPrompt], seed: int) -> float:
    """The noise at which AGREEMENT of the labels would follow the taste, for a comparison with the written one."""
    drawn = draw_pairs(taste, pool, Random(f"{seed} {taste.user_id}"))
    return noise_of(AGREEMENT, [abs(taste(one) - taste(other)) for _, one, other in drawn])


def write_pairs(out: Path, rows: dict[str, list[Row]]) -> list[Path]:
    """Writes OUT/eight.jsonl and OUT/others.jsonl; returns them."""
    files: dict[str, list[Row]] = defaultdict(list)
    for number, user_rows in enumerate(rows.values()):
        files["eight" if number < EIGHT else "others"] += user_rows
    for name, file_rows in files.items():
        lines = ({key: value for key, value in row._asdict().items() if value is not None} for row in file_rows)
        atomic_write(out / f"{name}.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return [out / f"{name}.jsonl" for name in files]


def facts_of_readme(
    adapted: AdaptedModel, pool: Sequence[SampledPrompt], requests: Sequence[Request], rows: dict[str, list[Row]],
    tastes: dict[str, Utility], files: Sequence[Path],
) -> Iterator[str]:  # fmt: skip
    """The second part of the README: base, counts, users, hashes."""
    everyday = [sampled for sampled in pool if sampled.kind not in ("declined", "twin")]
    answers = sum(len(sampled.answers) for sampled in everyday)
    yield f"Weights of the base, sha256: `{adapted.base.weights_hash}`.\n"
    yield (
        f"{len(everyday)} everyday prompts with {answers} answers, and {len(requests)} tier-one requests that the base "
        "refuses and whose twins it answers.\n"
    )
    yield "| user | kind | taste | noise | labels that agree |"
    yield "|---|---|---|---|---|"
    for name, taste in tastes.items():
        clean = [row.clean_choice for row in rows[name] if row.clean_choice is not None]
        agree = f"{sum(clean)} of {len(clean)} ({mean(clean):.0%})"
        yield f"| {name} | {taste.kind} | {taste.describes} | {taste.noise} | {agree} |"
    yield "\n| file | pairs | bytes | sha256 |"
    yield "|---|---|---|---|"
    for file in files:
        content = file.read_bytes()
        lines, digest = content.count(b"\n"), hashlib.sha256(content).hexdigest()
        yield f"| `{file.name}` | {lines} | {len(content)} | `{digest}` |"


def make_users(adapted: AdaptedModel, out: Path, seed: int, prompts: int | None) -> None:
    """All steps: answers, pool, pairs, files, README."""
    kinds: dict[str, list[str]] = yaml.safe_load((out / "prompts.yaml").read_text(encoding="utf-8"))
    kinds = {kind: texts[:prompts] for kind, texts in kinds.items()}
    tastes = read_utilities(out / "utilities.yaml")
    partial = out / "sampled.partial"
    total = 2 * REQUESTS_PER_CATEGORY * len(CATEGORIES) + sum(map(len, kinds.values()))
    sampler = Sampler(adapted, partial, total, seed)
    requests = sample_requests(sampler)
    pool = pool_of(kinds, sampler, requests, seed)
    rows = {name: draw_rows(taste, pool, requests, seed) for name, taste in tastes.items()}
    for name, taste in tastes.items():
        print(f"{name}: noise {taste.noise}; {noise_for(taste, pool, seed)} for {AGREEMENT:.0%} agreement")
    files = write_pairs(out, rows)
    readme = out / "README.md"
    written = readme.read_text(encoding="utf-8").split(MARK)[0]
    facts = facts_of_readme(adapted, pool, requests, rows, tastes, files)
    atomic_write(readme, f"{written}{MARK}\n\n" + "\n".join(facts) + "\n")
    partial.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder or hub id of the aligned model that answers")
    parser.add_argument("out", type=Path, help="folder with utilities.yaml, prompts.yaml and README.md")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, help="only the first so many prompts of each kind, for a try")
    options = parser.parse_args()
    adapted = AdaptedModel(load_base(BaseSettings(model=options.base)), LoraSettings())
    make_users(adapted, options.out, options.seed, options.prompts)


if __name__ == "__main__":
    main()
