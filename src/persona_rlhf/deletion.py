"""`forget`: one user is deleted from a run and from what the run shares, and a proof of it is written.

What is asked stands in RUN/forgotten/HASH.pending before anything goes, so a deletion that is cut short is finished by
the next program that opens the run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from persona_rlhf.evaluation.utility import read_utilities
from persona_rlhf.inputs.problems import InputError, Problem, did_you_mean
from persona_rlhf.preferences.identity import pseudonym
from persona_rlhf.release import audit
from persona_rlhf.release.erasure import erase, files_with_rows, rows_of
from persona_rlhf.release.forgotten import (
    others_adapters,
    pending,
    pending_file,
    proof_file,
    tail,
    write_paper,
)
from persona_rlhf.release.hub import delete_upload, uploads_of
from persona_rlhf.release.manifest import read_manifest
from persona_rlhf.release.redteam import REDTEAM
from persona_rlhf.release.report import write_report
from persona_rlhf.release.results import RunResults
from persona_rlhf.release.seal import seal, seal_faults
from persona_rlhf.replacement import before
from persona_rlhf.run_folder import RunFolder
from persona_rlhf.traces import Outside, Owner, Trace, cached, read_outside, sweep, traces

EVENT = "forgotten"


class Forgotten(NamedTuple):
    """A deletion: the proof's place and content, and what is left of the user outside, in sentences for a person."""

    proof: Path
    content: dict[str, Any]
    remains: list[str]


def forget(run: Path, user_id: str, data: bool = False) -> Forgotten | None:
    """Deletes a user from a run, with `data` also his rows in the run's source files; None where it was done before.

    Raises InputError for a user whom the run does not know, and for files of the run that cannot be read; OSError
    where the disk is full. What was begun by then is finished by `finish`.
    """
    name, folder = pseudonym(user_id), RunFolder(run)
    outside = read_outside(run)
    found = [*traces(run, name), *cached(outside, folder.roll, name)]
    sources = list(_sources(outside, folder, Owner(name))) if data else []
    if not found and not sources:
        if proof_file(run, name).exists():
            return None
        raise InputError([Problem(str(run), None, "--user", f"no user `{user_id}` in this run{_near(run, user_id)}")])
    order = {
        "user": name,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": data,
        "removed": [_told(run, trace, name) for trace in (*found, *sources)],
        "others": others_adapters(run, name),
        "faults_before": seal_faults(run) if folder.finished else [],
    }
    write_paper(pending_file(run, name), order)
    return _finish(run, name)


def withdraw(run: Path, user_id: str) -> list[str]:
    """Asks the hub to delete what was uploaded of a user; says what it did, and what it would not do."""
    said = []
    for sent in uploads_of(run, pseudonym(user_id)):
        try:
            there = delete_upload(run, sent)
        except InputError as fault:
            said.append(f"Not deleted: {'; '.join(str(problem) for problem in fault.problems)}")
        else:
            said.append(f"{sent.repo}: his adapter {'is deleted' if there else 'was not there any more'}")
    return said


def finish(run: Path) -> list[Forgotten]:
    """Finishes every deletion that was begun in a run and cut short."""
    return [_finish(run, name) for name in pending(run)]


def _finish(run: Path, name: str) -> Forgotten:
    order, faults = read_manifest(pending_file(run, name))
    if order is None:  # it is written whole or not at all, so somebody else changed it
        sentence = f"{'; '.join(faults)}; give `forget` again with the user's id, after deleting this file"
        raise InputError([Problem(str(pending_file(run, name)), None, None, sentence)])
    outside, folder = read_outside(run), RunFolder(run)
    sweep(run)
    for trace in chain(cached(outside, folder.roll, name), traces(run, name)):  # the index line, in these, goes last
        trace.remove()
    if order["data"]:
        for trace in _sources(outside, folder, Owner(name)):
            trace.remove()
    if folder.finished:
        write_report(run)
        for changed in (*(file.name for file in run.glob("*.jsonl")), "policy.json", REDTEAM):
            seal(run, only=changed)
    remains = list(_remains(run, outside, folder, Owner(name)))
    after = others_adapters(run, name)
    content = {
        **{key: order[key] for key in ("user", "at", "removed", "faults_before")},
        "others": {
            other: {"before": order["others"].get(other), "after": after.get(other)}
            for other in sorted({*order["others"], *after})
        },
        "remains": [what for what, _ in remains],
    }
    proof = write_paper(proof_file(run, name), content)
    if not any(entry.facts.get("proof") == proof for entry in audit.read(run) if entry.event == EVENT):
        audit.append(run, EVENT, user=name, proof=proof)
    if folder.finished:
        seal(run, only=audit.AUDIT)
    pending_file(run, name).unlink()
    return Forgotten(proof_file(run, name), content, [sentence for _, sentence in remains])


def _sources(outside: Outside, folder: RunFolder, his: Owner) -> Iterator[Trace]:
    """His rows in the files outside the run that its pairs come from."""
    for source in (outside.users, *folder.sources):
        for file in files_with_rows(Path(source)):
            if folder.path.resolve() in file.resolve().parents:
                continue  # its rows go in any case
            if count := rows_of(file, his):
                yield Trace(file, "rows of a source", count, partial(erase, file, his))


def _remains(run: Path, outside: Outside, folder: RunFolder, his: Owner) -> Iterator[tuple[str, str]]:
    """What the run's papers know of outside: words for the proof, which names no place, and for a person, with it."""
    for trace in _sources(outside, folder, his):
        yield (
            f"{trace.pieces} rows of a source file",
            f"{trace.path} holds {trace.pieces} rows of his (--data removes them)",
        )
    for source in (outside.users, *folder.sources):
        if not files_with_rows(Path(source)):
            yield (
                "a source that cannot be rewritten",
                f"{source} may hold rows of his: it is no file that can be rewritten",
            )
    tastes = outside.utilities
    if tastes is not None and Path(tastes).exists() and any(map(his, read_utilities(tastes))):
        yield "a written-down taste", f"{tastes} has a taste of his (evaluation.utilities)"
    for beside in (before(run), run.with_name(f"{run.name}.rebased")):
        if beside.is_dir():
            yield "a run on another base", f"{beside} is this run on another base: forget him there too"
    for sent in uploads_of(run, his.name):
        yield "an upload", f"{sent.repo} on the hub has, or had, his adapter: forget him again, or delete it there"
    copies = "copies that left the run, and backups, are not known to it"
    yield copies, f"{copies}: delete those that were made"


def _told(run: Path, trace: Trace, name: str) -> dict[str, Any]:
    """A trace as the proof tells of it: without his name, where a folder is called after him."""
    inside = trace.path.is_relative_to(run)
    parts = [_nameless(part, name) for part in trace.path.relative_to(run).parts] if inside else ["(outside the run)"]
    return {"path": "/".join(parts), "what": trace.what, "count": trace.pieces}


def _near(run: Path, user_id: str) -> str:
    try:
        return did_you_mean(user_id, (result.user_id for result in RunResults(run)))
    except InputError:  # an unfinished run has no results yet
        return ""


def _nameless(part: str, name: str) -> str:
    return re.sub(rf"[a-z0-9-]*-{tail(name)}", f"*-{tail(name)}", part)
