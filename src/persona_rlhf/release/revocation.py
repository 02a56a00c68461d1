"""Revoked adapters (revoked.jsonl), and the records of a recertification under new policy documents.

revoked.jsonl lists adapters by the hash of their manifests and users by pseudonym, so it may be given to anybody who
serves copies. audit.jsonl holds the same events: `verify` reports a removed line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from persona_rlhf.common.chain import ChainHead
from persona_rlhf.common.errors import counted, visible
from persona_rlhf.common.files import atomic_write, pseudonym, sha256_of
from persona_rlhf.common.json_lines import read_json_lines
from persona_rlhf.common.run_lock import locks_run
from persona_rlhf.evaluation.gate import Verdict
from persona_rlhf.evaluation.spending import Spending
from persona_rlhf.release import integrity
from persona_rlhf.release.integrity import REVOKED, RUN_MANIFEST, write_run_manifest
from persona_rlhf.release.manifest import MANIFEST
from persona_rlhf.release.results import RESULTS, Result, plain


class Retested(NamedTuple):
    """One released user under the new documents.

    `verdict` is the gate's on the adapter as trained. `fixed` says whether fixed aspects decided too; they are tested
    at the verdict's alpha only. `revoked` says whether the adapter had been revoked before.
    """

    user_id: str
    slug: str
    alpha: float
    verdict: Verdict
    fixed: bool
    revoked: bool
    spending: Spending | None = None

    @property
    def passes(self) -> bool:
        """Whether the adapter stays released: the gate admits it and passed it at the alpha it was released at.

        If weaker documents let a larger alpha pass at once, the smaller one was not tested.
        """
        tested = any(look.passed and look.alpha == self.alpha for look in self.verdict.looks)
        fixed_tested = not self.fixed or self.verdict.alpha == self.alpha
        return self.verdict.admitted and tested and fixed_tested and not self.revoked

    @property
    def remedy(self) -> str | None:
        """The way to an adapter for a user without one: another alpha, or training under the new rules."""
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
            "spending": plain(self.spending),
        }


class Recertified(NamedTuple):
    """All released users of a run under the new documents, and the audit head after the test."""

    policy_hash: str
    users: list[Retested]
    head: ChainHead

    @property
    def failed(self) -> list[Retested]:
        """The users whose adapters do not pass."""
        return [user for user in self.users if not user.passes]

    @property
    def looks(self) -> int:
        """The number of gate tests on certify probes."""
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


def recertified_table(recertified: Recertified) -> Table:
    """One row per user, failed ones first."""
    passed = len(recertified.users) - len(recertified.failed)
    table = Table(
        title=f"{passed} of {len(recertified.users)} released adapters pass the new documents",
        caption=f"policy {recertified.policy_hash[:16]}; {counted(recertified.looks, 'test')} on certify probes, "
        "recorded in audit.jsonl. Each adapter tested here is a look of its user and spends delta; so does training it "
        "again.",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("user", "status", "released at", "admissible at", "look", "delta spent", "remedy", "why"):
        table.add_column(name, overflow="fold")
    for user in sorted(recertified.users, key=lambda user: user.passes):
        alphas = f"{user.alpha:g}", f"{user.verdict.alpha:g}"
        why = "revoked before" if user.revoked else user.verdict.reason
        status = "passes" if user.passes else "revoked"
        spent = ("", "") if user.spending is None else (str(user.spending.look), f"{user.spending.spent:.4f}")
        table.add_row(escape(visible(user.user_id)), status, *alphas, *spent, user.remedy or "", escape(why))
    return table


REVOKED_EVENT = "revoked"


def today() -> str:
    """Today (UTC) as manifests write it: 2026-11-01."""
    return datetime.now(UTC).date().isoformat()


def last_day(valid_days: int | None) -> str | None:
    """The last valid day of a verdict made today; None if it does not expire."""
    return None if valid_days is None else (datetime.now(UTC).date() + timedelta(valid_days)).isoformat()


class Revocation(NamedTuple):
    """One revoked adapter: the user (pseudonym), the sha256 of its manifest, the day (UTC) and the reason."""

    user: str
    manifest_sha256: str
    day: str
    reason: str

    def sentence(self) -> str:
        """The revocation as a sentence."""
        return f"it was revoked on {self.day}: {self.reason}"


@locks_run("recertify")
def revoke(run: Path, results: Iterable[Result], reason: str) -> list[Revocation]:
    """Adds released adapters to the revocations of a run, for one reason without any user's text; the new entries.

    The event is recorded first: after a kill in between, `verify` reports an adapter that the list lacks. An adapter
    that is revoked already keeps its first reason.
    """
    earlier = revoked(run)
    adapters = [
        {"user": pseudonym(result.user_id), "manifest_sha256": result.manifest_sha256}
        for result in results
        if result.manifest_sha256 is not None and result.manifest_sha256 not in earlier
    ]
    if not adapters:
        return []
    integrity.append_all(run, [(REVOKED_EVENT, adapter | {"reason": reason}) for adapter in adapters])
    new = [Revocation(**adapter, day=today(), reason=reason) for adapter in adapters]
    entries = (*earlier.values(), *new)
    atomic_write(run / REVOKED, (json.dumps(entry._asdict(), ensure_ascii=True) + "\n" for entry in entries))
    if (run / RUN_MANIFEST).exists():
        write_run_manifest(run, only=integrity.AUDIT)
    return new


def revoked(run: Path) -> dict[str, Revocation]:
    """The revocations of a run by manifest hash; empty if it has no list. Raises InputError as `read_list` does."""
    return read_list(run / REVOKED) if (run / REVOKED).exists() else {}


def read_list(file: Path) -> dict[str, Revocation]:
    """A list of revocations by manifest hash.

    Raises InputError with every invalid line: a partly read list would let a revoked adapter pass.
    """
    sentence = "this line is no revocation; correct or remove it: until then no adapter is exported"
    revocations: dict[str, Revocation] = {}
    for revocation in read_json_lines(file, Revocation, sentence):
        revocations.setdefault(revocation.manifest_sha256, revocation)
    return revocations


def revoked_here(folder: Path, given: Mapping[str, Revocation]) -> list[str]:
    """The revocation of an adapter's folder, from the `given` list or that of the run that holds the folder."""
    runs = (run for run in folder.resolve().parents[1:3] if (run / RESULTS).is_file())
    revocations = {**given, **(revoked(run) if (run := next(runs, None)) else {})}
    manifest = folder / MANIFEST
    digest = sha256_of(manifest) if manifest.is_file() else ""
    return [revocations[digest].sentence()] if digest in revocations else []


def revocation_faults(run: Path, revocations: Mapping[str, Revocation]) -> list[str]:
    """Differences between the revocations of a run and the events in its audit.jsonl."""
    events = {entry.facts["manifest_sha256"]: entry for entry in integrity.read(run) if entry.event == REVOKED_EVENT}
    lacking = [
        f"{REVOKED} lacks an adapter of user {entry.facts['user']}, which line {entry.seq} of {integrity.AUDIT} revoked"
        for digest, entry in events.items()
        if digest not in revocations
    ]
    added = [revocation for digest, revocation in revocations.items() if digest not in events]
    return lacking + [
        f"{REVOKED}: no line of {integrity.AUDIT} revoked an adapter of user {revocation.user}" for revocation in added
    ]
