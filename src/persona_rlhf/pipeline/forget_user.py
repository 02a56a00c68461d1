"""`forget`: erases every trace of a user from a run and from the files it shares, and writes a proof.

RUN/forgotten/HASH.pending records the request before anything is erased, so that the next program that opens the run
finishes an interrupted deletion. Every removal is whole or not at all, and can be done again.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from persona_rlhf.common.clock import now
from persona_rlhf.common.errors import InputError, Problem, did_you_mean
from persona_rlhf.common.files import pseudonym
from persona_rlhf.common.run_lock import locks_run
from persona_rlhf.config.loader import read_yaml
from persona_rlhf.data.choice_ledger import choice_traces
from persona_rlhf.data.erasure import DataSubject, Trace, erasable, erase, files_with_rows, row_traces, rows_of
from persona_rlhf.data.page_rows import PAGE_ROWS, page_traces
from persona_rlhf.data.pairs import PreferencePair
from persona_rlhf.data.store import PairStore, UserSelection
from persona_rlhf.data.wish_documents import wish_traces
from persona_rlhf.evaluation.ledger import LOOKS
from persona_rlhf.pipeline.monitoring import OnProgress, ProgressEvent, WorkCounter, silent
from persona_rlhf.pipeline.run_dir import RunDir, addition_traces, before, index_traces, number_of
from persona_rlhf.release import integrity
from persona_rlhf.release.data_curve_file import DATA_CURVE, data_curve_traces, remove_shared_curves
from persona_rlhf.release.deletion_records import (
    FORGOTTEN,
    adapter_traces,
    forgotten,
    others_adapters,
    pending,
    pending_file,
    proof_file,
    slug_hash,
    write_proof,
)
from persona_rlhf.release.earlier_adapters import earlier_traces
from persona_rlhf.release.hub import delete_upload, uploads_of
from persona_rlhf.release.impact_report import remove_impact
from persona_rlhf.release.integrity import REVOKED, RUN_MANIFEST, run_manifest_faults, write_run_manifest
from persona_rlhf.release.lifetimes import lifetime_traces
from persona_rlhf.release.manifest import read_manifest
from persona_rlhf.release.redteam_report import REDTEAM, redteam_traces
from persona_rlhf.release.report import write_report
from persona_rlhf.release.results import SUMMARY, RunResults
from persona_rlhf.release.served_places import served_remains, served_traces
from persona_rlhf.simulation.users import read_utilities

FORGOTTEN_EVENT = "forgotten"

_PSEUDONYMOUS = {integrity.AUDIT, REVOKED, LOOKS, "users.jsonl"}  # files that name users by pseudonyms
_WITHOUT_ROWS = {
    RUN_MANIFEST,
    REDTEAM,
    DATA_CURVE,
    SUMMARY,
    "policy.json",
    "bank.json",
    "identity.json",
    "persona.json",
    "adapter_config.json",
}
_KEPT = (
    "The ledger of looks keeps the number, times and outcomes of the gate's looks at this user, under a keyed "
    "pseudonym and without the adapters, so that coming back does not reset delta."
)
_LEFTOVERS = (".half", ".old")  # of interrupted writes


def traces(run: Path, user: DataSubject, on_progress: OnProgress = silent) -> Iterator[Trace]:
    """The user's personal data in the run folder, piece by piece; the index line, which says who is left, comes last.

    Rows with a `user_id` are looked for in every file. All other data is listed by the module that writes it, in a
    function `*_traces`; `_cached` handles `fleet.reference_cache`. Raises InputError where a file cannot be read.
    """
    yield from addition_traces(run, user)
    yield from adapter_traces(run, user)
    yield from earlier_traces(run, user)
    yield from redteam_traces(run, user)
    yield from data_curve_traces(run, user)
    if next(run.glob("state/**/*.safetensors"), None) is not None:
        from persona_rlhf.training.checkpoint import checkpoint_traces  # it needs torch

        yield from checkpoint_traces(run, user)
    yield from served_traces(run, user)
    yield from lifetime_traces(run, user)
    yield from choice_traces(run, user)
    yield from wish_traces(run, user)
    yield from page_traces(run, user)
    files = [file for file in sorted(run.rglob("*")) if _may_hold_rows(run, file)]
    yield from row_traces(_counted(files, on_progress), user)
    yield from index_traces(run, user)


def _counted(files: Sequence[Path], on_progress: OnProgress) -> Iterator[Path]:
    """The files, with a report of progress after each."""
    counter = WorkCounter(ProgressEvent("reading", unit="files"), on_progress, len(files))
    for file in files:
        yield file
        counter(1)


def _may_hold_rows(run: Path, file: Path) -> bool:
    """Whether a file in the run folder may hold rows of a user: results, feedback, sources of pairs, and copies."""
    without = file.name in _PSEUDONYMOUS | _WITHOUT_ROWS or FORGOTTEN in file.relative_to(run).parts
    return erasable(file) and not without and file.relative_to(run) not in PAGE_ROWS


def remove_leftovers(run: Path) -> None:
    """Removes halves of files, and of lines, left by interrupted writes; they may hold anybody's data."""
    for path in sorted(run.rglob("*")):
        if path.name.endswith(_LEFTOVERS) and not path.is_symlink() and path.exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for file in (*run.rglob("metrics*.jsonl"), *run.rglob("ledger.jsonl")):
        if rows_of(file, _nobody, torn=True):
            erase(file, _nobody, torn=True)


def _nobody(_: object) -> bool:
    return False


class ExternalPaths(NamedTuple):
    """Places outside the run folder that its config names; read leniently, since some may be gone."""

    users: str
    heldout: float
    utilities: str | None
    cache: str | None
    model: str


def read_external_paths(run: Path) -> ExternalPaths:
    """The places that RUN/config.yaml names. Raises InputError where it cannot be read."""
    tree = read_yaml(run / "config.yaml").tree
    try:
        config: Any = tree
        evaluation, fleet = config.get("evaluation") or {}, config.get("fleet") or {}
        users = config["users"]
        return ExternalPaths(
            users["path"],
            users.get("heldout", 0.25),
            evaluation.get("utilities"),
            fleet.get("reference_cache"),
            config["base"]["model"],
        )
    except (AttributeError, KeyError, TypeError) as fault:
        sentence = f"the config of this run lacks a part of its form ({fault})"
        raise InputError([Problem(str(run / "config.yaml"), None, None, sentence)]) from fault


def _cached(outside: ExternalPaths, selection: UserSelection, user: DataSubject) -> Iterator[Trace]:
    """Values of `fleet.reference_cache` that no other user of the run needs.

    A value is keyed by the hash of its tokens, so the user's pairs are tokenized again. Where the pairs changed since
    training, the values of the user are unknown and all are dropped: they are computed again when needed.
    """
    files = sorted(Path(outside.cache).glob("*.safetensors")) if outside.cache is not None else []
    number = number_of(selection.user_digests, user)
    if not files or (selection.user_digests and number is None):
        return
    from persona_rlhf.training.cache import cache_traces

    out = selection._replace(excluded=selection.excluded - {user.pseudonym})
    yield from cache_traces(files, None if number is None else _keys(outside, out, number))


def _keys(outside: ExternalPaths, selection: UserSelection, number: int) -> set[bytes] | None:
    """The keys of rows that one user alone has; None where the pairs changed since training."""
    from persona_rlhf.data.tokenize import both_rows, tokenize
    from persona_rlhf.models.base import load_tokenizer
    from persona_rlhf.training.cache import key_of

    try:
        store = PairStore(outside.users, outside.heldout, selection)
        if store.user_digests[number] != selection.user_digests[number]:
            return None
        tokenizer = load_tokenizer(outside.model)

        def keys(pairs: Sequence[PreferencePair]) -> set[bytes]:
            rows = tokenize(pairs, tokenizer, sys.maxsize)
            return {key_of(row) for user in rows for row in both_rows((*user.judged, *user.heldout))}

        user_pairs = store.of(range(number, number + 1))
        user_keys = keys(user_pairs)
        for start in range(0, store.users, 256):
            pairs = store.of(range(start, min(start + 256, store.users)))
            user_keys -= keys([pair for pair in pairs if pair.user_id != user_pairs[0].user_id])
    except InputError:
        return None
    return user_keys


class Forgotten(NamedTuple):
    """A deletion: the proof's place and content, and sentences on data of the user that remains outside."""

    proof: Path
    content: dict[str, Any]
    remains: list[str]


@locks_run("forget")
def forget(run: Path, user_id: str, data: bool = False, on_progress: OnProgress = silent) -> Forgotten | None:
    """Erases a user from a run, with `data` also from the run's source files; None where it was done before.

    Raises InputError for a user who is not in the run, and for files of the run that cannot be read; OSError for a
    full disk. `finish_forgetting` completes an interrupted deletion.
    """
    user, run_dir = DataSubject(pseudonym(user_id)), RunDir(run)
    outside = read_external_paths(run)
    pieces = [*traces(run, user, on_progress), *_cached(outside, run_dir.selection, user)]
    sources = list(_source_rows(outside, run_dir, user)) if data else []
    if not pieces and not sources:
        if proof_file(run, user.pseudonym).exists():
            return None
        raise InputError([Problem(str(run), None, "--user", f"no user `{user_id}` in this run{_near(run, user_id)}")])
    order = {
        "user": user.pseudonym,
        "at": now(),
        "data": data,
        "removed": [_entry(run, trace, user) for trace in (*pieces, *sources)],
        "others": others_adapters(run, user.pseudonym),
        "faults_before": run_manifest_faults(run) if run_dir.finished else [],
    }
    write_proof(pending_file(run, user.pseudonym), order)
    return _finish(run, user, on_progress)


class UploadDeletion(NamedTuple):
    """An attempt to delete an upload of a forgotten user: whether it is gone, and a sentence on it."""

    done: bool
    sentence: str


@locks_run("forget")
def forget_uploads(run: Path) -> list[UploadDeletion]:
    """Deletes the uploads of all forgotten users from the hub; the next call tries again where it fails."""
    attempts = []
    for name in sorted(forgotten(run)):
        for upload in uploads_of(run, name):
            try:
                was_there = delete_upload(run, upload)
            except InputError as fault:
                why = "; ".join(str(problem) for problem in fault.problems)
                attempts.append(
                    UploadDeletion(False, f"Not deleted from the hub: {why}; the next `forget` tries again")
                )
            else:
                what = "is deleted" if was_there else "was not there any more"
                attempts.append(UploadDeletion(True, f"{upload.repo}: the adapter {what}"))
    return attempts


@locks_run("forget")
def finish_forgetting(run: Path) -> list[Forgotten]:
    """Completes every interrupted deletion of a run."""
    return [_finish(run, DataSubject(name)) for name in pending(run)]


def _finish(run: Path, user: DataSubject, on_progress: OnProgress = silent) -> Forgotten:
    name = user.pseudonym
    order, faults = read_manifest(pending_file(run, name))
    if order is None:  # it is written whole or not at all, so somebody else changed it
        sentence = f"{'; '.join(faults)}; give `forget` again with the user's id, after deleting this file"
        raise InputError([Problem(str(pending_file(run, name)), None, None, sentence)])
    outside, run_dir = read_external_paths(run), RunDir(run)
    remove_leftovers(run)
    for trace in chain(_cached(outside, run_dir.selection, user), traces(run, user, on_progress)):
        trace.remove()
    if order["data"]:
        for trace in _source_rows(outside, run_dir, user):
            trace.remove()
    if run_dir.finished:
        remove_impact(run)
        remove_shared_curves(run)
        write_report(run)
        named, _ = read_manifest(run / RUN_MANIFEST)
        erased = {entry["path"] for entry in order["removed"]} & set((named or {}).get("files", ()))
        for changed in sorted({*(file.name for file in run.glob("*.jsonl")), "policy.json", REDTEAM, *erased}):
            write_run_manifest(run, only=changed)
    remains = list(_remains(run, outside, run_dir, user))
    after = others_adapters(run, name)
    content = {
        **{key: order[key] for key in ("user", "at", "removed", "faults_before")},
        "others": {
            other: {"before": order["others"].get(other), "after": after.get(other)}
            for other in sorted({*order["others"], *after})
        },
        "remains": [*(what for what, _ in remains), *("an upload" for _ in uploads_of(run, name))],
        "kept": [_KEPT],
    }
    proof = write_proof(proof_file(run, name), content)
    if not any(entry.facts.get("proof") == proof for entry in integrity.read(run) if entry.event == FORGOTTEN_EVENT):
        integrity.append(run, FORGOTTEN_EVENT, user=name, proof=proof)
    if run_dir.finished:
        write_run_manifest(run, only=integrity.AUDIT)
    pending_file(run, name).unlink()
    return Forgotten(proof_file(run, name), content, [sentence for _, sentence in remains])


def _source_rows(outside: ExternalPaths, run_dir: RunDir, user: DataSubject) -> Iterator[Trace]:
    """The user's rows in the source files of the run that lie outside its folder."""
    for source in (outside.users, *run_dir.sources):
        files = [file for file in files_with_rows(Path(source)) if run_dir.path.resolve() not in file.resolve().parents]
        yield from row_traces(files, user, "rows of a source")


def _remains(run: Path, outside: ExternalPaths, run_dir: RunDir, user: DataSubject) -> Iterator[tuple[str, str]]:
    """Data of the user outside that the run knows of: words for the proof, and a sentence with the place for people."""
    for trace in _source_rows(outside, run_dir, user):
        yield (
            f"{trace.pieces} rows of a source file",
            f"{trace.path} holds {trace.pieces} rows of the user (--data removes them)",
        )
    for source in (outside.users, *run_dir.sources):
        if not files_with_rows(Path(source)):
            sentence = f"{source} may hold rows of the user: it is no file that can be rewritten"
            yield "a source that cannot be rewritten", sentence
    tastes = outside.utilities
    if tastes is not None and Path(tastes).exists() and any(map(user, read_utilities(tastes))):
        yield "a written-down taste", f"{tastes} has a taste of the user (evaluation.utilities)"
    for beside in (before(run), run.with_name(f"{run.name}.rebased")):
        if beside.is_dir():
            yield "a run on another base", f"{beside} is this run on another base: forget the user there too"
    yield from served_remains(run, user)
    copies = "copies that left the run, and backups, are not known to it"
    yield copies, f"{copies}: delete those that were made"


def _entry(run: Path, trace: Trace, user: DataSubject) -> dict[str, Any]:
    """A trace as the proof lists it, without the readable part of a folder's name."""
    inside = trace.path.is_relative_to(run)
    parts = [_nameless(part, user) for part in trace.path.relative_to(run).parts] if inside else ["(outside the run)"]
    return {"path": "/".join(parts), "what": trace.what, "count": trace.pieces}


def _nameless(part: str, user: DataSubject) -> str:
    return re.sub(rf"[a-z0-9-]*-{slug_hash(user.pseudonym)}", f"*-{slug_hash(user.pseudonym)}", part)


def _near(run: Path, user_id: str) -> str:
    try:
        return did_you_mean(user_id, (result.user_id for result in RunResults(run)))
    except InputError:  # an unfinished run has no results yet
        return ""
