"""The hash-chained audit.jsonl of a run, its events, and manifest.json over a finished run.

Every line of audit.jsonl holds its own hash and that of the line before it. A changed, removed or inserted line is
visible in the file itself. A rewritten or cut tail is visible against a head kept elsewhere: in an adapter's manifest,
in manifest.json or with an auditor. Facts hold no text of a user and no user id, only `common.files.pseudonym`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from rich.markup import escape
from rich.table import Table

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write, flush, pseudonym, sha256_of
from persona_rlhf.common.version import __version__
from persona_rlhf.data.feedback import LEDGER
from persona_rlhf.data.screening import Dropped
from persona_rlhf.evaluation.gate import Verdict
from persona_rlhf.policy.policy import Policy
from persona_rlhf.release.manifest import FORMAT, MANIFEST, AuditHead, read_manifest, rendered, self_hash
from persona_rlhf.release.results import Result

AUDIT = "audit.jsonl"
_BEFORE_ALL = "0" * 64
_BLOCK = 1 << 16  # bytes


class AuditEntry(NamedTuple):
    """One line: its number from 1, the time (UTC, ISO 8601), the event with its facts, and the hash chain."""

    seq: int
    time: str
    event: str
    facts: dict[str, Any]
    previous: str
    hash: str


def append(run: Path, event: str, **facts: Any) -> AuditHead:
    """Appends one event to a run's audit.jsonl, flushed to the disk. `facts` are plain JSON values."""
    return append_all(run, [(event, facts)])


def append_all(run: Path, events: Iterable[tuple[str, Mapping[str, Any]]]) -> AuditHead:
    """Appends events, flushed to the disk together; returns the new head.

    A lock on the file orders threads and processes. An incomplete last line, left by a killed process, is removed
    first: no caller relied on it. Damage elsewhere does not stop appending, and stays visible to `faults`.
    """
    with (run / AUDIT).open("ab+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        seq, previous = _end(stream)
        lines = bytearray()
        for event, facts in events:
            seq += 1
            time = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
            content = {"seq": seq, "time": time, "event": event, "facts": dict(facts), "previous": previous}
            previous = _digest(content)
            lines += _rendered(content | {"hash": previous})
        stream.write(lines)
        flush(stream)
    return AuditHead(seq, previous)


def read(run: Path) -> Iterator[AuditEntry]:
    """The valid entries of a run's audit.jsonl in order; none if it has none. `faults` names the invalid lines."""
    for line in _lines(run):
        if (entry := _entry(line)) is not None:
            yield entry


def head(run: Path) -> AuditHead | None:
    """The last line of a run's audit.jsonl; None if there is none or it is damaged."""
    last = b""
    for line in _lines(run):
        last = line
    entry = _entry(last)
    return None if entry is None else AuditHead(entry.seq, entry.hash)


def need_head(run: Path) -> AuditHead:
    """The head of a run's audit.jsonl. Raises InputError if it has no valid one."""
    if (last := head(run)) is None:
        why = "its last line is damaged; `verify` says more" if (run / AUDIT).is_file() else "there is no such file"
        raise InputError([Problem(str(run / AUDIT), None, None, f"this audit log has no head: {why}")])
    return last


def read_head(text: str) -> tuple[str, AuditHead]:
    """A head and its keeper, from the text of a head or a file that holds one. Raises InputError for anything else."""
    file = Path(text)
    try:
        if not file.is_file():
            return "--head", AuditHead.parse(text)
        return str(file), AuditHead.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise InputError([Problem("verify", None, "--head", f"{fault}; `audit RUN --head` prints one")]) from fault


def faults(run: Path, heads: Iterable[tuple[str, AuditHead]] = ()) -> list[str]:
    """Every break of the chain, by line, and every one of `heads` (its keeper, the head) that is no longer in it.

    A missing audit.jsonl has no faults, unless somebody keeps a head of it.
    """
    kept_heads: dict[int, list[tuple[str, str]]] = {}
    for keeper, kept in heads:
        kept_heads.setdefault(kept.seq, []).append((keeper, kept.hash))
    breaks, present = list[str](), set[tuple[str, str]]()
    previous: str | None = _BEFORE_ALL
    number = 0
    for number, line in enumerate(_lines(run), 1):
        entry = _entry(line)
        if not line.endswith(b"\n"):
            breaks.append(f"{AUDIT}: line {number} is cut short; the next entry would take its place")
        elif entry is None:
            breaks.append(f"{AUDIT}: line {number} was changed: it does not match its own hash")
        elif entry.seq != number or (previous is not None and entry.previous != previous):
            breaks.append(f"{AUDIT}: line {number} does not follow line {number - 1}: lines were removed or inserted")
        previous = None if entry is None else entry.hash  # the link after a damaged line cannot be checked
        present |= {kept for kept in kept_heads.get(number, []) if entry is not None and kept[1] == entry.hash}
    for seq in sorted(kept_heads):
        for keeper, digest in kept_heads[seq]:
            if (keeper, digest) not in present:
                why = f"it ends at line {number}" if seq > number else "that line has another hash now"
                breaks.append(f"{AUDIT}: {keeper} keeps the head {seq}:{digest[:16]}..., which is not in it: {why}")
    return breaks


def _lines(run: Path) -> Iterator[bytes]:
    if (run / AUDIT).exists():
        with (run / AUDIT).open("rb") as stream:
            yield from stream


def _entry(line: bytes) -> AuditEntry | None:
    """A whole line as an entry, or None if its form or its own hash is wrong."""
    try:
        content = json.loads(line)
        entry = AuditEntry(**content)
        hashed = {key: value for key, value in content.items() if key != "hash"}
        valid = _rendered(content) == line and _digest(hashed) == entry.hash
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return entry if valid else None


def _end(stream: BinaryIO) -> tuple[int, str]:
    """Number and hash of the last whole line. A partial line after it is removed, or only gets its newline."""
    end = stream.seek(0, os.SEEK_END)
    tail, start = b"", end
    while start > 0 and tail.count(b"\n") < 2:
        step = min(_BLOCK, start)
        start -= step
        stream.seek(start)
        tail = stream.read(step) + tail
    whole, newline, torn = tail.rpartition(b"\n")
    if torn and (entry := _entry(torn + b"\n")) is not None:
        stream.write(b"\n")
        return entry.seq, entry.hash
    stream.truncate(end - len(torn))
    if not newline:
        return 0, _BEFORE_ALL
    last = whole.rpartition(b"\n")[2] + newline
    if (entry := _entry(last)) is not None:
        return entry.seq, entry.hash
    stream.seek(0)
    return sum(1 for _ in stream), hashlib.sha256(last).hexdigest()


def _rendered(content: Mapping[str, Any]) -> bytes:
    """A line as bytes. Any other bytes for the same content are a fault."""
    return (json.dumps(content, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n").encode()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_rendered(content)).hexdigest()


RUN_MANIFEST = "manifest.json"
REVOKED = "revoked.jsonl"
_GROWING = {AUDIT, REVOKED, LEDGER}  # they grow after the run manifest is written
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


def run_manifest_head(run: Path) -> AuditHead | None:
    """The audit head in RUN/manifest.json; None if there is no manifest, or no head in it."""
    content, _ = read_manifest(run / RUN_MANIFEST)
    return head_in(content or {})


def head_in(manifest: Mapping[str, Any]) -> AuditHead | None:
    """The audit head in a manifest, None if there is none; for an invalid one, a head that no audit.jsonl holds."""
    entry = manifest.get("audit")
    try:
        return None if entry is None else AuditHead(int(entry["seq"]), str(entry["hash"]))
    except (KeyError, TypeError, ValueError):
        return AuditHead(0, "")


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
    return {file.name for file in run.iterdir() if not file.is_dir() and file.name not in (RUN_MANIFEST, *_GROWING)}


JUDGED, RELEASED, RETESTED, RECERTIFIED = "judged", "released", "retested", "recertified"


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
        "certify": policy.certify.model_dump(),
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


def retested(user_id: str, verdict: Verdict, policy_hash: str) -> Event:
    """The event on a verdict by other documents than the run's."""
    return RETESTED, judged(user_id, verdict)[1] | {"policy_hash": policy_hash}


def recertified(policy: Policy, tested: int, passed: int, looks: int) -> Event:
    """The event on a test of all released adapters by other documents."""
    facts = {"tested": tested, "passed": passed, "looks": looks}
    return RECERTIFIED, {"documents": _document_facts(policy), "policy_hash": policy.hash, **facts}


def judged(user_id: str, verdict: Verdict) -> Event:
    """The event on a verdict: every test on the certify probes with its counts, which shows the delta spent."""
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
    """The event on a user's final status: released, held_back, skipped or failed."""
    facts: dict[str, Any] = {"user": pseudonym(result.user_id)}
    if result.path is not None:
        facts |= {"alpha": result.alpha, "manifest_sha256": result.manifest_sha256}
    return result.status, facts


def audit_faults(run: Path, adapters: Iterable[AdapterRecord], kept: Iterable[tuple[str, AuditHead]] = ()) -> list[str]:
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
        (entry.facts.get("user"), entry.facts.get("manifest_sha256")) for entry in read(run) if entry.event == RELEASED
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


def audit_table(entries: Iterable[AuditEntry]) -> Table:
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
