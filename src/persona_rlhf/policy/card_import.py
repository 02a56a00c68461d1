"""A Policy Card read as a policy document; `card_export` says which entries are which keys.

The document is written as a card again and compared. So each entry of the card comes from the document, or belongs to
the details, or is a problem: nothing is dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.config.loader import KeyPath, SourceLocation, YamlDocument, check_section, dotted, in_order
from persona_rlhf.policy.card_export import (
    AND,
    DOCUMENT,
    FIGURES,
    LISTS,
    LISTS_AND_KPIS,
    MARK,
    SECTIONS,
    URN,
    Tree,
    node_at,
    parts_of,
)
from persona_rlhf.policy.card_schema import PolicyCard
from persona_rlhf.policy.documents import ROLE, check_document

_TERM = re.compile(r"([a-z.]+) (==|>=|<=|matches) ")


class ImportedCard(NamedTuple):
    """A card as a policy document (a tree), and the rest of the card, which no policy document has."""

    document: Tree
    details: Tree


def import_card(card: YamlDocument) -> ImportedCard:
    """The document and the details of a card that has our rules, perhaps with other thresholds and conditions.

    Raises InputError with every mistake of the card, every entry that no policy document expresses, and where the
    card has no rules of ours: an action rule of another system has no probes that could test it.
    """
    section, problems = check_section(PolicyCard, card)
    problems = [*card.problems, *problems]
    if section is None or problems:
        raise InputError(in_order(problems))
    reader = _CardReader(card, section)
    tree = reader.document()
    problems = reader.problems
    if not problems:
        places = {(): SourceLocation(card.name, None), **reader.places}
        document, problems = check_document(card.name, Path(card.name), YamlDocument(card.name, tree, places, []))
        if document is not None and not problems:
            details = _rest(section.model_dump(exclude_none=True), parts_of(document), card, problems)
    if problems:
        raise InputError(in_order(problems))
    return ImportedCard(tree, details)


class _CardReader:
    """The entries of a card that are rules of a policy document. `places` are the places of the document's keys."""

    def __init__(self, card: YamlDocument, section: PolicyCard) -> None:
        self._card, self._section = card, section
        self.problems: list[Problem] = []
        self.places: dict[KeyPath, SourceLocation] = {}

    def document(self) -> Tree:
        """The document as a tree; `problems` has what could not be read."""
        tree: Tree = self._header()
        rules = [*self._restrictions(tree), *self._requirements()]
        tree["rules"] = [rule for rule, _ in rules]
        for n, (_, place) in enumerate(rules):
            self.places["rules", n] = self._card.place(place)
        by_id = {rule["id"]: rule for rule in tree["rules"]}
        self._figures(tree, by_id)
        self._notes(tree, by_id)
        return tree

    def _problem(self, path: KeyPath, sentence: str) -> None:
        place = self._card.place(path)
        self.problems.append(Problem(place.file, place.line, dotted(path), sentence))

    def _header(self) -> Tree:
        policies = [one for one in self._section.applicable_policies if one.name.startswith(DOCUMENT)]
        tiers = [one.name.removeprefix(DOCUMENT) for one in policies]
        if len(tiers) != 1 or tiers[0] not in ("one", "two"):
            sentence = (
                f"one entry must be named `{DOCUMENT}one` or `{DOCUMENT}two`. Rules of another system cannot be "
                "imported: no probes test its actions; write a restriction or a requirement for each"
            )
            self._problem(("applicable_policies",), sentence)
            return {}
        (policy,), (tier,) = policies, tiers
        tree: Tree = {"tier": tier, "issuer": {"role": ROLE[tier], "name": self._section.meta.owner}}
        tree["version"] = policy.version or self._section.meta.version
        return tree | ({"jurisdiction": policy.jurisdiction} if policy.jurisdiction else {})

    def _restrictions(self, tree: Tree) -> Iterator[tuple[Tree, KeyPath]]:
        notices = {one.when: one.description for one in self._section.obligations if one.id.startswith("text of ")}
        for n, rule in enumerate(self._section.controls.action_rules):
            if rule.subject != "adapter":
                continue
            path = ("controls", "action_rules", n)
            terms = self._terms(rule.condition, (*path, "condition"))
            aspect = terms.pop(("aspect", "=="), None)
            if rule.action == "personalise" and aspect is not None and not terms:
                kind = "fixed" if rule.effect == "deny" else "personalisable"
                tree.setdefault("aspects", {}).setdefault(kind, []).append(aspect)
                continue
            identity, category = terms.pop(("rule", "=="), None), terms.pop(("request.category", "=="), None)
            if identity is None or category is None or rule.effect == "require_escalation":
                self._problem(path, "no rule of a policy document says this; an adapter refuses a category or answers")
                continue
            action = self._action(rule.effect, notices.get(rule.id), path)
            restriction = {"id": identity, "kind": "restriction", "category": category}
            yield restriction | action | self._scope(terms, (*path, "condition")), path

    def _action(self, effect: str, text: str | None, path: KeyPath) -> Tree:
        if effect == "allow" and text is None:
            self._problem(
                path, "an allowed category needs a notice: an obligation `text of RULE` whose `when` is the id"
            )
        if text is None:
            return {}
        return {"action": "answer_with_notice" if effect == "allow" else "redirect", "text": text}

    def _requirements(self) -> Iterator[tuple[Tree, KeyPath]]:
        for n, obligation in enumerate(self._section.obligations):
            if obligation.evidence_required != [f"min_rate of {obligation.id}"]:
                continue
            path = ("obligations", n)
            name, _, value = obligation.description.partition(": ")
            try:
                stated = {name: json.loads(value)}
            except ValueError:
                self._problem(
                    (*path, "description"), "expected a property and its value as JSON, such as max_words: 40"
                )
                continue
            terms = {} if obligation.when is None else self._terms(obligation.when, (*path, "when"))
            rule = {"id": obligation.id, "kind": "requirement", **stated}
            yield rule | self._scope(terms, (*path, "when")), path

    def _terms(self, text: str, path: KeyPath) -> dict[tuple[str, str], str]:
        try:
            return _read(text)
        except ValueError:
            self._problem(path, 'expected terms such as request.category == "terrorist_content", joined by &&')
            return {}

    def _scope(self, terms: dict[tuple[str, str], str], path: KeyPath) -> Tree:
        keys: dict[tuple[str, str], tuple[str, ...]] = {
            ("request.topic", "=="): ("when", "topic"),
            ("request.text", "matches"): ("when", "pattern"),
            ("day", ">="): ("valid_from",),
            ("day", "<="): ("valid_until",),
        }
        tree: Tree = {}
        for (name, operator), value in terms.items():
            if (key := keys.get((name, operator))) is None:
                self._problem(path, f"no policy document has a condition on `{name} {operator}`")
                continue
            node_at(tree, key[:-1])[key[-1]] = value
        return tree

    def _figures(self, tree: Tree, by_id: Mapping[str, Tree]) -> None:
        for n, detector in enumerate(self._section.monitoring.detectors):
            if not detector.uri.startswith(URN):
                continue
            key, _, rule = detector.uri.removeprefix(URN).partition(":")
            section = by_id.get(unquote(rule)) if rule else node_at(tree, tuple(key.split(".")[:-1]))
            if key not in FIGURES or section is None:
                self._problem(("monitoring", "detectors", n, "uri"), "it names no rule of this card, or no threshold")
                continue
            section[key.split(".")[-1]] = detector.threshold

    def _notes(self, tree: Tree, by_id: Mapping[str, Tree]) -> None:
        _, mark, text = (self._section.references.notes or "").partition(MARK)
        if not mark:
            return
        path = ("references", "notes")
        try:
            unplaced = json.loads(text)
            for name in ("issuer", *SECTIONS):
                if name in unplaced:
                    node_at(tree, (name,)).update(unplaced.pop(name))
            for identity, keys in unplaced.pop("rules", {}).items():
                by_id[identity].update(keys)
            for key in unplaced:
                self._problem(path, f"no key of a policy document is named `{key}`")
        except (ValueError, AttributeError, TypeError, KeyError) as fault:
            self._problem(
                path, f"the keys of the document in JSON cannot be read, or are of no rule of this card ({fault})"
            )


def _rest(card: Tree, parts: Tree, written: YamlDocument, problems: list[Problem]) -> Tree:
    """The card without the entries of its document; an entry that the card has otherwise is a problem."""
    for path in LISTS:
        listed = node_at(card, path[:-1])[path[-1]]
        for entry in node_at(parts, path[:-1])[path[-1]]:
            if entry in listed:
                listed.reverse()  # the last one is the document's
                listed.remove(entry)
                listed.reverse()
            else:
                place = written.place(path)
                sentence = (
                    f"the rest of the card asks for this entry, which is missing or otherwise: {json.dumps(entry)}"
                )
                problems.append(Problem(place.file, place.line, dotted(path), sentence))
    del card["meta"]["owner"]
    notes, mark, _ = (card["references"].pop("notes", None) or "").partition(MARK)
    if notes := notes.removesuffix("\n") if mark else notes:
        card["references"]["notes"] = notes
    return _without_empty(card)


def _without_empty(tree: Tree) -> Tree:
    """The tree without the empty lists that a document adds to."""
    for path in LISTS_AND_KPIS:
        parents = [tree, *(node_at(tree, path[:n]) for n in range(1, len(path)))]
        if not parents[-1][path[-1]]:
            del parents[-1][path[-1]]
        for parent, key in zip(reversed(parents[:-1]), reversed(path[:-1]), strict=True):
            if not parent[key]:
                del parent[key]
    return tree


def _read(text: str) -> dict[tuple[str, str], str]:
    """The terms of a condition. Raises ValueError for any other text."""
    terms: dict[tuple[str, str], str] = {}
    place = 0
    while match := _TERM.match(text, place):
        value, place = json.JSONDecoder().raw_decode(text, match.end())
        if not isinstance(value, str):
            break
        terms[match[1], match[2]] = value
        if place == len(text):
            return terms
        if not text.startswith(AND, place):
            break
        place += len(AND)
    raise ValueError(text)
