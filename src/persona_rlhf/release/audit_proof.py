"""Proofs over a run's audit.jsonl for people who may not read all of it.

The lines of the trail, each with its newline, are the leaves of a Merkle tree (`common/merkle.py`). A proof shows the
lines of one user to be in the tree of a root, or that a trail only grew since an earlier root. A last line without
its newline is no leaf: a kill left it, and the next writer completes or removes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from persona_rlhf.common.chain import entry_of
from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write, pseudonym
from persona_rlhf.common.merkle import MerkleTree, TreeHead, extends, includes
from persona_rlhf.release.integrity import AUDIT

_INCLUSION, _CONSISTENCY = "persona-rlhf audit inclusion 1", "persona-rlhf audit consistency 1"


def merkle_root(run: Path) -> TreeHead:
    """The Merkle root of a run's audit.jsonl. Raises InputError if there is none."""
    return MerkleTree(_lines(run)).head()


def read_root(text: str, option: str) -> TreeHead:
    """A root from an option of the command line. Raises InputError for anything else."""
    try:
        return TreeHead.parse(text)
    except ValueError as fault:
        raise InputError([Problem("audit", None, option, f"{fault}; `audit RUN --root` prints one")]) from fault


def prove_user(run: Path, user_id: str, out: Path) -> TreeHead:
    """Writes the audit lines of one user and their paths to a new file; returns the root.

    Lines that name no single user are left out. Raises InputError if the trail has no line of this user.
    """
    lines = _lines(run)
    tree, mark = MerkleTree(lines), pseudonym(user_id)
    entries = [
        {"index": index, "line": line.decode(), "path": tree.inclusion(index)}
        for index, line in enumerate(lines)
        if _names(line, mark)
    ]
    if not entries:
        raise InputError([Problem(str(run / AUDIT), None, "--user", f"it has no line of the user `{user_id}`")])
    _write(out, {"kind": _INCLUSION, "root": str(tree.head()), "user": mark, "entries": entries})
    return tree.head()


def prove_growth(run: Path, before: TreeHead, out: Path) -> TreeHead:
    """Writes a proof that a run's audit.jsonl begins with the lines of an earlier root; returns the present root.

    Raises InputError if it does not begin with them.
    """
    lines = _lines(run)
    tree = MerkleTree(lines)
    if not 0 < before.size <= len(lines) or tree.head(before.size) != before:
        sentence = f"its first {before.size:,} lines do not have this root: lines were changed, removed or inserted"
        raise InputError([Problem(str(run / AUDIT), None, "--since", sentence)])
    proof = {"before": str(before), "root": str(tree.head()), "proof": tree.consistency(before.size)}
    _write(out, {"kind": _CONSISTENCY, **proof})
    return tree.head()


def is_proof(file: Path) -> bool:
    """Whether a file is a proof of this module, by its beginning."""
    with file.open("rb") as stream:
        return b'"kind": "persona-rlhf audit ' in stream.read(64)


def proof_faults(file: Path, roots: list[TreeHead]) -> list[str]:
    """Every fault of a proof against the roots that its reader got elsewhere; an empty list if it has none.

    The root of the proof must be among them, and of a proof of growth the earlier root too.
    """
    try:
        content = json.loads(file.read_bytes())
        named = [TreeHead.parse(content[key]) for key in ("before", "root") if key in content]
        faults = [f"its root {head} is none of those given by --root" for head in named if head not in roots]
        if content["kind"] == _CONSISTENCY:
            before, root = named
            holds = extends(before, root, content["proof"])
            return faults if holds else [*faults, "it does not show that the trail begins with the earlier lines"]
        [root] = named
        if not content["entries"]:
            return [*faults, "it holds no line"]
        return faults + [fault for entry in content["entries"] for fault in _entry_faults(entry, root, content["user"])]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
        return [f"it is no proof that `audit` writes ({type(fault).__name__})"]


def _entry_faults(entry: dict[str, Any], root: TreeHead, mark: str) -> list[str]:
    line = entry["line"].encode()
    if not includes(root, entry["index"], line, entry["path"]):
        return [f"line {entry['index'] + 1} is not in the trail of this root"]
    return [] if _names(line, mark) else [f"line {entry['index'] + 1} is not a line of this user"]


def _names(line: bytes, mark: str) -> bool:
    """Whether a valid line is about the user with this pseudonym."""
    entry = entry_of(line)
    return entry is not None and mark in (entry.facts.get("user"), entry.facts.get("user_id"))


def _lines(run: Path) -> list[bytes]:
    file = run / AUDIT
    lines = file.read_bytes().splitlines(True) if file.is_file() else []
    if lines and not lines[-1].endswith(b"\n"):
        del lines[-1]
    if not lines:
        raise InputError([Problem(str(file), None, None, "there is no audit trail here")])
    return lines


def _write(out: Path, content: dict[str, Any]) -> None:
    if out.exists():
        raise InputError([Problem(str(out), None, "--out", "it exists; name a new file")])
    atomic_write(out, json.dumps(content, indent=2) + "\n")
