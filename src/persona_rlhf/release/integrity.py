"""Hash-chained audit.jsonl, its events, and manifest.json over a finished run."""

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
from persona_rlhf.common.files import atomic_write, flush, pseudonym
from persona_rlhf.common.version import __version__
from persona_rlhf.data.feedback import LEDGER
from persona_rlhf.data.screening import Dropped
from persona_rlhf.evaluation.gate import Verdict
from persona_rlhf.policy.policy import Policy
from persona_rlhf.release.manifest import FORMAT, MANIFEST, AuditHead, read_manifest, rendered, self_hash
from persona_rlhf.release.results import Result

# ----------------------------------------------------------------------------------------------------
# `audit.jsonl`: what happened to a run, in order. Every line holds the hash of the line before it and its own.
#
# A line that was changed, taken out or put in shows by itself. A chain that was written anew from some line on, or
# whose
# tail was cut, is sound in itself: it shows against a head that was kept elsewhere (an adapter's manifest, the seal of
# the run, an officer's file). Facts hold no text of a user and not his id, only `preferences.identity.pseudonym`.
# ----------------------------------------------------------------------------------------------------

AUDIT = "audit.jsonl"
_BEFORE_ALL = "0" * 64
_BLOCK = 1 << 16  # bytes


class AuditEntry(NamedTuple):
    """One line: its number from 1, when (UTC, ISO 8601), what happened, and the hash chain."""

    seq: int
    time: str
    event: str
    facts: dict[str, Any]
    previous: str
    hash: str


def append(run: Path, event: str, **facts: Any) -> AuditHead:
    """Adds one line to the trail of a run, on the disk when this returns. `facts` are plain JSON values."""
    return append_all(run, [(event, facts)])


def append_all(run: Path, events: Iterable[tuple[str, Mapping[str, Any]]]) -> AuditHead:
    """Adds lines, one after another and flushed to the disk together; returns the new head.

    Threads and processes take turns (a lock on the file, which goes with its process). What a killed process left of a
    line is cut off first: that line was promised to nobody. A trail that is damaged elsewhere is gone on with, for what
    happens must be written down; its damage stays to be seen (`faults`).
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
    """The sound lines of a run's trail in order; none where it has no trail. `faults` names the others."""
    for line in _lines(run):
        if (entry := _entry(line)) is not None:
            yield entry


def head(run: Path) -> AuditHead | None:
    """The last line of a run's trail; None where it has none, or this line is damaged: it would vouch for nothing."""
    last = b""
    for line in _lines(run):
        last = line
    entry = _entry(last)
    return None if entry is None else AuditHead(entry.seq, entry.hash)


def need_head(run: Path) -> AuditHead:
    """The head of a run's trail. Raises InputError where it has none that would vouch for anything."""
    if (found := head(run)) is None:
        why = "its last line is damaged; `verify` says more" if (run / AUDIT).is_file() else "there is no such file"
        raise InputError([Problem(str(run / AUDIT), None, None, f"this audit trail has no head: {why}")])
    return found


def read_head(text: str) -> tuple[str, AuditHead]:
    """A head and who keeps it: of a file that holds one, or written out. Raises InputError where it is neither."""
    file = Path(text)
    try:
        if not file.is_file():
            return "--head", AuditHead.parse(text)
        return str(file), AuditHead.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise InputError([Problem("verify", None, "--head", f"{fault}; `audit RUN --head` prints one")]) from fault


def faults(run: Path, heads: Iterable[tuple[str, AuditHead]] = ()) -> list[str]:
    """Where the chain breaks, by line; and every one of `heads` (who keeps it, what he keeps) that it no longer holds.

    A trail that is not there has no faults, but where somebody keeps a head of it.
    """
    wanted: dict[int, list[tuple[str, str]]] = {}
    for keeper, kept in heads:
        wanted.setdefault(kept.seq, []).append((keeper, kept.hash))
    found, held = list[str](), set[tuple[str, str]]()
    previous: str | None = _BEFORE_ALL
    number = 0
    for number, line in enumerate(_lines(run), 1):
        entry = _entry(line)
        if not line.endswith(b"\n"):
            found.append(f"{AUDIT}: line {number} is cut short; the next entry would take its place")
        elif entry is None:
            found.append(f"{AUDIT}: line {number} was changed: it is not what its own hash says")
        elif entry.seq != number or (previous is not None and entry.previous != previous):
            found.append(f"{AUDIT}: line {number} does not follow line {number - 1}: lines were taken out or put in")
        previous = None if entry is None else entry.hash  # after a damaged line, nothing can be said of the link
        held |= {kept for kept in wanted.get(number, []) if entry is not None and kept[1] == entry.hash}
    for seq in sorted(wanted):
        for keeper, digest in wanted[seq]:
            if (keeper, digest) not in held:
                why = f"it ends at line {number}" if seq > number else "that line is another one now"
                found.append(f"{AUDIT}: {keeper} keeps the head {seq}:{digest[:16]}..., which it lacks: {why}")
    return found


def _lines(run: Path) -> Iterator[bytes]:
    if (run / AUDIT).exists():
        with (run / AUDIT).open("rb") as stream:
            yield from stream


def _entry(line: bytes) -> AuditEntry | None:
    """A whole line as an entry, where it is written as we write it and its own hash is right; else None."""
    try:
        content = json.loads(line)
        entry = AuditEntry(**content)
        own = {key: value for key, value in content.items() if key != "hash"}
        sound = _rendered(content) == line and _digest(own) == entry.hash
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return entry if sound else None


def _end(stream: BinaryIO) -> tuple[int, str]:
    """Number and hash of the last whole line; what a killed process left after it is cut off, or ended if it is all."""
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
    """The one way a line is written: any other byte is a fault."""
    return (json.dumps(content, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n").encode()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_rendered(content)).hexdigest()


# ----------------------------------------------------------------------------------------------------
# `manifest.json`: the seal of a finished run, the sha256 of every file at its top.
# ----------------------------------------------------------------------------------------------------

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
        "toolkit": {"name": "persona-rlhf", "version": __version__},
        "files": kept | {name: _sha256(run / name) for name in names if only in (None, name)},
    }
    before = sealed_head(run)
    sound = before is None or not faults(run, [(SEAL, before)])
    if (held := head(run) if sound else before) is not None:
        content["audit"] = held._asdict()
    atomic_write(run / SEAL, rendered(content | {"manifest_hash": self_hash(content)}))


def sealed_head(run: Path) -> AuditHead | None:
    """The head of the audit trail that a run was sealed with; None where it has no seal, or one without a trail."""
    content, _ = read_manifest(run / SEAL)
    return head_in(content or {})


def head_in(papers: Mapping[str, Any]) -> AuditHead | None:
    """The head of the audit trail that a manifest keeps, if any; of one that is no head, one that no trail holds."""
    found = papers.get("audit")
    try:
        return None if found is None else AuditHead(int(found["seq"]), str(found["hash"]))
    except (KeyError, TypeError, ValueError):
        return AuditHead(0, "")


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


# ----------------------------------------------------------------------------------------------------
# The lines that a run writes into its audit trail, and what the trail must hold for its papers to be believed.
# ----------------------------------------------------------------------------------------------------

JUDGED, RELEASED, RETESTED, RECERTIFIED = "judged", "released", "retested", "recertified"


Event = tuple[str, dict[str, Any]]
Events = list[Event]


class AdapterRecord(NamedTuple):
    """A released adapter's papers as its run names them: folder (relative to the run), user, manifest's sha256."""

    path: str
    user_id: str
    manifest_sha256: str | None


def beginning(run: Path, policy: Policy, identity: Mapping[str, str], share: str) -> Events:
    """The lines on what a run is asked: its documents (without the way to them), what they merge to, and the hashes of
    everything else. Of a run that has such lines already: that this process goes on with it."""
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
        ("documents", {"documents": _told(policy), "of_end_users": sum(d.tier > 2 for d in policy.documents)}),
        ("merged", merged),
        ("begun", {"toolkit": __version__, "share": share, "asked": hashes}),
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


def trail_faults(run: Path, papers: Iterable[AdapterRecord], kept: Iterable[tuple[str, AuditHead]] = ()) -> list[str]:
    """Where the trail breaks, has lost a head that the seal, a manifest or somebody (`kept`) keeps, or released nobody
    of that name by these papers. Papers without a head are from before runs had a trail."""
    heads = list(kept)
    if (sealed := sealed_head(run)) is not None:
        heads.append((SEAL, sealed))
    stamped = list[AdapterRecord]()
    for paper in papers:
        if (own := _head_of(run / paper.path)) is not None:
            heads.append((f"{paper.path}/{MANIFEST}", own))
            stamped.append(paper)
    released = {
        (entry.facts.get("user"), entry.facts.get("manifest_sha256")) for entry in read(run) if entry.event == RELEASED
    }
    return faults(run, heads) + [
        f"{AUDIT}: no line released {paper.path} with the manifest that it has now"
        for paper in stamped
        if (pseudonym(paper.user_id), paper.manifest_sha256) not in released
    ]


def recertified_documents(run: Path) -> set[str]:
    """sha256 of the documents that a run's adapters were tested by again."""
    entries = (entry for entry in read(run) if entry.event == RECERTIFIED)
    return {document["sha256"] for entry in entries for document in entry.facts["documents"]}


def trail_table(entries: Iterable[AuditEntry]) -> Table:
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


def _head_of(folder: Path) -> AuditHead | None:
    manifest, _ = read_manifest(folder / MANIFEST)
    return head_in(manifest or {})
