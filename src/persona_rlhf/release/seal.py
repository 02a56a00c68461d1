"""`manifest.json`: the seal of a finished run, the sha256 of every file at its top."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import persona_rlhf
from persona_rlhf.preferences.ledger import LEDGER
from persona_rlhf.release import audit
from persona_rlhf.release.audit import AUDIT, Head
from persona_rlhf.release.folder import write_file
from persona_rlhf.release.manifest import FORMAT, read_manifest, rendered, self_hash

SEAL = "manifest.json"
REVOKED = "revoked.jsonl"
_GROWING = {AUDIT, REVOKED, LEDGER}  # they go on after a run is sealed; the chain of the first vouches for the second
MUST = ("config.yaml", "policy.json", "results.jsonl", "screening.jsonl")


def seal(run: Path, only: str | None = None) -> None:
    """Writes RUN/manifest.json over the files as they are now; the last thing that a run does.

    With `only`, one file is sealed anew and the others stay as they were promised. `state/` is working matter and is
    not sealed; adapters are, by their own manifests, whose hashes the results hold. Of the audit trail, which goes on,
    the head is sealed: each time the newest, unless the trail has lost the one that was sealed before.
    """
    names = sorted(_top_files(run))
    sealed, _ = read_manifest(run / SEAL) if only else (None, [])
    kept = {name: digest for name, digest in (sealed or {}).get("files", {}).items() if name != only}
    content: dict[str, Any] = {
        "format": FORMAT,
        "toolkit": {"name": "persona-rlhf", "version": persona_rlhf.__version__},
        "files": kept | {name: _sha256(run / name) for name in names if only in (None, name)},
    }
    before = sealed_head(run)
    sound = before is None or not audit.faults(run, [(SEAL, before)])
    if (held := audit.head(run) if sound else before) is not None:
        content["audit"] = held._asdict()
    write_file(run / SEAL, rendered(content | {"manifest_hash": self_hash(content)}))


def sealed_head(run: Path) -> Head | None:
    """The head of the audit trail that a run was sealed with; None where it has no seal, or one without a trail."""
    content, _ = read_manifest(run / SEAL)
    return head_in(content or {})


def head_in(papers: Mapping[str, Any]) -> Head | None:
    """The head of the audit trail that a manifest keeps, if any; of one that is no head, one that no trail holds."""
    found = papers.get("audit")
    try:
        return None if found is None else Head(int(found["seq"]), str(found["hash"]))
    except (KeyError, TypeError, ValueError):
        return Head(0, "")


def seal_faults(run: Path) -> list[str]:
    """Where the files at the top of a run are not as they were sealed."""
    content, faults = read_manifest(run / SEAL)
    if content is None:
        return faults
    sealed, present = content.get("files"), _top_files(run)
    if not isinstance(sealed, dict):
        return [f"{SEAL} lacks its list of files"]
    faults += [f"{name} was never sealed" for name in MUST if name not in sealed]
    faults += [f"{name} is not in {SEAL}" for name in sorted(present - set(sealed))]
    for name, promised in sealed.items():
        if name not in present:
            faults.append(f"{name} is missing")
        elif _sha256(run / name) != promised:
            faults.append(f"{name} was changed: its sha256 is not the one in {SEAL}")
    known = {"adapters", "policy", "state", "forgotten", "tracking"}
    faults += [
        f"{f.name}/ does not belong to a run" for f in sorted(run.iterdir()) if f.is_dir() and f.name not in known
    ]
    return faults


def _top_files(run: Path) -> set[str]:
    return {file.name for file in run.iterdir() if not file.is_dir() and file.name not in (SEAL, *_GROWING)}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
