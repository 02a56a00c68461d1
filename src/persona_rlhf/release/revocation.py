"""Revoked.jsonl; recertification records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError
from rich.markup import escape
from rich.table import Table

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write, pseudonym
from persona_rlhf.evaluation.gate import Verdict
from persona_rlhf.release import integrity
from persona_rlhf.release.integrity import REVOKED, SEAL, seal
from persona_rlhf.release.manifest import MANIFEST, AuditHead
from persona_rlhf.release.render import printable
from persona_rlhf.release.results import RESULTS, Result, plain

# ----------------------------------------------------------------------------------------------------
# What a test of released adapters by new policy documents found: who passes, who is revoked, who must retrain.
# ----------------------------------------------------------------------------------------------------


class Retested(NamedTuple):
    """One released user under the new documents. `verdict` is the gate's on his adapter as it was trained; `fixed`
    says whether questions about fixed aspects decided too, which are asked at the verdict's alpha alone; `revoked`
    whether his adapter had been called back before."""

    user_id: str
    slug: str
    alpha: float
    verdict: Verdict
    fixed: bool
    revoked: bool

    @property
    def passes(self) -> bool:
        """Whether the adapter may stay as it was released: the gate would release it, and passed it at this alpha.

        Where new documents ask less, so that a larger alpha passes at once, the smaller one was not looked at.
        """
        looked = any(look.passed and look.alpha == self.alpha for look in self.verdict.looks)
        asked = not self.fixed or self.verdict.alpha == self.alpha
        return self.verdict.admitted and looked and asked and not self.revoked

    @property
    def remedy(self) -> str | None:
        """What gives the user an adapter again, where he has none: another alpha, or training under the new rules."""
        if self.passes:
            return None
        return f"alpha {self.verdict.alpha:g}" if self.verdict.admitted else "retrain"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "user_id": self.user_id,
            "slug": self.slug,
            "status": "passes" if self.passes else "revoked",
            "must_retrain": self.remedy == "retrain",
            "alpha": self.alpha,
            "admissible_alpha": self.verdict.alpha,
            "revoked_before": self.revoked,
            "verdict": plain(self.verdict),
        }


class Recertified(NamedTuple):
    """All released users of a run under the new documents, and the head of the audit trail that tells of it."""

    policy_hash: str
    users: list[Retested]
    head: AuditHead

    @property
    def failed(self) -> list[Retested]:
        """Whose adapters may not stay."""
        return [user for user in self.users if not user.passes]

    @property
    def looks(self) -> int:
        """Looks at the certify probes that this test took."""
        return sum(len(user.verdict.looks) for user in self.users)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "policy_hash": self.policy_hash,
            "tested": len(self.users),
            "passed": len(self.users) - len(self.failed),
            "revoked": len(self.failed),
            "must_retrain": sum(user.remedy == "retrain" for user in self.users),
            "looks": self.looks,
            "users": [user.to_json() for user in self.users],
            "audit_head": str(self.head),
        }


def recertified_table(found: Recertified) -> Table:
    """A row a user, those who may not stay first."""
    table = Table(
        title=f"{len(found.users) - len(found.failed)} of {len(found.users)} released adapters pass the new documents",
        caption=f"policy {found.policy_hash[:16]}; {found.looks} looks at certify, entered in the audit trail. Who is "
        "trained again is judged on these probes again: count it in `gate.runs`.",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("user", "status", "released at", "admissible at", "remedy", "why"):
        table.add_column(name, overflow="fold")
    for user in sorted(found.users, key=lambda user: user.passes):
        alphas = f"{user.alpha:g}", f"{user.verdict.alpha:g}"
        why = "revoked before" if user.revoked else user.verdict.reason
        status = "passes" if user.passes else "revoked"
        table.add_row(escape(printable(user.user_id)), status, *alphas, user.remedy or "", escape(why))
    return table


# ----------------------------------------------------------------------------------------------------
# `revoked.jsonl`: the adapters of a run that may no longer leave or be served, by the hash of their manifests.
#
# It names users by pseudonym, so that it may be handed to whoever serves copies. The audit trail holds the same:
# `verify`
# finds a line that was taken out.
# ----------------------------------------------------------------------------------------------------

REVOKED_EVENT = "revoked"


def today() -> str:
    """The day it is now (UTC), as papers write it: 2026-11-01."""
    return datetime.now(UTC).date().isoformat()


def last_day(valid_days: int | None) -> str | None:
    """The last day on which a verdict of today counts; None where there is no such day."""
    return None if valid_days is None else (datetime.now(UTC).date() + timedelta(valid_days)).isoformat()


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
    integrity.append_all(run, [(REVOKED_EVENT, paper | {"reason": reason}) for paper in papers])
    new = [Revocation(**paper, day=today(), reason=reason) for paper in papers]
    lines = (json.dumps(one._asdict(), ensure_ascii=True) + "\n" for one in (*known.values(), *new))
    atomic_write(run / REVOKED, "".join(lines).encode())
    if (run / SEAL).exists():
        seal(run, only=integrity.AUDIT)
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


def revoked_here(folder: Path, called_back: Mapping[str, Revocation]) -> list[str]:
    """Whether an adapter's folder is on a list that was handed over, or on that of the run it lies in."""
    runs = (run for run in folder.resolve().parents[1:3] if (run / RESULTS).is_file())
    calls = {**called_back, **(revoked(run) if (run := next(runs, None)) else {})}
    papers = folder / MANIFEST
    digest = hashlib.sha256(papers.read_bytes()).hexdigest() if papers.is_file() else ""
    return [calls[digest].sentence()] if digest in calls else []


def revocation_faults(run: Path, calls: Mapping[str, Revocation]) -> list[str]:
    """Where the list of a run and its audit trail disagree."""
    told = {entry.facts["manifest_sha256"]: entry for entry in integrity.read(run) if entry.event == REVOKED_EVENT}
    lacking = [
        f"{REVOKED} lacks an adapter of user {entry.facts['user']}, which line {entry.seq} of {integrity.AUDIT} revoked"
        for papers, entry in told.items()
        if papers not in calls
    ]
    added = [one for papers, one in calls.items() if papers not in told]
    return lacking + [f"{REVOKED}: no line of {integrity.AUDIT} revoked an adapter of user {one.user}" for one in added]


_REVOCATION = TypeAdapter(Revocation)
