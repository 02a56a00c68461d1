"""The policy: the rules of three tiers merged into one, so that a lower tier can only narrow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.inputs.section import in_order
from persona_rlhf.policy.documents import PolicyDocument
from persona_rlhf.policy.hazards import Probe, Split
from persona_rlhf.policy.lineage import casting, read_all
from persona_rlhf.policy.merging import (
    merge_aspects,
    merge_certify,
    merge_change,
    merge_requirements,
    merge_restrictions,
    unusable_probes,
)
from persona_rlhf.policy.register import Entry, lapsed, out_of_force, register
from persona_rlhf.policy.rules import DocumentInfo, Preference, Requirement, Restriction, counted
from persona_rlhf.policy.statements import Certify


@dataclass(frozen=True)
class Policy:
    """The resolved rules. A category has one restriction, a rule one id, and no tier weakens a tier above it."""

    restrictions: tuple[Restriction, ...]
    requirements: tuple[Requirement, ...]
    preferences: tuple[Preference, ...]
    certify: Certify
    fixed: tuple[str, ...]
    personalisable: tuple[str, ...]
    documents: tuple[DocumentInfo, ...]
    tier_one_hash: str

    written: tuple[Entry, ...] = ()
    max_changed: float | None = None
    """Share of answers on the fixed aspects that an adapter may change, where the gate is to ask for it."""

    @staticmethod
    def read(paths: Sequence[Path | str], today: date | None = None) -> Policy:
        """Reads and merges documents, as of a day (today, UTC): rules out of their dates are listed, not in force.

        Raises InputError with every problem, within and between them.
        """
        documents, problems = read_all(paths)
        if problems:
            raise InputError(in_order(problems))
        return Policy.merged(documents, today or datetime.now(UTC).date())

    @staticmethod
    def merged(documents: Sequence[PolicyDocument], day: date) -> Policy:
        """Merges documents that read well and loosen nothing, in the order of `read_all`, as of a day.

        Raises InputError with what is wrong about them together, or with their probe banks.
        """
        in_force = [document.on(day) for document in documents]
        restrictions, faults = merge_restrictions(in_force)
        requirements, more = merge_requirements(in_force)
        problems = [*casting(documents), *lapsed(documents, day), *faults, *more]
        if problems:
            raise InputError(in_order(problems))
        certify = merge_certify(documents)
        problems = list(unusable_probes(restrictions, certify, documents))
        if problems:
            raise InputError(in_order(problems))
        fixed, personalisable = merge_aspects(documents)
        entries = register(documents, day)
        held = [entry for entry in entries if entry.in_force]
        return Policy(
            restrictions=tuple(restrictions),
            requirements=tuple(requirements),
            preferences=tuple(taste for entry in held if (taste := entry.preference()) is not None),
            certify=certify,
            fixed=fixed,
            personalisable=personalisable,
            max_changed=merge_change(documents),
            documents=tuple(DocumentInfo(d.path, d.tier, d.issuer.name, d.version, d.sha256) for d in documents),
            tier_one_hash=_tier_one_hash([d for d in documents if d.tier == 1], restrictions, day),
            written=entries,
        )

    @property
    def categories(self) -> tuple[str, ...]:
        return tuple(restriction.category for restriction in self.restrictions)

    @property
    def hash(self) -> str:
        """sha256 over the resolved rules and the bytes of their probe banks; where the files lie does not matter."""
        return _digest(self._content())

    def probes(self, split: Split, tier: int | None = None) -> list[Probe]:
        """Probes of a split over all restrictions, or over those that one tier issued."""
        wanted = (r for r in self.restrictions if tier is None or r.tier == tier)
        return [probe for restriction in wanted for probe in restriction.probes if probe.split == split]

    def for_user(self, user_id: str) -> Policy:
        """The policy as it is for one user: tier-three rules of others left out."""
        own = tuple(rule for rule in self.preferences if rule.user_id in (None, user_id))
        written = tuple(entry for entry in self.written if entry.tier < 3 or entry.user_id in (None, user_id))
        return replace(self, preferences=own, written=written)

    def to_json(self) -> dict[str, Any]:
        """The resolved rules for policy.json: probes are counted by split, not repeated."""
        restrictions = []
        for restriction in self.restrictions:
            fields = {key: value for key, value in vars(restriction).items() if key != "probes"}
            restrictions.append({**fields, "probes": counted(restriction.probes)})
        return {
            "hash": self.hash,
            "tier_one_hash": self.tier_one_hash,
            "certify": self.certify.model_dump(),
            "aspects": {
                "fixed": list(self.fixed),
                "personalisable": list(self.personalisable),
                **({} if self.max_changed is None else {"max_changed": self.max_changed}),
            },
            "restrictions": restrictions,
            "requirements": [rule.to_json() for rule in self.requirements],
            "preferences": [rule.to_json() for rule in self.preferences],
            "not_in_force": [entry.to_json() for entry in self.written if not entry.in_force],
            "documents": [document._asdict() for document in self.documents],
        }

    def _content(self) -> object:
        return {
            "tier_one": self.tier_one_hash,
            "certify": self.certify.model_dump(),
            "aspects": [
                sorted(self.fixed),
                sorted(self.personalisable),
                *([] if self.max_changed is None else [self.max_changed]),
            ],
            "restrictions": [rule.said() for rule in self.restrictions],
            "requirements": [rule.said() for rule in self.requirements],
            "preferences": [rule.said() for rule in self.preferences],
        }


def check_documents(paths: Sequence[Path | str], today: date | None = None) -> list[str]:
    """Checks documents, or folders of them, alone and against each other; says what was checked, and what is dormant.

    Raises InputError with every problem.
    """
    files = document_files(paths)
    documents, problems = read_all(files)
    if problems:
        raise InputError(in_order(problems))
    day = today or datetime.now(UTC).date()
    count = f"{len(documents)} document{'' if len(documents) == 1 else 's'}"
    dormant = list(out_of_force(register(documents, day)))
    if documents[0].tier != 1:
        return [*dormant, f"{count} well formed; merging was not checked, since no tier-one document was given."]
    policy = Policy.read(files, day)
    rules = len(policy.restrictions) + len(policy.requirements) + len(policy.preferences)
    return [*dormant, f"{count}, {rules} rules after merging: no problem found."]


def document_files(paths: Sequence[Path | str]) -> list[Path]:
    """The documents among paths, with those in folders. Raises InputError for a folder without one."""
    files: list[Path] = []
    empty: list[Problem] = []
    for path in map(Path, paths):
        found = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        files += found
        empty += [] if found else [Problem(str(path), None, None, "the folder holds no *.yaml document")]
    if empty:
        raise InputError(empty)
    return files


def _tier_one_hash(documents: Sequence[PolicyDocument], restrictions: Sequence[Restriction], day: date) -> str:
    """sha256 over everything that tier one says, and the bytes of its probe banks; paths do not count.

    A document that extends another is hashed with the hash of that one.
    """
    banks = {restriction.id: restriction.bank_sha256 for restriction in restrictions}
    digest = ""
    for document in documents:
        rules = []
        for _, rule in document.rules:
            said = rule.said()
            said.pop("probes", None)
            rules.append({**said, "bank": banks.get(rule.id), **({} if rule.in_force(day) else {"in_force": False})})
        content: dict[str, object] = {
            "issuer": document.issuer.said(),
            "version": document.version,
            "certify": None if document.certify is None else document.certify.model_dump(),
            "aspects": document.aspects.said(),
            "rules": rules,
        }
        later = {"jurisdiction": document.jurisdiction, "extends": digest or None}
        digest = _digest(content | {key: value for key, value in later.items() if value is not None})
    return digest


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
