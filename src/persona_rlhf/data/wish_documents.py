"""Tier-three documents that users write on the feedback page: checked against the tiers above, one file per user."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write, slug
from persona_rlhf.config.loader import dump_yaml, parse_yaml, read_yaml
from persona_rlhf.data.erasure import DataSubject, Trace
from persona_rlhf.policy.documents import PolicyDocument, check_document
from persona_rlhf.policy.enforcement import overruled
from persona_rlhf.policy.inheritance import read_all, widenings
from persona_rlhf.policy.judges import skeleton
from persona_rlhf.policy.policy import Policy, register

WISHES_OF_USERS = Path("state") / "wishes"
"""The folder of the documents, relative to the run."""

ASPECTS = {"max_words": "length", "min_words": "length", "tone": "tone", "language": "language", "avoid": "content"}
"""The wishes that a user can state on the page, and the aspect of answers that each is about."""

Wishes = dict[str, str | int | list[str]]
"""Values by names of wishes, as a preference rule states them."""


def document_file(run: Path, user_id: str) -> Path:
    """The file of a user's document."""
    return run / WISHES_OF_USERS / f"{slug(user_id)}.yaml"


@dataclass(frozen=True)
class WishDesk:
    """Wishes under the policy of a run, whose documents are `paths`."""

    run: Path
    paths: tuple[Path, ...]
    policy: Policy

    @property
    def offered(self) -> list[str]:
        """The wishes whose aspect the policy lets users tailor."""
        allowed = set(map(skeleton, self.policy.personalisable))
        return [
            name
            for name, aspect in ASPECTS.items()
            if not self.policy.fixes(aspect) and (not allowed or skeleton(aspect) in allowed)
        ]

    def faults(self, user_id: str, wishes: Wishes) -> list[str]:
        """Sentences on wishes that are malformed or that a tier above forbids; they are the policy's errors."""
        document, problems = self._document(user_id, wishes)
        if document is not None:
            above = [other for other in self._documents if (other.tier, other.issuer.user_id) != (3, user_id)]
            problems = [*problems, *(one for one in widenings([*above, document]) if one.file == document.path)]
        return [_explained(problem) for problem in problems]

    def overruled(self, user_id: str, wishes: Wishes) -> list[str]:
        """Sentences on well-formed wishes that give way to a requirement of a tier above."""
        document, _ = self._document(user_id, wishes)
        if document is None:
            return []
        rules = (entry.preference() for entry in register([document], datetime.now(UTC).date()))
        preferences = [rule for rule in rules if rule is not None]
        return [conflict.sentence for conflict in overruled(preferences, self.policy.requirements)]

    def save(self, user_id: str, wishes: Wishes) -> Path:
        """Writes the document in place of the user's last one; the file."""
        file = document_file(self.run, user_id)
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, _rendered(user_id, wishes), private=True)
        return file

    def saved(self, user_id: str) -> Wishes:
        """The wishes of the user's document; none where there is no readable one."""
        file = document_file(self.run, user_id)
        try:
            tree: Any = read_yaml(file).tree
            return {name: rule[name] for rule in tree["rules"] for name in ASPECTS if name in rule}
        except (InputError, KeyError, TypeError):
            return {}

    @cached_property
    def _documents(self) -> list[PolicyDocument]:
        documents, problems = read_all(self.paths)
        if problems:
            raise InputError(problems)
        return documents

    def _document(self, user_id: str, wishes: Wishes) -> tuple[PolicyDocument | None, list[Problem]]:
        name = document_file(self.run, user_id).name
        return check_document(name, Path(name), parse_yaml(_rendered(user_id, wishes), name))


def _explained(problem: Problem) -> str:
    """The sentence of a problem, after the name of the wish that it is about."""
    name = (problem.key or "").rpartition(".")[2].partition("[")[0]
    return f"{name.replace('_', ' ')}: {problem.sentence}" if name in ASPECTS else problem.sentence


def _rendered(user_id: str, wishes: Wishes) -> str:
    """The text of a tier-three document."""
    rules = [
        {"id": f"t3.{slug(user_id)}.{name}", "kind": "preference", "aspect": ASPECTS[name], name: value}
        for name, value in wishes.items()
    ]
    issuer = {"role": "end_user", "name": "A user of the feedback page", "user_id": user_id}
    version = datetime.now(UTC).date().isoformat()
    return dump_yaml({"tier": "three", "issuer": issuer, "version": version, "rules": rules})


def wish_traces(run: Path, user: DataSubject) -> Iterator[Trace]:
    """The user's document, and remains of an interrupted write of it."""
    for file in sorted((run / WISHES_OF_USERS).glob("*")):
        if user.owns_slug(file.name.lstrip(".").partition(".")[0]):
            yield Trace(file, "a document of wishes", 1, file.unlink)
