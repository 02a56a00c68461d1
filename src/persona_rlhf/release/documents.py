"""`RUN/policy/`: the documents of tiers one and two that a run was judged by, byte for byte, with their signatures.

Each is called after its sha256, which policy.json holds and every manifest repeats. What an end user wrote in tier
three is his data and is not kept a second time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from typing import Any

from persona_rlhf.inputs.bundled import find
from persona_rlhf.inputs.problems import InputError
from persona_rlhf.policy.rules import DocumentInfo
from persona_rlhf.release.folder import write_file

POLICY = "policy"
SIGNATURE = ".sig"  # what the name of a file's detached signature ends with


def keep_documents(run: Path, documents: Sequence[DocumentInfo]) -> None:
    """Copies the documents of tiers one and two into the run, with the signatures that lie beside them."""
    (run / POLICY).mkdir(exist_ok=True)
    for document in documents:
        if document.tier < 3:
            source, copy = find(document.path), copy_of(run, document.sha256)
            write_file(copy, source.read_bytes())
            signature = signature_of(source)
            if signature.is_file():
                write_file(signature_of(copy), signature.read_bytes())


def copy_of(run: Path, digest: str) -> Path:
    """Where the run keeps the document with this sha256."""
    return run / POLICY / f"{digest}.yaml"


def signature_of(file: Path) -> Path:
    """The detached signature that belongs beside a file."""
    return file.with_name(file.name + SIGNATURE)


def document_faults(run: Path, documents: Sequence[Mapping[str, Any]], accepted: Collection[str]) -> list[str]:
    """Where a copy is not the document that policy.json names, or the document itself has been changed since.

    `documents` as policy.json lists them; `accepted` are the sha256 of documents that the run was recertified by. A run
    from before copies were kept has no such folder, and nothing is said of it.
    """
    if not (run / POLICY).is_dir():
        return []
    faults, own = list[str](), set[str]()
    for document in documents:
        if document["tier"] > 2:
            continue
        copy = copy_of(run, document["sha256"])
        own |= {copy.name, signature_of(copy).name}
        name = f"{document['path']} (tier {document['tier']}, {document['issuer']})"
        kept, there = _bytes(copy), _found(document["path"])
        if kept is None:
            faults.append(f"{POLICY}/{copy.name}, the run's copy of {name}, is missing")
        elif sha256(kept).hexdigest() != document["sha256"]:
            place = _place(kept, there) if there and sha256(there).hexdigest() == document["sha256"] else ""
            faults.append(f"{POLICY}/{copy.name}, the run's copy of {name}, was changed{place}")
        elif there is not None and sha256(there).hexdigest() not in (document["sha256"], *accepted):
            faults.append(
                f"{name} was changed{_place(there, kept)} since this run was judged by it: put it back, or test the "
                "adapters again with `recertify`"
            )
    extra = {file.name for file in (run / POLICY).iterdir()} - own
    return faults + [f"{POLICY}/{name} is no document of policy.json" for name in sorted(extra)]


def _bytes(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _found(path: str) -> bytes | None:
    """The document where the run found it, seen from here; None where there is no such file."""
    try:
        return _bytes(find(path))
    except InputError:
        return None


def _place(changed: bytes, original: bytes) -> str:
    """` on line 7`: the first line in which two texts differ."""
    pairs = enumerate(zip_longest(changed.splitlines(True), original.splitlines(True)), 1)
    return next((f" on line {number}" for number, (one, other) in pairs if one != other), "")
