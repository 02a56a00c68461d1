"""Which documents speak: those that are named and those they extend, in order, one voice a tier and user."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from persona_rlhf.inputs.bundled import find
from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.policy.documents import PolicyDocument, read_document
from persona_rlhf.policy.narrowing import widenings


def read_all(paths: Sequence[Path | str]) -> tuple[list[PolicyDocument], list[Problem]]:
    """Reads documents and what they extend, by tier and each after its bases; and every problem, alone and between.

    A document that is named twice, or named and extended, counts once.
    """
    read: dict[Path, PolicyDocument] = {}
    base_of: dict[Path, Path] = {}
    problems: list[Problem] = []
    for path in paths:
        problems += _read_line(path, read, base_of)
    documents = [_with_bases(file, read, base_of) for file in read]
    documents.sort(key=lambda document: (document.tier, len(document.bases)))
    return documents, [*problems, *widenings(documents)]


def casting(documents: Sequence[PolicyDocument]) -> Iterator[Problem]:
    """One model provider, at most one application provider, one document a user; each may extend others."""
    if not documents or documents[0].tier != 1:
        name = documents[0].path if documents else "policy.documents"
        yield Problem(name, None, None, "a policy needs a tier-one document, such as configs/policy/tier_one.yaml")
    seen: dict[tuple[int, str | None], PolicyDocument] = {}
    for document in documents:
        user = document.issuer.user_id
        last = seen.get((document.tier, user))
        if last is not None and last.path not in document.bases:
            who = f"user `{user}`" if user else f"tier {document.tier}"
            sentence = f"{last.path} speaks for {who} already; a policy takes one document of each"
            yield document.problem(("tier",), sentence)
            continue
        seen[document.tier, user] = document


def _read_line(path: Path | str, read: dict[Path, PolicyDocument], base_of: dict[Path, Path]) -> Iterator[Problem]:
    """Reads a document, what it extends, what that extends, and so on, into `read` and `base_of`."""
    above: list[tuple[Path, PolicyDocument]] = []
    while True:
        try:
            file = find(path).resolve()
        except InputError as fault:
            missing = [
                above[-1][1].problem(("extends",), f"{p.sentence}, got `{path}`") for p in fault.problems[: len(above)]
            ]
            yield from missing or fault.problems
            return
        if above:
            if file in (known for known, _ in above):
                circle = " -> ".join([*(document.path for _, document in above), str(path)])
                yield above[-1][1].problem(("extends",), f"goes round in a circle: {circle}; leave one of them out")
                return
            base_of[above[-1][0]] = file
        if file in read:
            document = read[file]
        else:
            found, faults = read_document(path)
            yield from faults
            if found is None:
                return
            document = read[file] = found
        if above and above[-1][1].tier != document.tier:
            lower = above[-1][1]
            sentence = f"{document.path} is of tier {document.tier}; a document extends one of its own tier"
            yield lower.problem(("extends",), sentence)
        if document.extends is None or file in base_of:
            return
        above.append((file, document))
        beside = document.file.parent / document.extends
        path = beside if beside.exists() else document.extends


def _with_bases(file: Path, read: dict[Path, PolicyDocument], base_of: dict[Path, Path]) -> PolicyDocument:
    bases: list[str] = []
    at = base_of.get(file)
    while at in read and read[at].path not in bases:
        bases.append(read[at].path)
        at = base_of.get(at)
    return replace(read[file], bases=tuple(bases))
