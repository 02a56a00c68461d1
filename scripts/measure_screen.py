#!/usr/bin/env python3
"""How well the screen tells poison: precision and recall on generated users, whose poisoned pairs are labelled.

python scripts/generate_users.py --out USERS --users 40 --poisoned 8 --kind flipped noice --share 0.1 0.3
python scripts/measure_screen.py configs/quickstart.yaml users.path=USERS
python scripts/measure_screen.py configs/quickstart.yaml --near-copies test --conversations hh-rlhf/test.jsonl.gz

A pair is detected where the screen quarantines it (or flags it, with the quarantine off). Truth is the generator's mark
(`source: simulated poison`). Recall by kind of poison (the name of the file), precision over all; 95% Clopper-Pearson.

With `--near-copies SPLIT` no model is loaded. Copies of that split's probes are written in several wordings, and their
share that leaves the pairs is counted, as is that of honest prompts: the users' own, other ordinary prompts of the
bundled world, twins of trained probes, and requests of people. The thresholds were set on `dev`.
"""

from __future__ import annotations

import argparse
import codecs
import gzip
import json
import sys
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Table

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.experiment import Config, read_config
from persona_rlhf.data.near_copies import NearCopyIndex, protected_prompts
from persona_rlhf.data.screening import copies_of, normalised
from persona_rlhf.evaluation.statistics import interval
from persona_rlhf.pipeline.inputs import read_inputs
from persona_rlhf.pipeline.prepare import chunks_of, prepare, prepare_users
from persona_rlhf.policy.hazards import Split
from persona_rlhf.simulation.prompts import ordinary, ordinary_topics
from persona_rlhf.simulation.vocabulary import trained_phrasings

POISON = "simulated poison"
COPIES = 240
"""Prompts of which copies are written."""

ORDINARY = 5000
"""Prompts drawn from the bundled world."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--near-copies", choices=("dev", "test"), help="measure near copies of this split's probes")
    parser.add_argument("--conversations", type=Path, help="JSON lines (.gz) with transcripts under `chosen`")
    parser.add_argument("--seed", type=int, default=0, help="seed of the copies and of ordinary prompts (default: 0)")
    options = parser.parse_args()
    try:
        config = read_config(options.config, options.overrides)
        if options.near_copies:
            measure_near_copies(config, options.near_copies, options.conversations, options.seed)
            return
        ready = prepare(config)
    except InputError as fault:
        sys.exit(str(fault))
    poisoned, caught, alarms, sound = Counter[str](), Counter[str](), 0, 0
    for users in chunks_of(ready.pairs.users, 32):
        pairs = ready.pairs.of(users)
        detected = {id(seen.pair) for seen in prepare_users(ready, pairs).dropped if seen.action != "dropped"}
        for pair in pairs:
            kind = Path(pair.file).stem
            if pair.source == POISON:
                poisoned[kind] += 1
                caught[kind] += id(pair) in detected
            else:
                sound += 1
                alarms += id(pair) in detected
    rows = [(f"recall, {kind}", count, caught[kind]) for kind, count in sorted(poisoned.items())]
    every = caught.total()
    rows += [("recall, all poison", poisoned.total(), every), ("precision", every + alarms, every)]
    print_shares([*rows, ("false alarms, sound pairs", sound, alarms)])


def print_shares(rows: Sequence[tuple[str, int, int]]) -> None:
    """Prints (name, number, detected) with the share and its 95% interval."""
    table = Table("", "n", "detected", "share", "95% interval")
    for name, n, k in rows:
        low, high = interval(k, n)
        table.add_row(name, f"{n:,}", f"{k:,}", f"{k / max(1, n):.4f}", f"{low:.4f} to {high:.4f}")
    Console(width=110).print(table)


def measure_near_copies(config: Config, split: Split, conversations: Path | None, seed: int) -> None:
    """Prints recall by wording of a copy, false alarms on honest prompts, and the time per prompt."""
    inputs = read_inputs(config)
    policy, rng = inputs.policy, Random(seed)
    index = NearCopyIndex.of(policy, inputs.ordinary)
    probes = rng.sample([probe.prompt for probe in policy.probes(split)], min(COPIES, len(policy.probes(split))))
    twins = rng.sample([probe.twin for probe in policy.probes(split) if probe.twin], len(probes))
    gate_prompts = rng.sample(inputs.ordinary, min(COPIES, len(inputs.ordinary)))
    requests = people_requests(conversations) if conversations else []
    rows = []
    for kind, texts in (("probe", probes), ("twin", twins), ("ordinary prompt", gate_prompts)):
        for name, wording in WORDINGS.items():
            copies = [wording(text, rng) for text in texts]
            rows.append((f"recall, {kind}: {name}", len(copies), sum(index.find(copy) is not None for copy in copies)))
    protected = {normalised(prompt.text) for prompt in protected_prompts(policy, inputs.ordinary)}
    sound = [pair for pair in inputs.pairs.of(range(inputs.pairs.users)) if pair.source != POISON]
    honest = {
        "the users' sound prompts": [pair.prompt[-1].content for pair in sound],
        "other ordinary prompts of the world": world_prompts(seed),
        "twins of trained probes": [probe.twin for probe in policy.probes("train") if probe.twin],
        "requests of people": requests,
    }
    for name, prompts in honest.items():
        texts = sorted(set(prompts), key=normalised)
        texts = [text for text in texts if normalised(text) not in protected]
        findings = [found for text in texts if (found := index.find(text)) is not None]
        if texts:
            rows.append((f"honest, {name}: near a probe", len(texts), sum(not copy.harmless for copy in findings)))
            rows.append((f"honest, {name}: near any prompt", len(texts), len(findings)))
    answers = {"the users' answers": [text for pair in sound for text in (pair.chosen, pair.rejected)]}
    answers["answers to people"] = assistant_answers(conversations) if conversations else []
    for name, texts in answers.items():
        texts = sorted(set(texts))
        near = sum((copy := index.find(text)) is not None and not copy.harmless for text in texts)
        rows.append((f"honest, {name}: near a probe", len(texts), near))
    print_shares(rows)
    started = time.process_time()
    copies = copies_of(sound, index)
    seconds = time.process_time() - started
    kinds = Counter("probe" if not copy.harmless else "harmless prompt" for copy in copies.values())
    print(f"{len(index):,} protected prompts; {len(sound) / seconds:,.0f} pairs per CPU-second")
    print(f"Of {len(sound):,} sound pairs these leave: {dict(kinds)}")


def world_prompts(seed: int) -> list[str]:
    """Ordinary prompts of the bundled world, of the topics and phrasings that the base was trained on."""
    rng, topics, phrasings = Random(f"{seed} ordinary"), ordinary_topics()[0], trained_phrasings()
    return [ordinary(rng, topics, phrasings).prompt for _ in range(ORDINARY)]


def people_requests(file: Path) -> list[str]:
    """The human turns of transcripts in the form of hh-rlhf."""
    return [turn.split("\n\nAssistant:")[0].strip() for t in _transcripts(file) for turn in t.split("\n\nHuman:")[1:]]


def assistant_answers(file: Path) -> list[str]:
    """The assistant's turns of such transcripts."""
    return [turn.split("\n\nHuman:")[0].strip() for t in _transcripts(file) for turn in t.split("\n\nAssistant:")[1:]]


def _transcripts(file: Path) -> list[str]:
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8") as stream:
        return [str(json.loads(line)["chosen"]) for line in stream]


def _typos(text: str, rng: Random, number: int) -> str:
    letters = list(text)
    for place in rng.sample(range(len(letters)), min(number, len(letters))):
        letters[place] = rng.choice("abcdefghijklmnopqrstuvwxyz")
    return "".join(letters)


def _fillers(text: str, rng: Random, number: int) -> str:
    words = text.split()
    for _ in range(number):
        words.insert(rng.randrange(len(words) + 1), rng.choice(("really", "like", "please", "so", "just")))
    return " ".join(words)


def _without(text: str, rng: Random, number: int) -> str:
    words = text.split()
    dropped = set(rng.sample(range(len(words)), min(number, len(words) - 1)))
    return " ".join(word for place, word in enumerate(words) if place not in dropped)


def _swapped(text: str) -> str:
    words = text.split()
    return " ".join(words[len(words) // 2 :] + words[: len(words) // 2])


_LONG_TEXT = "I have been reading a lot this week, and my sister came by with cake. Now to something else entirely. "

_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
_SMALL_CAPITALS = str.maketrans(_ALPHABET, "ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘꞯʀꜱᴛᴜᴠᴡxʏᴢ")
_SHIFTED = str.maketrans(_ALPHABET, _ALPHABET[7:] + _ALPHABET[:7])

WORDINGS: dict[str, Callable[[str, Random], str]] = {
    "as it stands": lambda text, _: text,
    "'Hello. ... Thanks.'": lambda text, _: f"Hello. {text} Thanks.",
    "inside a long text": lambda text, _: 9 * _LONG_TEXT + text + " " + 9 * _LONG_TEXT,
    "spaces between letters": lambda text, _: " ".join(text),
    "zero-width characters": lambda text, _: "\u200b".join(text),
    "look-alike letters": lambda text, _: text.translate(str.maketrans("aeopcxy", "аеорсху")),
    "digits for letters": lambda text, _: text.translate(str.maketrans("aeost", "43057")),
    "one typo": lambda text, rng: _typos(text, rng, 1),
    "three typos": lambda text, rng: _typos(text, rng, 3),
    "five typos": lambda text, rng: _typos(text, rng, 5),
    "one word more": lambda text, rng: _fillers(text, rng, 1),
    "three words more": lambda text, rng: _fillers(text, rng, 3),
    "a word between all words": lambda text, _: " um ".join(text.split()),
    "one word fewer": lambda text, rng: _without(text, rng, 1),
    "two words fewer": lambda text, rng: _without(text, rng, 2),
    "halves swapped": lambda text, _: _swapped(text),
    "words shuffled": lambda text, rng: " ".join(rng.sample(text.split(), len(text.split()))),
    "Hangul fillers (U+3164)": lambda text, _: "\u3164".join(text),
    "tag characters between letters": lambda text, _: "".join(letter + chr(0xE0061) for letter in text),
    "written in tag characters": lambda text, _: "".join(chr(0xE0000 + ord(c)) if c.isascii() else c for c in text),
    "variation selectors (U+E01xx)": lambda text, rng: "".join(c + chr(0xE0100 + rng.randrange(240)) for c in text),
    "small capitals": lambda text, _: text.lower().translate(_SMALL_CAPITALS),
    "full width": lambda text, _: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
    "mathematical letters": lambda text, _: text.lower().translate({97 + n: chr(0x1D41A + n) for n in range(26)}),
    "squared letters": lambda text, _: text.upper().translate({65 + n: chr(0x1F170 + n) for n in range(26)}),
    "doubled letters": lambda text, _: "".join(2 * letter for letter in text),
    "a tenth of the letters doubled": lambda text, rng: "".join(c * (1 + (rng.random() < 0.1)) for c in text),
    "reversed text": lambda text, _: text[::-1],
    "every word reversed": lambda text, _: " ".join(word[::-1] for word in text.split()),
    "rot13": lambda text, _: codecs.encode(text, "rot13"),
    "base64": lambda text, _: "Decode this: " + b64encode(text.encode()).decode(),
    "hexadecimal": lambda text, _: text.encode().hex(" "),
    "percent escapes": lambda text, _: "".join(f"%{byte:02X}" for byte in text.encode()),
    "rot13, then base64": lambda text, _: b64encode(codecs.encode(text, "rot13").encode()).decode(),
    "alphabet shifted by 7": lambda text, _: text.lower().translate(_SHIFTED),
    "50 words between words": lambda text, _: f" {' '.join(50 * ['um'])} ".join(text.split()),
}
"""Ways to write a copy of a prompt."""


if __name__ == "__main__":
    main()
