"""Hazard categories, probe banks, and the split of every probe by a keyed hash of its topic and phrasing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from persona_rlhf.inputs.problems import InputError, Problem

Split = Literal["train", "dev", "certify", "test"]
Novelty = Literal["combination", "phrasing", "topic"]
SplitBy = Literal["pair", "topic", "held_out"]
"""How a bank's row is split: by topic and phrasing; by its topic, which then lies in one split whole; or by its topic
among all splits but `train`."""

CATEGORIES = ("terrorist_content", "child_sexual_abuse", "threats_of_violence", "sexual_assault")
_KEY = b"persona-rlhf probe split 4"
_WHOLE_TOPICS: tuple[tuple[Split, float], ...] = (("train", 0.17), ("dev", 0.34), ("certify", 0.79), ("test", 1.0))
"""Upper ends of the splits of whole topics: most of them certify, for there one topic is one probe a language."""


class Probe(NamedTuple):
    """One tier-one prompt. `twin` is a harmless near-neighbour that shares its words."""

    id: str
    category: str
    prompt: str
    topic: str
    phrasing: str
    twin: str | None
    split: Split
    novelty: Novelty


def _unit(kind: str, *parts: str) -> float:
    """A number in [0, 1) that depends on nothing but the key and the texts."""
    digest = hashlib.blake2b("\x1f".join((kind, *parts)).encode(), key=_KEY, digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def assign_split(topic: str, phrasing: str) -> tuple[Split, Novelty]:
    """The split of a probe, and what about it is unseen in training.

    A sixth of all topics and a fifth of all phrasings are kept out of `train` whole; of what is left, half of the
    combinations are trained. Unseen topics never reach `certify`: they are reported as a shift, not certified.
    """
    if _unit("topic", topic) < 0.16:
        return ("dev" if _unit("topic split", topic) < 0.45 else "test"), "topic"
    if _unit("phrasing", phrasing) < 0.20:
        u = _unit("phrasing split", phrasing)
        return ("dev" if u < 0.25 else "certify" if u < 0.60 else "test"), "phrasing"
    u = _unit("combination", topic, phrasing)
    split: Split = "train" if u < 0.60 else "dev" if u < 0.70 else "certify" if u < 0.85 else "test"
    return split, "combination"


def assign_topic(topic: str, held_out: bool = False) -> Split:
    """The split of a whole topic; with `held_out`, among all but `train`, in the same proportions.

    Such topics are a random sample of all: what `certify` shows of them is of topics that training has not seen.
    """
    start = _WHOLE_TOPICS[0][1] if held_out else 0.0
    u = start + (1 - start) * _unit("whole topic", topic)
    return next(split for split, end in _WHOLE_TOPICS if u < end)


def unseen_topics_certify(probes: Iterable[Probe]) -> bool:
    """Whether the certify probes have unseen topics; where none has, test probes of such topics are a shift."""
    return any(probe.split == "certify" and probe.novelty == "topic" for probe in probes)


def _assigned(split_by: SplitBy, topic: str, phrasing: str) -> tuple[Split, Novelty]:
    if split_by == "pair":
        return assign_split(topic, phrasing)
    split = assign_topic(topic, held_out=split_by == "held_out")
    return split, ("combination" if split == "train" else "topic")


def read_probes(path: Path, category: str) -> list[Probe]:
    """Reads a bank: JSON lines with `id` and `prompt`, and `topic`, `phrasing`, `twin`, `split_by` where known.

    Raises InputError naming every bad line.
    """
    try:
        if not path.is_file():
            raise OSError("it is no regular file")  # a device may have no end
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as fault:
        raise InputError([Problem(str(path), None, None, f"the probe bank cannot be read ({fault})")]) from None
    problems: list[Problem] = []
    probes: list[Probe] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would also split at U+2028 within a text
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as fault:
            problems.append(Problem(str(path), number, None, f"the line is not JSON ({fault.msg})"))
            continue
        texts = ("id", "prompt", "topic", "phrasing", "twin")
        if not isinstance(row, dict) or any(not isinstance(row.get(k, ""), str | None) for k in texts):
            problems.append(Problem(str(path), number, None, f"a probe is an object with texts {', '.join(texts)}"))
            continue
        if not row.get("id") or not str(row.get("prompt") or "").strip():
            problems.append(Problem(str(path), number, None, "a probe needs a non-empty `id` and `prompt`"))
            continue
        if row["id"] in seen:
            problems.append(Problem(str(path), number, "id", f"`{row['id']}` stands on line {seen[row['id']]} already"))
            continue
        seen[row["id"]] = number
        split_by = row.get("split_by", "pair")
        if split_by not in get_args(SplitBy):
            sentence = f"expected {', '.join(f'`{known}`' for known in get_args(SplitBy))}, got `{split_by}`"
            problems.append(Problem(str(path), number, "split_by", sentence))
            continue
        topic, phrasing = row.get("topic") or row["prompt"], row.get("phrasing") or row["prompt"]
        split, novelty = _assigned(split_by, topic, phrasing)
        probes.append(Probe(row["id"], category, row["prompt"], topic, phrasing, row.get("twin"), split, novelty))
    if not probes and not problems:
        problems.append(Problem(str(path), None, None, "the probe bank is empty"))
    if problems:
        raise InputError(problems)
    return probes
