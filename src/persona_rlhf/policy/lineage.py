"""Which documents speak: those that are named and those they extend, in order, one voice a tier and user."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from persona_rlhf.inputs.bundled import find
from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.policy.documents import PolicyDocument, read_document
from persona_rlhf.policy.narrowing import widenings

_LONGEST = 16
"""Documents of which each extends the next."""


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
    above: dict[Path, PolicyDocument] = {}
    lower: PolicyDocument | None = None
    while True:
        try:
            named = find(path) if lower is None else _beside(lower, str(path))
            file = named.resolve()
        except InputError as fault:
            yield from fault.problems if lower is None else _blamed(lower, fault.problems)
            return
        if file in above or len(above) > _LONGEST:
            line = [*(document.path for document in above.values()), str(path)]
            what = f"goes round in a circle: {' -> '.join(line)}" if file in above else f"is the {_LONGEST}th in a line"
            assert lower is not None
            yield lower.problem(("extends",), f"{what}; leave one of them out")
            return
        if lower is not None:
            base_of[lower.file.resolve()] = file
        document = read.get(file)
        if document is None:
            document, faults = read_document(path if lower is None else named)
            unreadable = lower is not None and document is None and all(fault.line is None for fault in faults)
            yield from _blamed(lower, faults) if lower is not None and unreadable else faults
            if document is None:
                return
            read[file] = document
        if lower is not None and lower.tier != document.tier:
            sentence = f"{document.path} is of tier {document.tier}; a document extends one of its own tier"
            yield lower.problem(("extends",), sentence)
        if document.extends is None or file in base_of:
            return
        above[file] = lower = document
        path = document.extends


def _beside(document: PolicyDocument, extends: str) -> Path:
    """The file that a document extends: from its own folder, else as any file that a user names."""
    try:
        return find(document.file.parent / extends)
    except InputError:
        return find(extends)


def _blamed(document: PolicyDocument, problems: Sequence[Problem]) -> Iterator[Problem]:
    """Problems of a file that is not there or cannot be read, at the line that asks for it."""
    for problem in problems:
        yield document.problem(("extends",), f"{problem.sentence}, got `{problem.file}`")


def _with_bases(file: Path, read: dict[Path, PolicyDocument], base_of: dict[Path, Path]) -> PolicyDocument:
    bases: list[str] = []
    at = base_of.get(file)
    while at in read and read[at].path not in bases:
        bases.append(read[at].path)
        at = base_of.get(at)
    return replace(read[file], bases=tuple(bases))
