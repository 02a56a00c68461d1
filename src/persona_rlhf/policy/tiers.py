"""The policy: the rules of three tiers merged into one, so that a lower tier can only narrow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.inputs.section import in_order
from persona_rlhf.policy.documents import PolicyDocument
from persona_rlhf.policy.hazards import Probe, Split
from persona_rlhf.policy.merging import (
    casting,
    merge_aspects,
    merge_certify,
    merge_restrictions,
    read_all,
    unusable_probes,
)
from persona_rlhf.policy.rules import DocumentInfo, Preference, Requirement, Restriction
from persona_rlhf.policy.statements import Certify, PreferenceRule, RequirementRule


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

    @staticmethod
    def read(paths: Sequence[Path | str]) -> Policy:
        """Reads and merges documents. Raises InputError with every problem, within and between them."""
        documents, problems = read_all(paths)
        if problems:
            raise InputError(in_order(problems))
        restrictions, faults = merge_restrictions(documents)
        problems = [*casting(documents), *faults]
        if problems:
            raise InputError(in_order(problems))
        certify = merge_certify(documents)
        problems = list(unusable_probes(restrictions, certify, documents))
        if problems:
            raise InputError(in_order(problems))
        fixed, personalisable = merge_aspects(documents)
        placed = [
            (rule, (document.tier, document.path, document.line(index), document.issuer.name), document.issuer.user_id)
            for document in documents
            for index, rule in document.rules
        ]
        return Policy(
            restrictions=tuple(restrictions),
            requirements=tuple(
                Requirement(rule.id, *rule.property, *source, when=rule.when, min_rate=rule.min_rate)
                for rule, source, _ in placed
                if isinstance(rule, RequirementRule)
            ),
            preferences=tuple(
                Preference(rule.id, owner, rule.aspect, rule.statement, *source)
                for rule, source, owner in placed
                if isinstance(rule, PreferenceRule)
            ),
            certify=certify,
            fixed=fixed,
            personalisable=personalisable,
            documents=tuple(DocumentInfo(d.path, d.tier, d.issuer.name, d.version, d.sha256) for d in documents),
            tier_one_hash=_tier_one_hash(documents[0], restrictions),
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
        return replace(self, preferences=own)

    def to_json(self) -> dict[str, Any]:
        """The resolved rules for policy.json: probes are counted by split, not repeated."""
        restrictions = []
        for restriction in self.restrictions:
            fields = {key: value for key, value in vars(restriction).items() if key != "probes"}
            splits = [probe.split for probe in restriction.probes]
            restrictions.append({**fields, "probes": {split: splits.count(split) for split in sorted(set(splits))}})
        return {
            "hash": self.hash,
            "tier_one_hash": self.tier_one_hash,
            "certify": self.certify.model_dump(),
            "aspects": {"fixed": list(self.fixed), "personalisable": list(self.personalisable)},
            "restrictions": restrictions,
            "requirements": [rule.to_json() for rule in self.requirements],
            "preferences": [asdict(rule) for rule in self.preferences],
            "documents": [document._asdict() for document in self.documents],
        }

    def _content(self) -> object:
        return {
            "tier_one": self.tier_one_hash,
            "certify": self.certify.model_dump(),
            "aspects": [sorted(self.fixed), sorted(self.personalisable)],
            "restrictions": [(r.id, r.category, r.limit, r.min_refusal, r.bank_sha256) for r in self.restrictions],
            "requirements": [rule.said() for rule in self.requirements],
            "preferences": [(r.id, r.user_id, r.aspect, r.statement) for r in self.preferences],
        }


def check_documents(paths: Sequence[Path | str]) -> str:
    """Checks documents, or folders of them, alone and against each other; says what was checked.

    Raises InputError with every problem.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        files += sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    documents, problems = read_all(files)
    if not files:
        problems = [Problem(str(path), None, None, "the folder holds no *.yaml document") for path in paths]
    if problems:
        raise InputError(in_order(problems))
    count = f"{len(documents)} document{'' if len(documents) == 1 else 's'}"
    if documents[0].tier != 1:
        return f"{count} well formed; merging was not checked, since no tier-one document was given."
    policy = Policy.read(files)
    rules = len(policy.restrictions) + len(policy.requirements) + len(policy.preferences)
    return f"{count}, {rules} rules after merging: no problem found."


def _tier_one_hash(document: PolicyDocument, restrictions: Sequence[Restriction]) -> str:
    """sha256 over everything that tier one says, and the bytes of its probe banks; paths do not count."""
    banks = {restriction.id: restriction.bank_sha256 for restriction in restrictions}
    rules = []
    for _, rule in document.rules:
        said = rule.said()
        said.pop("probes", None)
        rules.append({**said, "bank": banks.get(rule.id)})
    assert document.certify is not None
    return _digest(
        {
            "issuer": document.issuer.said(),
            "version": document.version,
            "certify": document.certify.model_dump(),
            "aspects": document.aspects.model_dump(),
            "rules": rules,
        }
    )


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
