"""The hash-chained audit.jsonl of a run, its events, and manifest.json over a finished run.

Heads of audit.jsonl (`common/chain.py`) are kept in adapters' manifests, in manifest.json and with auditors. Facts hold
no text of a user and no user id, only `common.files.pseudonym`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from persona_rlhf.common.chain import Chain, ChainEntry, ChainHead, entry_of
from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write, pseudonym, sha256_of
from persona_rlhf.common.run_lock import is_lock
from persona_rlhf.common.version import __version__
from persona_rlhf.data.feedback import LEDGER
from persona_rlhf.data.screening import Dropped
from persona_rlhf.evaluation.gate import Verdict
from persona_rlhf.evaluation.ledger import LOOKS, KeptHead, Ledger
from persona_rlhf.policy.policy import Policy
from persona_rlhf.release.manifest import FORMAT, MANIFEST, read_manifest, rendered, self_hash
from persona_rlhf.release.results import Result

AUDIT = "audit.jsonl"


def append(run: Path, event: str, **facts: Any) -> ChainHead:
    """Appends one event to a run's audit.jsonl, flushed to the disk. `facts` are plain JSON values."""
    return append_all(run, [(event, facts)])


def append_all(run: Path, events: Iterable[tuple[str, Mapping[str, Any]]]) -> ChainHead:
    """Appends events, flushed to the disk together; returns the new head."""
    return Chain(run / AUDIT).append(events)


def read(run: Path) -> Iterator[ChainEntry]:
    """The valid entries of a run's audit.jsonl in order; none if it has none. `faults` names the invalid lines."""
    return iter(Chain(run / AUDIT))


def head(run: Path) -> ChainHead | None:
    """The last line of a run's audit.jsonl; None if there is none or it is damaged."""
    return Chain(run / AUDIT).head


def need_head(run: Path) -> ChainHead:
    """The head of a run's audit.jsonl. Raises InputError if it has no valid one."""
    if (last := head(run)) is None:
        why = "its last line is damaged; `verify` says more" if (run / AUDIT).is_file() else "there is no such file"
        raise InputError([Problem(str(run / AUDIT), None, None, f"this audit log has no head: {why}")])
    return last


def read_head(text: str) -> tuple[str, ChainHead]:
    """A head and its keeper, from the text of a head or a file that holds one. Raises InputError for anything else."""
    file = Path(text)
    try:
        if not file.is_file():
            return "--head", ChainHead.parse(text)
        return str(file), ChainHead.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise InputError([Problem("verify", None, "--head", f"{fault}; `audit RUN --head` prints one")]) from fault


def faults(run: Path, heads: Iterable[tuple[str, ChainHead]] = ()) -> list[str]:
    """Every break of a run's audit.jsonl, and every one of `heads` that is no longer in it (see `Chain.faults`)."""
    return Chain(run / AUDIT).faults(heads)


RUN_MANIFEST = "manifest.json"
REVOKED = "revoked.jsonl"
_GROWING = {AUDIT, REVOKED, LEDGER}  # they grow after the run manifest is written
_LEDGER = {Path(LOOKS).with_suffix(end).name for end in (".jsonl", ".key", ".head")}  # it may move to a new run
MUST = ("config.yaml", "policy.json", "results.jsonl", "screening.jsonl")


def write_run_manifest(run: Path, only: str | None = None) -> None:
    """Writes RUN/manifest.json, the sha256 of every top-level file as it is now: the last step of a run.

    With `only`, one file is hashed again and the other entries stay. Adapters are covered by their own manifests, whose
    hashes the results hold; `state/` is not covered. Of audit.jsonl the newest head is stored, unless the file has lost
    the head stored before.
    """
    names = sorted(_top_files(run))
    earlier, _ = read_manifest(run / RUN_MANIFEST) if only else (None, [])
    kept = {name: digest for name, digest in (earlier or {}).get("files", {}).items() if name != only}
    content: dict[str, Any] = {
        "format": FORMAT,
        "toolkit": {"name": "persona-rlhf", "version": __version__},
        "files": kept | {name: sha256_of(run / name) for name in names if only in (None, name)},
    }
    before = run_manifest_head(run)
    intact = before is None or not faults(run, [(RUN_MANIFEST, before)])
    if (newest := head(run) if intact else before) is not None:
        content["audit"] = newest._asdict()
    atomic_write(run / RUN_MANIFEST, rendered(content | {"manifest_hash": self_hash(content)}))


def run_manifest_head(run: Path) -> ChainHead | None:
    """The audit head in RUN/manifest.json; None if there is no manifest, or no head in it."""
    content, _ = read_manifest(run / RUN_MANIFEST)
    return head_in(content or {})


def head_in(manifest: Mapping[str, Any]) -> ChainHead | None:
    """The audit head in a manifest, None if there is none; for an invalid one, a head that no audit.jsonl holds."""
    entry = manifest.get("audit")
    try:
        return None if entry is None else ChainHead(int(entry["seq"]), str(entry["hash"]))
    except (KeyError, TypeError, ValueError):
        return ChainHead(0, "")


def run_manifest_faults(run: Path) -> list[str]:
    """Differences of the top-level files of a run from RUN/manifest.json."""
    content, faults = read_manifest(run / RUN_MANIFEST)
    if content is None:
        return faults
    listed, present = content.get("files"), _top_files(run)
    if not isinstance(listed, dict):
        return [f"{RUN_MANIFEST} has no list of files"]
    faults += [f"{RUN_MANIFEST} does not list {name}" for name in MUST if name not in listed]
    faults += [f"{name} is not in {RUN_MANIFEST}" for name in sorted(present - set(listed))]
    for name, digest in listed.items():
        if name not in present:
            faults.append(f"{name} is missing")
        elif sha256_of(run / name) != digest:
            faults.append(f"{name} was changed: its sha256 is not the one in {RUN_MANIFEST}")
    folders = {"adapters", "policy", "state", "forgotten", "tracking"}
    faults += [
        f"{f.name}/ does not belong to a run" for f in sorted(run.iterdir()) if f.is_dir() and f.name not in folders
    ]
    return faults


def _top_files(run: Path) -> set[str]:
    aside = {RUN_MANIFEST} | _GROWING | _LEDGER
    return {file.name for file in run.iterdir() if not (file.is_dir() or file.name in aside or is_lock(file.name))}


JUDGED, LOOKED, RELEASED, RETESTED, RECERTIFIED = "judged", "looked", "released", "retested", "recertified"
PRIOR = "prior"  # the population's adapter was released to a user


Event = tuple[str, dict[str, Any]]
Events = list[Event]


class AdapterRecord(NamedTuple):
    """A released adapter as its run lists it: folder (relative to the run), user, sha256 of its manifest."""

    path: str
    user_id: str
    manifest_sha256: str | None


def beginning(run: Path, policy: Policy, identity: Mapping[str, str], share: str) -> Events:
    """The events at the start of a run: its documents (without paths), the merged policy, and hashes of all inputs.

    For a run that has such events, one event that this process continues it.
    """
    if head(run) is not None:
        return [("continued", {"share": share})]
    merged = {
        "hash": policy.hash,
        "tier_one_hash": policy.tier_one_hash,
        "bank": policy.bank._asdict(),
        "certify": policy.certify.hashed(),
        "restrictions": len(policy.restrictions),
        "requirements": len(policy.requirements),
        "preferences": len(policy.preferences),
    }
    hashes = {**identity, "config": hashlib.sha256(identity["config"].encode()).hexdigest()}
    return [
        (
            "documents",
            {"documents": _document_facts(policy), "of_end_users": sum(d.tier > 2 for d in policy.documents)},
        ),
        ("merged", merged),
        ("begun", {"toolkit": __version__, "share": share, "asked": hashes}),
    ]


def screened(chunk: int, users: int, pairs: int, dropped: Iterable[Dropped]) -> Events:
    """The event on the screening of a chunk: pairs dropped or flagged, by action and kind of reason."""
    counts = Counter((one.action, one.kind) for one in dropped)
    rows = [{"action": action, "why": why, "pairs": n} for (action, why), n in sorted(counts.items())]
    return [("screened", {"chunk": chunk, "users": users, "pairs": pairs, "found": rows})]


def retested(user_id: str, verdict: Verdict, policy_hash: str, population: bool = False) -> Event:
    """The event on a verdict by other documents than the run's; `population` as in `judged`."""
    return RETESTED, judged(user_id, verdict, population)[1] | {"policy_hash": policy_hash}


def recertified(policy: Policy, tested: int, passed: int, looks: int) -> Event:
    """The event on a test of all released adapters by other documents."""
    facts = {"tested": tested, "passed": passed, "looks": looks}
    return RECERTIFIED, {"documents": _document_facts(policy), "policy_hash": policy.hash, **facts}


def judged(user_id: str, verdict: Verdict, population: bool = False) -> Event:
    """The event on a verdict: every test on the certify probes with its counts, which shows the delta spent.

    `population`: the look was at the population's adapter, and `adapter` says so.
    """
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
    } | ({"adapter": "population"} if population else {})


def looked(ledger: Ledger) -> Event:
    """The event on looks that were entered in a ledger: its head, the number of all looks up to it, and its mark."""
    kept = ledger.head
    return LOOKED, {"ledger": ledger.file.name, "mark": ledger.mark, "head": str(kept.head), "looks": kept.looks}


def kept_heads(run: Path) -> list[KeptHead]:
    """The newest head of the ledger in the audit trail of a run; it holds for all heads before."""
    heads = [_kept(run, entry) for entry in read(run) if entry.event == LOOKED]
    return [max(heads)] if heads else []


def heads_of_neighbours(run: Path, mark: str) -> list[KeptHead]:
    """The newest head of the ledger of this `mark` in each other run of the same folder.

    A new run knows no head by itself. So a ledger that was restored from a backup, together with the head beside it,
    shows against the runs that used it.
    """
    others = [audit for audit in sorted(run.absolute().parent.glob(f"*/{AUDIT}")) if audit.parent != run.absolute()]
    heads = []
    for audit in others if mark else ():
        if os.access(audit, os.R_OK):
            of_ledger = [
                line for line in audit.read_bytes().splitlines(True) if mark.encode() in line
            ]  # few are parsed
            entries = filter(None, map(entry_of, reversed(of_ledger)))
            newest = next((e for e in entries if e.event == LOOKED and e.facts.get("mark") == mark), None)
            heads += [] if newest is None else [_kept(audit.parent, newest)]
    return heads


def _kept(run: Path, entry: ChainEntry) -> KeptHead:
    return KeptHead(ChainHead.parse(entry.facts["head"]), entry.facts["looks"], str(run / AUDIT))


def ledger_faults(run: Path) -> list[str]:
    """Faults of the ledger in a run's folder; none where it lies elsewhere."""
    file = run / LOOKS
    return Chain(file).faults((AUDIT, kept.head) for kept in kept_heads(run)) if file.exists() else []


def ended(result: Result) -> Event:
    """The event on a user's final status: released, prior, held_back, skipped or failed."""
    facts: dict[str, Any] = {"user": pseudonym(result.user_id)}
    if result.path is not None:
        facts |= {"alpha": result.alpha, "manifest_sha256": result.manifest_sha256}
    return result.status, facts


def audit_faults(run: Path, adapters: Iterable[AdapterRecord], kept: Iterable[tuple[str, ChainHead]] = ()) -> list[str]:
    """Faults of audit.jsonl: breaks of the chain, lost heads, and adapters that no event released.

    Heads are those of RUN/manifest.json, of adapters' manifests and of others (`kept`). Manifests of early versions
    hold no head; their adapters are not looked up.
    """
    heads = list(kept)
    if (of_run := run_manifest_head(run)) is not None:
        heads.append((RUN_MANIFEST, of_run))
    stamped = list[AdapterRecord]()
    for adapter in adapters:
        manifest, _ = read_manifest(run / adapter.path / MANIFEST)
        if (of_adapter := head_in(manifest or {})) is not None:
            heads.append((f"{adapter.path}/{MANIFEST}", of_adapter))
            stamped.append(adapter)
    released = {
        (entry.facts.get("user"), entry.facts.get("manifest_sha256"))
        for entry in read(run)
        if entry.event in (RELEASED, PRIOR)
    }
    return faults(run, heads) + [
        f"{AUDIT}: no line released {adapter.path} with its present manifest"
        for adapter in stamped
        if (pseudonym(adapter.user_id), adapter.manifest_sha256) not in released
    ]


def recertified_documents(run: Path) -> set[str]:
    """sha256 of the documents that a run's adapters were recertified by."""
    entries = (entry for entry in read(run) if entry.event == RECERTIFIED)
    return {document["sha256"] for entry in entries for document in entry.facts["documents"]}


def newest_policy(run: Path) -> str | None:
    """The hash of the policy that a run was last recertified under; None if it never was."""
    hashes = [str(entry.facts["policy_hash"]) for entry in read(run) if entry.event == RECERTIFIED]
    return hashes[-1] if hashes else None


def audit_table(entries: Iterable[ChainEntry]) -> Table:
    """The events as a table: one row per line, with all facts."""
    table = Table(title="Audit events", title_justify="left")
    table.add_column("line", justify="right")
    for name in ("time (UTC)", "event", "facts", "hash"):
        table.add_column(name, overflow="fold")
    for entry in entries:
        facts = ", ".join(f"{name} {json.dumps(fact)}" for name, fact in entry.facts.items())
        table.add_row(str(entry.seq), entry.time, escape(entry.event), escape(facts), entry.hash[:16])
    return table


def _document_facts(policy: Policy) -> list[dict[str, Any]]:
    """The documents of tiers one and two, without their paths."""
    return [{**d._asdict(), "path": Path(d.path).name} for d in policy.documents if d.tier < 3]
