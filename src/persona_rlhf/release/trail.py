"""The lines that a run writes into its audit trail, and what the trail must hold for its papers to be believed."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

import persona_rlhf
from persona_rlhf.evaluation.gate import Verdict
from persona_rlhf.policy.tiers import Policy
from persona_rlhf.preferences.identity import pseudonym
from persona_rlhf.preferences.screening import Dropped
from persona_rlhf.release import audit
from persona_rlhf.release.audit import AUDIT, Entry, Head
from persona_rlhf.release.manifest import MANIFEST, read_manifest
from persona_rlhf.release.results import Result
from persona_rlhf.release.seal import SEAL, head_in, sealed_head

JUDGED, RELEASED, RETESTED, RECERTIFIED = "judged", "released", "retested", "recertified"


Event = tuple[str, dict[str, Any]]
Events = list[Event]


class Paper(NamedTuple):
    """A released adapter's papers as its run names them: folder (relative to the run), user, manifest's sha256."""

    path: str
    user_id: str
    manifest_sha256: str | None


def beginning(run: Path, policy: Policy, identity: Mapping[str, str], share: str) -> Events:
    """The lines on what a run is asked: its documents (without the way to them), what they merge to, and the hashes of
    everything else. Of a run that has such lines already: that this process goes on with it."""
    if audit.head(run) is not None:
        return [("continued", {"share": share})]
    merged = {
        "hash": policy.hash,
        "tier_one_hash": policy.tier_one_hash,
        "certify": policy.certify.model_dump(),
        "restrictions": len(policy.restrictions),
        "requirements": len(policy.requirements),
        "preferences": len(policy.preferences),
    }
    hashes = {**identity, "config": hashlib.sha256(identity["config"].encode()).hexdigest()}
    return [
        ("documents", {"documents": _told(policy), "of_end_users": sum(d.tier > 2 for d in policy.documents)}),
        ("merged", merged),
        ("begun", {"toolkit": persona_rlhf.__version__, "share": share, "asked": hashes}),
    ]


def screened(chunk: int, users: int, pairs: int, found: Iterable[Dropped]) -> Events:
    """The line on what screening found in a chunk: pairs by what was done with them, and why in a word."""
    counts = Counter((one.action, one.kind) for one in found)
    told = [{"action": action, "why": why, "pairs": n} for (action, why), n in sorted(counts.items())]
    return [("screened", {"chunk": chunk, "users": users, "pairs": pairs, "found": told})]


def retested(user_id: str, verdict: Verdict, policy_hash: str) -> Event:
    """The line on a verdict by other documents than those that the run was judged by."""
    return RETESTED, judged(user_id, verdict)[1] | {"policy_hash": policy_hash}


def recertified(policy: Policy, tested: int, passed: int, looks: int) -> Event:
    """The line on a test of all released adapters by other documents."""
    facts = {"tested": tested, "passed": passed, "looks": looks}
    return RECERTIFIED, {"documents": _told(policy), "policy_hash": policy.hash, **facts}


def judged(user_id: str, verdict: Verdict) -> Event:
    """The line on a verdict: every look at the certify probes with its counts, the ledger of what was spent."""
    looks = [
        {"alpha": look.alpha, "passed": look.passed, "n": look.pooled.n, "refused": look.pooled.refused}
        for look in verdict.looks
    ]
    return JUDGED, {
        "user": pseudonym(user_id),
        "alpha": verdict.alpha,
        "admitted": verdict.admitted,
        "certified": verdict.certified,
        "lower_bound": verdict.pooled.lower_bound,
        "looks": looks,
    }


def ended(result: Result) -> Event:
    """The line on what became of a user: released, held_back, skipped or failed."""
    facts: dict[str, Any] = {"user": pseudonym(result.user_id)}
    if result.path is not None:
        facts |= {"alpha": result.alpha, "manifest_sha256": result.manifest_sha256}
    return result.status, facts


def trail_faults(run: Path, papers: Iterable[Paper], kept: Iterable[tuple[str, Head]] = ()) -> list[str]:
    """Where the trail breaks, has lost a head that the seal, a manifest or somebody (`kept`) keeps, or released nobody
    of that name by these papers. Papers without a head are from before runs had a trail."""
    heads = list(kept)
    if (sealed := sealed_head(run)) is not None:
        heads.append((SEAL, sealed))
    stamped = list[Paper]()
    for paper in papers:
        if (own := _head_of(run / paper.path)) is not None:
            heads.append((f"{paper.path}/{MANIFEST}", own))
            stamped.append(paper)
    released = {
        (entry.facts.get("user"), entry.facts.get("manifest_sha256"))
        for entry in audit.read(run)
        if entry.event == RELEASED
    }
    return audit.faults(run, heads) + [
        f"{AUDIT}: no line released {paper.path} with the manifest that it has now"
        for paper in stamped
        if (pseudonym(paper.user_id), paper.manifest_sha256) not in released
    ]


def recertified_documents(run: Path) -> set[str]:
    """sha256 of the documents that a run's adapters were tested by again."""
    entries = (entry for entry in audit.read(run) if entry.event == RECERTIFIED)
    return {document["sha256"] for entry in entries for document in entry.facts["documents"]}


def trail_table(entries: Iterable[Entry]) -> Table:
    """The trail for people: a row a line, with its facts as they stand."""
    table = Table(title="Audit trail", title_justify="left")
    table.add_column("line", justify="right")
    for name in ("time (UTC)", "event", "facts", "hash"):
        table.add_column(name, overflow="fold")
    for entry in entries:
        facts = ", ".join(f"{name} {json.dumps(fact)}" for name, fact in entry.facts.items())
        table.add_row(str(entry.seq), entry.time, escape(entry.event), escape(facts), entry.hash[:16])
    return table


def _told(policy: Policy) -> list[dict[str, Any]]:
    """The documents of tiers one and two, without the way to them."""
    return [{**d._asdict(), "path": Path(d.path).name} for d in policy.documents if d.tier < 3]


def _head_of(folder: Path) -> Head | None:
    manifest, _ = read_manifest(folder / MANIFEST)
    return head_in(manifest or {})
