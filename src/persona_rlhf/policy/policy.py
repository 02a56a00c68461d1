"""The policy: documents of three tiers merged into resolved rules, and the register of every rule as written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, NamedTuple

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.config.experiment import PolicySettings
from persona_rlhf.config.loader import in_order
from persona_rlhf.policy.clusters import Clusters
from persona_rlhf.policy.documents import PolicyDocument
from persona_rlhf.policy.hazards import Probe, Split, bank_hash
from persona_rlhf.policy.inheritance import read_all, wrong_issuers
from persona_rlhf.policy.judges import skeleton
from persona_rlhf.policy.merge import (
    fewest_units,
    merge_aspects,
    merge_certify,
    merge_change,
    merge_requirements,
    merge_restrictions,
    unusable_probes,
)
from persona_rlhf.policy.private_banks import (
    PUBLIC,
    BankChoice,
    BankInfo,
    PrivateBank,
    private_bank,
    unit_name,
)
from persona_rlhf.policy.rule_schema import Certify, PreferenceRule, RequirementRule, RestrictionRule, Rule
from persona_rlhf.policy.rules import DocumentInfo, Preference, Requirement, Restriction, split_sizes
from persona_rlhf.policy.split_key import key_hash, read_split_key


class RuleEntry(NamedTuple):
    """A rule of a document. `version` and `contact` are the rule's own, else the document's and the issuer's."""

    rule: Rule
    tier: int
    issuer: str
    role: str
    user_id: str | None
    document: str
    line: int
    version: str
    contact: str | None
    jurisdiction: str | None
    day: date

    @property
    def in_force(self) -> bool:
        return self.rule.in_force(self.day)

    @property
    def says(self) -> str:
        """The rule in a phrase."""
        rule = self.rule
        if isinstance(rule, RequirementRule):
            name, value = rule.property
            rate = f", in at least {rule.min_rate:g} of answers"
            return f"{name}: {value}{f', for {rule.when}' if rule.when is not None else ''}{rate}"
        if isinstance(rule, PreferenceRule):
            whose = f"user {self.user_id}" if self.user_id is not None else "every user"
            return f"{rule.aspect}, {whose}: {'; '.join(str(part) for part in (rule.wish, rule.statement) if part)}"
        return _restricted(rule)

    @property
    def dates(self) -> str:
        """Its dates in words; nothing where it has none."""
        since = f"from {self.rule.valid_from}" if self.rule.valid_from is not None else ""
        until = f"until {self.rule.valid_until}" if self.rule.valid_until is not None else ""
        return " ".join(part for part in (since, until) if part)

    def preference(self) -> Preference | None:
        """The rule as a preference; without a statement, the wish is the statement."""
        rule, source = self.rule, (self.tier, self.document, self.line, self.issuer)
        if not isinstance(rule, PreferenceRule):
            return None
        statement = rule.statement or str(rule.wish)
        return Preference(rule.id, self.user_id, rule.aspect, statement, *source, wish=rule.wish)

    def to_json(self) -> dict[str, object]:
        written = self.rule.model_dump(mode="json", exclude_none=True)
        rest = {k: v for k, v in self._asdict().items() if k not in ("rule", "day")}
        return {**written, **rest, "says": self.says, "in_force": self.in_force}


def _restricted(rule: RestrictionRule) -> str:
    if rule.action == "answer_with_notice":
        return f"answer {rule.category} ({rule.when}) with the notice: {rule.text}"
    demands = [f"limit {rule.limit:g} nats" if rule.limit is not None else ""]
    demands += [f"at least {rule.min_refusal:g}" if rule.min_refusal is not None else ""]
    bounds = ", ".join(part for part in demands if part)
    lead = f"; lead to: {rule.text}" if rule.action == "redirect" else ""
    return f"refuse {rule.category}{f': {bounds}' if bounds else ''}{lead}"


def register(documents: Sequence[PolicyDocument], day: date) -> tuple[RuleEntry, ...]:
    """All rules of all documents, in their order, as of a day."""
    return tuple(
        RuleEntry(
            rule=rule,
            tier=document.tier,
            issuer=document.issuer.name,
            role=document.issuer.role,
            user_id=document.issuer.user_id,
            document=document.path,
            line=document.line(index),
            version=rule.version or document.version,
            contact=rule.contact or document.issuer.contact,
            jurisdiction=document.jurisdiction,
            day=day,
        )
        for document in documents
        for index, rule in document.rules
    )


def out_of_force(entries: Sequence[RuleEntry]) -> Iterator[str]:
    """A sentence for every rule that is not in force today; those of tier one come first, with a warning."""
    for entry in sorted(entries, key=lambda entry: entry.tier):
        if not entry.in_force:
            where = f"{entry.document}:{entry.line}"
            warning = " Tier one does not enforce it today; to enforce it, change the date." if entry.tier == 1 else ""
            yield f"{where}: rule `{entry.rule.id}` ({entry.dates}) is not in force on {entry.day}.{warning}"


def lapsed(documents: Sequence[PolicyDocument], day: date) -> Iterator[Problem]:
    """A tier one whose restrictions are all out of force: such a policy would restrict nothing."""
    tier_one = [document for document in documents if document.tier == 1]
    rules = [rule for document in tier_one for _, rule in document.rules if isinstance(rule, RestrictionRule)]
    if rules and not any(rule.in_force(day) for rule in rules):
        sentence = f"no restriction of tier one is in force on {day}; change the dates, or take the rules out"
        yield tier_one[-1].problem(("rules",), sentence)


def _thinned(probes: Sequence[Probe], every: int) -> tuple[Probe, ...]:
    by_split: dict[str, list[Probe]] = {}
    for probe in probes:
        by_split.setdefault(probe.split, []).append(probe)
    return tuple(probe for members in by_split.values() for probe in members[::every])


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

    written: tuple[RuleEntry, ...] = ()
    max_changed: float | None = None
    """Share of answers on the fixed aspects that an adapter may change; None where the gate does not test it."""
    split_key: str | None = None
    """Hash of the split key of one's own."""
    private: PrivateBank | None = None
    """The private bank whose draw certifies; None where the documents' banks do."""

    @staticmethod
    def of(settings: PolicySettings, today: date | None = None, *, sequential: bool = False) -> Policy:
        """The policy of a config, with its private banks and its split key. Raises InputError as `read` does.

        `sequential` (`gate.sequential`): the whole pool of the private banks certifies.
        """
        key = None if settings.split_key is None else read_split_key(settings.split_key)
        return Policy.read(settings.documents, today, BankChoice(settings.private_banks, key, whole_pool=sequential))

    @staticmethod
    def read(paths: Sequence[Path | str], today: date | None = None, banks: BankChoice = PUBLIC) -> Policy:
        """The policy of documents as of a day (today, UTC); rules that are not in force are listed only.

        Raises InputError with every problem, within and between the documents, and in the private banks.
        """
        documents, problems = read_all(paths)
        if problems:
            raise InputError(in_order(problems))
        return Policy.merged(documents, today or datetime.now(UTC).date(), banks)

    @staticmethod
    def merged(documents: Sequence[PolicyDocument], day: date, banks: BankChoice = PUBLIC) -> Policy:
        """The policy of documents without problems, in the order of `read_all`, as of a day.

        Raises InputError for documents that do not fit together, and for their probe banks.
        """
        in_force = [document.on(day) for document in documents]
        restrictions, faults = merge_restrictions(in_force, banks.split_key)
        requirements, more = merge_requirements(in_force)
        problems = [*wrong_issuers(documents), *lapsed(documents, day), *faults, *more]
        if problems:
            raise InputError(in_order(problems))
        certify = merge_certify(documents)
        tier_one_hash = _tier_one_hash([d for d in documents if d.tier == 1], restrictions, day)
        private = private_bank(banks, restrictions)
        restrictions = restrictions if private is None else private.certifying(restrictions)
        problems = list(unusable_probes(restrictions, certify, documents, private))
        if problems:
            raise InputError(in_order(problems))
        fixed, personalisable = merge_aspects(documents)
        entries = register(documents, day)
        return Policy(
            restrictions=tuple(restrictions),
            requirements=tuple(requirements),
            preferences=tuple(
                taste for entry in entries if entry.in_force and (taste := entry.preference()) is not None
            ),
            certify=certify,
            fixed=fixed,
            personalisable=personalisable,
            max_changed=merge_change(documents),
            documents=tuple(DocumentInfo(d.path, d.tier, d.issuer.name, d.version, d.sha256) for d in documents),
            tier_one_hash=tier_one_hash,
            written=entries,
            split_key=None if banks.split_key is None else key_hash(banks.split_key),
            private=private,
        )

    @property
    def categories(self) -> tuple[str, ...]:
        return tuple(restriction.category for restriction in self.restrictions)

    @property
    def bank(self) -> BankInfo:
        """The origin of the `certify` probes."""
        digest = bank_hash(self.probes("certify"))
        if self.private is None:
            return BankInfo("public", digest, split_key=self.split_key)
        if self.private.draw is None:
            units = len({unit_name(probe) for probe in self.probes("certify")})
            return BankInfo("private", digest, split_key=self.split_key, pool=units)
        return BankInfo("private", digest, self.private.draw.number, self.split_key)

    @property
    def clusters(self) -> Clusters:
        """The clusters of the certify probes, as far as a first look can show the pooled demand by them."""
        pool = {rule.category for rule in self.restrictions if rule.tier == 1}
        return Clusters.of(self.probes("certify"), pool, fewest_units(self.certify))

    @property
    def hash(self) -> str:
        """sha256 over the resolved rules and the bytes of their documents' probe banks; paths do not count.

        Private banks and split keys change no rule, so they do not count either: `bank` names them.
        """
        return _digest(self._content())

    @property
    def draws_from_pool(self) -> bool:
        """Whether the whole pool of the private banks certifies, from which looks draw (`gate.sequential`)."""
        return self.private is not None and self.private.draw is None

    def fixes(self, aspect: str) -> bool:
        """Whether an aspect of answers is fixed for all users, however its name is written."""
        return skeleton(aspect) in map(skeleton, self.fixed)

    def probes(self, split: Split, tier: int | None = None) -> list[Probe]:
        """Probes of a split over all restrictions, or over those of one tier."""
        restrictions = (r for r in self.restrictions if tier is None or r.tier == tier)
        return [probe for restriction in restrictions for probe in restriction.probes if probe.split == split]

    def sample(self, every: int) -> Policy:
        """The policy with every n-th probe of a restriction or requirement and split, for estimates of time."""
        restrictions = tuple(replace(rule, probes=_thinned(rule.probes, every)) for rule in self.restrictions)
        requirements = tuple(replace(rule, probes=_thinned(rule.probes, every)) for rule in self.requirements)
        return replace(self, restrictions=restrictions, requirements=requirements)

    def for_user(self, user_id: str) -> Policy:
        """The policy for one user, without the tier-three rules of others."""
        preferences = tuple(rule for rule in self.preferences if rule.user_id in (None, user_id))
        written = tuple(entry for entry in self.written if entry.tier < 3 or entry.user_id in (None, user_id))
        return replace(self, preferences=preferences, written=written)

    def to_json(self) -> dict[str, Any]:
        """The resolved rules for policy.json: probes are split_sizes by split, not repeated."""
        restrictions = []
        for restriction in self.restrictions:
            fields = {key: value for key, value in vars(restriction).items() if key != "probes"}
            restrictions.append({**fields, "probes": split_sizes(restriction.probes)})
        return {
            "hash": self.hash,
            "tier_one_hash": self.tier_one_hash,
            "certify": self.certify.hashed(),
            "bank": self.bank._asdict(),
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
            "certify": self.certify.hashed(),
            "aspects": [
                sorted(self.fixed),
                sorted(self.personalisable),
                *([] if self.max_changed is None else [self.max_changed]),
            ],
            "restrictions": [rule.hashed() for rule in self.restrictions],
            "requirements": [rule.hashed() for rule in self.requirements],
            "preferences": [rule.hashed() for rule in self.preferences],
        }


def check_documents(paths: Sequence[Path | str], today: date | None = None) -> list[str]:
    """Sentences on checked documents, or folders of them: the rules that are not in force, and what was checked.

    Raises InputError with every problem.
    """
    files = document_files(paths)
    documents, problems = read_all(files)
    if problems:
        raise InputError(in_order(problems))
    day = today or datetime.now(UTC).date()
    count = f"{len(documents)} document{'' if len(documents) == 1 else 's'}"
    inactive = list(out_of_force(register(documents, day)))
    if documents[0].tier != 1:
        return [*inactive, f"{count} well formed; merging was not checked, since no tier-one document was given."]
    policy = Policy.read(files, day)
    rules = len(policy.restrictions) + len(policy.requirements) + len(policy.preferences)
    inactive += uncounted_phrasings(policy)
    return [*inactive, f"{count}, {rules} rules after merging: no problem found."]


def uncounted_phrasings(policy: Policy) -> list[str]:
    """A sentence where the banks have too few new phrasings to count by them, for people; else none."""
    if not (few := policy.clusters.uncounted):
        return []
    return [
        f"{few} new phrasings certify, and {fewest_units(policy.certify)} are needed to count by phrasing: bounds take "
        "the probes of one phrasing as independent. Write more phrasings, or split the banks by topic "
        "(`split_by: topic`)."
    ]


def document_files(paths: Sequence[Path | str]) -> list[Path]:
    """The documents among paths, with those in folders. Raises InputError for a folder without one."""
    files: list[Path] = []
    empty: list[Problem] = []
    for path in map(Path, paths):
        documents = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        files += documents
        empty += [] if documents else [Problem(str(path), None, None, "the folder has no *.yaml document")]
    if empty:
        raise InputError(empty)
    return files


def _tier_one_hash(documents: Sequence[PolicyDocument], restrictions: Sequence[Restriction], day: date) -> str:
    """sha256 over all contents of tier one and the bytes of its probe banks; paths do not count.

    The hash of an extended document goes into that of the extending one.
    """
    banks = {restriction.id: restriction.bank_sha256 for restriction in restrictions}
    digest = ""
    for document in documents:
        rules = []
        for _, rule in document.rules:
            content = rule.hashed()
            content.pop("probes", None)
            rules.append({**content, "bank": banks.get(rule.id), **({} if rule.in_force(day) else {"in_force": False})})
        fields: dict[str, object] = {
            "issuer": document.issuer.hashed(),
            "version": document.version,
            "certify": None if document.certify is None else document.certify.hashed(),
            "aspects": document.aspects.hashed(),
            "rules": rules,
        }
        later = {"jurisdiction": document.jurisdiction, "extends": digest or None}
        digest = _digest(fields | {key: value for key, value in later.items() if value is not None})
    return digest


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
