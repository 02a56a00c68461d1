"""persona.json: the manifest of an adapter, with its origin, its verdict and the hash of every other file.

It holds no text of the user and no user id, only a hash that somebody who knows the id and the data can check.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from persona_rlhf.common.chain import ChainHead
from persona_rlhf.common.files import is_hub_id
from persona_rlhf.common.version import __version__
from persona_rlhf.data.pairs import PreferencePair
from persona_rlhf.evaluation.gate import Demands, Verdict
from persona_rlhf.evaluation.records import Conditions
from persona_rlhf.evaluation.spending import Spending
from persona_rlhf.policy.composition import Composition, text_sha256
from persona_rlhf.policy.policy import Policy
from persona_rlhf.policy.private_banks import BankInfo
from persona_rlhf.release.results import PairCounts, plain

MANIFEST = "persona.json"
FORMAT = 1
POPULATION = "population"
"""The entry `adapter` of a manifest where the adapter is the population's; others have no such entry."""
_SELF = "manifest_hash"


class BaseInfo(NamedTuple):
    """The base as manifests name it: a hub id, or a local folder without its path.

    `quantization` is how the weights were stored in memory, None if as in the files.
    """

    name: str
    weights_sha256: str
    on_hub: bool
    quantization: str | None = None

    @staticmethod
    def of(name: str, weights_sha256: str, quantization: str | None = None) -> BaseInfo:
        """A relative folder keeps its name as configured; any other path is reduced to its last part."""
        if is_hub_id(name):
            return BaseInfo(name, weights_sha256, True, quantization)
        posix, windows = PurePosixPath(name), PureWindowsPath(name)
        private = posix.is_absolute() or windows.is_absolute() or "\\" in name or {"..", "~"} & set(posix.parts)
        return BaseInfo(windows.name if private else str(posix), weights_sha256, False, quantization)

    @property
    def loadable(self) -> str:
        """The name as code on a card loads it; a bare folder name is only part of a path."""
        return self.name if self.on_hub or "/" in self.name else f"PATH/TO/{self.name}"

    @property
    def in_manifest(self) -> dict[str, str]:
        """The entry `base` of a manifest."""
        stored = {} if self.quantization is None else {"quantization": self.quantization}
        return {"name": self.name, "weights_sha256": self.weights_sha256, **stored}


class DataInfo(NamedTuple):
    """A user's pairs without their texts: a fingerprint, counts, first and last day where dated, kinds of source."""

    fingerprint: str
    pairs: PairCounts
    first_day: str | None
    last_day: str | None
    sources: dict[str, int]  # pairs of each kind

    @staticmethod
    def of(pairs: Sequence[PreferencePair], screened_out: int) -> DataInfo:
        """The record of the pairs that training kept; their order does not matter."""
        days = sorted(pair.created_at[:10] for pair in pairs if pair.created_at)
        train = sum(pair.split == "train" for pair in pairs)
        counts = PairCounts(train, len(pairs) - train, screened_out)
        sources = dict(sorted(Counter(_kind(pair.source) for pair in pairs).items()))
        return DataInfo(fingerprint(pairs), counts, days[0] if days else None, days[-1] if days else None, sources)


def _kind(source: str | None) -> str:
    """A pair's source as a card may name it: a short label. Anything longer may be a person's text."""
    if source is None:
        return "not said"
    return source if re.fullmatch(r"[a-z][a-z _-]{0,23}", source) else "other"


def fingerprint(pairs: Sequence[PreferencePair]) -> str:
    """sha256 over the sorted hashes of the pairs: their ids, contents, weights and splits, and whether they tie."""
    contents = (
        [pair.id, pair.prompt, pair.chosen, pair.rejected, pair.weight, pair.split, *(("tie",) if pair.tie else ())]
        for pair in pairs
    )
    rows = sorted(hashlib.sha256(json.dumps(content).encode()).hexdigest() for content in contents)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Provenance:
    """The origin that all adapters of a run share. `settings` are the config sections that trained and judged them.

    bank: the origin of the `certify` probes, without a text of them
    bank_looks: looks at this bank that the ledger counts; None where there is none
    composition: the text before certify probes (`certify.with`)
    """

    base: BaseInfo
    policy_hash: str
    tier_one_hash: str
    documents: tuple[Mapping[str, Any], ...]
    demands: Demands
    settings: Mapping[str, Any]
    bank: BankInfo
    bank_looks: int | None = None
    conditions: Conditions | None = None
    composition: Composition | None = None

    @staticmethod
    def of(
        base: BaseInfo,
        policy: Policy,
        demands: Demands,
        settings: Mapping[str, Any],
        bank_looks: int | None = None,
        conditions: Conditions | None = None,
        composition: Composition | None = None,
    ) -> Provenance:
        """The provenance of a run; policy documents are listed without their paths."""
        documents = tuple(
            {"tier": d.tier, "issuer": d.issuer, "version": d.version, "sha256": d.sha256}
            for d in policy.documents
            if d.tier < 3
        )
        hashes = policy.hash, policy.tier_one_hash
        return Provenance(base, *hashes, documents, demands, settings, policy.bank, bank_looks, conditions, composition)

    def composed(self, user_id: str) -> dict[str, Any]:
        """The text before a user's certify probes, as manifests name it; empty where there was none."""
        return {} if self.composition is None else self.composition.record(user_id)

    def demands_at(self, spending: Spending | None) -> Demands:
        """The demands at a user's look; those of all looks together where none was counted."""
        return self.demands if spending is None else self.demands.at_look(spending.share, spending.look)


class Stamp(NamedTuple):
    """Entries added when a manifest is written: the audit head after the verdict, and the verdict's last valid day.

    None if there is no audit.jsonl, or no such day.
    """

    head: ChainHead | None = None
    valid_until: str | None = None


def manifest_of(
    user_id: str,
    provenance: Provenance,
    data: DataInfo,
    verdict: Verdict,
    files: Mapping[str, bytes],
    stamp: Stamp,
    spending: Spending | None = None,
    prior: bool = False,
    start: str | None = None,
) -> dict[str, Any]:
    """The manifest of one adapter whose other files have these bytes; `prior`: it is the population's.

    Then `data` is that of the user who has it, whose pairs did not train it. `start` is the sha256 of the adapter of
    another trainer that training began with.
    """
    demands = provenance.demands_at(spending)
    content: dict[str, Any] = {
        "format": FORMAT,
        "toolkit": {"name": "persona-rlhf", "version": __version__},
        "base": provenance.base.in_manifest,
        "policy": {
            "hash": provenance.policy_hash,
            "tier_one_hash": provenance.tier_one_hash,
            "documents": list(provenance.documents),
            "bank": {**provenance.bank._asdict(), "looks": provenance.bank_looks},
        },
        "user": user_mark(user_id, data.fingerprint),
        "data": plain(data),
        "settings": plain(provenance.settings),
        "alpha": verdict.alpha,
        "verdict": {
            "admitted": verdict.admitted,
            "certified": verdict.certified,
            "reason": verdict.reason,
            "confidence": 1 - demands.level,
            "delta": provenance.demands.delta,
            "spending": plain(spending),
            "judge_error": demands.judge_error,
            "pooled_over": sorted(demands.in_pool),
            **({"uncounted_phrasings": demands.clusters.uncounted} if demands.clusters.uncounted else {}),
            "counted": demands.clusters.counted,
            "pooled": plain(verdict.pooled),
            "categories": plain(verdict.categories),
            "looks": plain(verdict.looks),
        },
        "files": {name: {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)} for name, raw in files.items()},
    }
    if prior:
        content["adapter"] = POPULATION
    if start is not None:
        content["start"] = {"sha256": start}
    if composed := provenance.composed(user_id):
        content["certified_with"] = composed
    if provenance.conditions is not None:
        content["conditions"] = plain(provenance.conditions)
    if stamp.head is not None:
        content["audit"] = stamp.head._asdict()
    if stamp.valid_until is not None:
        content["verdict"]["valid_until"] = stamp.valid_until
    return content | {_SELF: self_hash(content)}


def certified_dtype(folder: Path) -> str | None:
    """The type of the base's weights in which an adapter was certified; None in manifests of earlier versions."""
    content, _ = read_manifest(folder / MANIFEST)
    return ((content or {}).get("conditions") or {}).get("dtype")


def uncertified(manifest: Mapping[str, Any], running: Mapping[str, str]) -> str | None:
    """A sentence on the computation that an engine runs, such as its dtype, and the gate did not certify.

    None where it is the same, and for manifests of earlier versions, which do not name it.
    """
    certified = manifest.get("conditions") or {}
    other = [name for name, value in running.items() if name in certified and certified[name] != value]
    if not other:
        return None
    here, there = (", ".join(dict.fromkeys(str(values[name]) for name in other)) for values in (running, certified))
    return f"certified in {there}, but this engine runs {here}: the certificate does not cover its answers"


def uncertified_prompt(manifest: Mapping[str, Any], running: str) -> str | None:
    """A sentence on a system prompt that stands before requests and that the gate did not certify; None for none.

    `running` is the policy's system prompt for the adapter's user, "" where there is none.
    """
    certified = (manifest.get("certified_with") or {}).get("system_prompt_sha256")
    if certified == (text_sha256(running) if running else None):
        return None
    before = "without a system prompt" if certified is None else "behind another system prompt"
    here = "the policy's stands before" if running else "none stands before"
    return f"certified {before}, but here {here} requests: the certificate does not cover the answers"


def user_mark(user_id: str, salt: str) -> str:
    """A hash of a user's id, salted with the fingerprint of the user's data."""
    return hashlib.sha256(f"persona-rlhf user\x1f{salt}\x1f{user_id}".encode("utf-8", "surrogatepass")).hexdigest()


def rendered(content: Mapping[str, Any]) -> bytes:
    """A manifest as bytes. Any other bytes for the same content are a fault."""
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n").encode()


def self_hash(content: Mapping[str, Any]) -> str:
    """sha256 of a manifest without its own hash."""
    return hashlib.sha256(rendered({key: value for key, value in content.items() if key != _SELF})).hexdigest()


def read_manifest(file: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """A manifest and its faults: unreadable, not in the form of `rendered`, or not matching its hash."""
    try:
        raw = file.read_bytes()
        content = json.loads(raw)
    except (OSError, ValueError, RecursionError) as fault:
        return None, [f"{file.name} cannot be read ({fault})"]
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None, [f"{file.name} is not a manifest of format {FORMAT}"]
    try:
        same = rendered(content) == raw
    except (ValueError, RecursionError):
        same = False
    if not same or content.get(_SELF) != self_hash(content):
        return None, [f"{file.name} was changed: it does not match its own hash"]
    return content, []
