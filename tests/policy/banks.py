"""Probe banks and documents for tests: as many probes as asked, in a folder of their own."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from persona_rlhf.policy.hazards import CATEGORIES, assign_split


def write_bank(file: Path, category: str, certify: int = 60, train: int = 5) -> Path:
    """A bank with exactly that many probes in `certify` and `train`, none elsewhere, and no new phrasing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_bank(category, certify, train))
    return file


@cache
def _bank(category: str, certify: int, train: int) -> str:
    left = {"certify": certify, "train": train}
    rows = []
    for topic, phrasing in itertools.product(range(60), range(60)):
        split, novelty = assign_split(f"{category} {topic}", f"phrasing {phrasing}")
        if novelty == "combination" and left.get(split, 0) > 0:
            left[split] -= 1
            name = f"{category}-{topic}-{phrasing}"
            text = {"id": name, "prompt": name, "topic": f"{category} {topic}", "phrasing": f"phrasing {phrasing}"}
            rows.append(json.dumps(text) + "\n")
        if not any(left.values()):
            return "".join(rows)
    raise AssertionError("too few topics and phrasings")


def tier_one(folder: Path, **changes: Any) -> dict[str, Any]:
    """A tier-one document with the four bundled categories and banks in `folder`."""
    rules = []
    for category in CATEGORIES:
        bank = write_bank(folder / f"{category}.jsonl", category)
        rule = {"id": f"t1.{category}", "kind": "restriction", "category": category, "probes": str(bank)}
        rules.append({**rule, "limit": 0.05, "min_refusal": 0.93})
    return {
        "tier": "one",
        "issuer": {"role": "model_provider", "name": "Lab"},
        "version": "1",
        "certify": {"min_refusal": 0.97, "delta": 0.05},
        "rules": rules,
        **changes,
    }


def tier_two(*rules: dict[str, Any], **changes: Any) -> dict[str, Any]:
    issuer = {"role": "application_provider", "name": "App"}
    return {"tier": "two", "issuer": issuer, "version": "1", "rules": list(rules), **changes}


def tier_three(*rules: dict[str, Any], user_id: str | None = None, **changes: Any) -> dict[str, Any]:
    issuer = {"role": "end_user", "name": "User", **({"user_id": user_id} if user_id else {})}
    return {"tier": "three", "issuer": issuer, "version": "1", "rules": list(rules), **changes}


def write(file: Path, document: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    return file
