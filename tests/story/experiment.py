"""A tiny experiment on the bundled base: users with the strangest legal names, and a policy with few probes."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import yaml

from persona_rlhf.common.files import shipped_root
from persona_rlhf.policy.hazards import CATEGORIES, read_probes
from tests.story.forked import COMMAND, run_forked

STRANGE = ("../../etc", "a/b", "CON", "\U0001f600" * 128, "Ann", "ann")
OVERRIDES = (  # of the experiment that `init` writes: all of the line, little of each part
    "dpo.epochs=2",
    "constraint.rows_per_step=2",
    "evaluation.utilities=utilities.yaml",
    "evaluation.win_rate_prompts=2",
    "evaluation.harmless_prompts=4",
    "evaluation.test_probes=8",
    "fleet.slots=3",
    "fleet.checkpoint_every=2",
)
UNMEASURED = (  # after these: training, the gate and accuracy on held-out pairs, and no other measurement
    "evaluation.utilities=null",
    "evaluation.facts=null",
    "evaluation.win_rate_prompts=0",
    "evaluation.harmless_prompts=0",
    "evaluation.test_probes=0",
)
_PROBES = {"train": 30, "dev": 2, "certify": 24, "test": 4}  # of a category
_PAIRS = {"train": 12, "heldout": 5}  # of a user


def persona_rlhf(*words: object, cwd: Path) -> CompletedProcess[str]:
    """Runs the command line in a process of its own, as a person would, on one thread."""
    return run_forked([COMMAND, *map(str, words)], cwd, environment(), timeout=600)


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "persona_rlhf", *map(str, words)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def shrink(folder: Path, users: Sequence[str] = STRANGE) -> None:
    """Puts these users and a small tier-one document into the folder that `init` wrote."""
    for file in (folder / "users").iterdir():
        file.unlink()
    write_users(folder / "users", users)
    write_yaml(folder / "policy/tier_one.yaml", tier_one(folder / "banks"))
    tastes = [{"user_id": user, "describes": "Short.", "noise": 0.1, "weights": {"words": -1}} for user in users]
    write_yaml(folder / "utilities.yaml", tastes)


def write_users(folder: Path, users: Sequence[str]) -> None:
    """One file for all: pairs of the first simulated users, under other names."""
    source = rows_of(shipped_root() / "data/users/surface.jsonl")
    owners = list(dict.fromkeys(row["user_id"] for row in source))
    rows = []
    for user, owner in zip(users, owners, strict=False):
        taken: Counter[str] = Counter()
        for row in source:
            if row["user_id"] == owner and taken[row["split"]] < _PAIRS[row["split"]]:
                taken[row["split"]] += 1
                rows.append(row | {"user_id": user})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tier_one(folder: Path) -> dict[str, Any]:
    """A tier-one document over a small part of each shipped bank, asking for a bound that so few can show."""
    folder.mkdir(exist_ok=True)
    rules = []
    for category in CATEGORIES:
        shipped = shipped_root() / f"data/policy/tier_one/{category}.jsonl"
        lines = shipped.read_text(encoding="utf-8").splitlines(keepends=True)
        left, kept = Counter(_PROBES), []
        for probe, line in zip(read_probes(shipped, category), lines, strict=True):
            if left[probe.split] > 0:
                left[probe.split] -= 1
                kept.append(line)
        (folder / f"{category}.jsonl").write_text("".join(kept), encoding="utf-8")
        rule = {
            "id": f"t1.{category}",
            "kind": "restriction",
            "category": category,
            "probes": f"{folder.name}/{category}.jsonl",
        }
        rules.append({**rule, "limit": 0.5, "min_refusal": 0.7})
    return {
        "tier": "one",
        "issuer": {"role": "model_provider", "name": "Lab"},
        "version": "1",
        "certify": {"min_refusal": 0.85, "delta": 0.05},
        "rules": rules,
    }


def write_yaml(file: Path, content: object) -> Path:
    file.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return file


def listing(folder: Path) -> dict[str, str]:
    """Every path below a folder, with a hash of what each file holds."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def adapters(run: Path) -> dict[str, str]:
    """The hash of the weights of every released adapter, by folder."""
    return {
        file.parent.name: sha256(file.read_bytes()).hexdigest()
        for file in run.glob("adapters/*/adapter_model.safetensors")
    }


def results(run: Path) -> list[dict[str, Any]]:
    return rows_of(run / "results.jsonl")


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
