"""`revoked.jsonl`: the adapters of a run that may no longer leave or be served, by the hash of their manifests.

It names users by pseudonym, so that it may be handed to whoever serves copies. The audit trail holds the same: `verify`
finds a line that was taken out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.preferences.identity import pseudonym
from persona_rlhf.release import audit
from persona_rlhf.release.folder import write_file
from persona_rlhf.release.results import Result
from persona_rlhf.release.seal import REVOKED, SEAL, seal

EVENT = "revoked"


def today() -> str:
    """The day it is now (UTC), as papers write it: 2026-11-01."""
    return datetime.now(UTC).date().isoformat()


class Revocation(NamedTuple):
    """One adapter that was called back: whose (pseudonym), the sha256 of its manifest, when (day, UTC), and why."""

    user: str
    manifest_sha256: str
    day: str
    reason: str

    def sentence(self) -> str:
        """Why the adapter may not be used, in words."""
        return f"it was revoked on {self.day}: {self.reason}"


def revoke(run: Path, results: Iterable[Result], reason: str) -> list[Revocation]:
    """Puts released adapters on the list of a run, for one reason, which holds no text of a user; the new lines.

    The audit trail is told first: a kill in between leaves an adapter that `verify` calls revoked though the list lacks
    it. One that is revoked already keeps its first reason.
    """
    known = revoked(run)
    marked = [result for result in results if result.manifest_sha256 not in (None, *known)]
    if not marked:
        return []
    papers = [{"user": pseudonym(one.user_id), "manifest_sha256": one.manifest_sha256 or ""} for one in marked]
    audit.append_all(run, [(EVENT, paper | {"reason": reason}) for paper in papers])
    new = [Revocation(**paper, day=today(), reason=reason) for paper in papers]
    lines = (json.dumps(one._asdict(), ensure_ascii=True) + "\n" for one in (*known.values(), *new))
    write_file(run / REVOKED, "".join(lines).encode())
    if (run / SEAL).exists():
        seal(run, only=audit.AUDIT)
    return new


def revoked(run: Path) -> dict[str, Revocation]:
    """The revocations of a run by manifest hash; empty where it has no list. Raises InputError as `read_list` does."""
    return read_list(run / REVOKED) if (run / REVOKED).exists() else {}


def read_list(file: Path) -> dict[str, Revocation]:
    """A list of revocations, of a run or handed over, by manifest hash.

    Raises InputError, naming its line, where one cannot be read: a list that is half read would let somebody pass.
    """
    found: dict[str, Revocation] = {}
    problems: list[Problem] = []
    try:
        lines = file.read_bytes().splitlines()
    except OSError as fault:
        raise InputError([Problem(str(file), None, None, f"the revocations cannot be read ({fault})")]) from fault
    for number, line in enumerate(lines, 1):
        try:
            one = _REVOCATION.validate_json(line)
            found.setdefault(one.manifest_sha256, one)
        except ValidationError:
            problems.append(Problem(str(file), number, None, "this line is no revocation; until it is one, all wait"))
    if problems:
        raise InputError(problems)
    return found


def revocation_faults(run: Path, calls: Mapping[str, Revocation]) -> list[str]:
    """Where the list of a run and its audit trail disagree."""
    told = {entry.facts["manifest_sha256"]: entry for entry in audit.read(run) if entry.event == EVENT}
    lacking = [
        f"{REVOKED} lacks an adapter of user {entry.facts['user']}, which line {entry.seq} of {audit.AUDIT} revoked"
        for papers, entry in told.items()
        if papers not in calls
    ]
    added = [one for papers, one in calls.items() if papers not in told]
    return lacking + [f"{REVOKED}: no line of {audit.AUDIT} revoked an adapter of user {one.user}" for one in added]


_REVOCATION = TypeAdapter(Revocation)
