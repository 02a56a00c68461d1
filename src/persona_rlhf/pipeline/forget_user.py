"""`forget`: find every trace, erase, prove."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from persona_rlhf.common.errors import InputError, Problem, did_you_mean
from persona_rlhf.common.files import atomic_write, pseudonym, remove_folder
from persona_rlhf.config.loader import read_yaml
from persona_rlhf.data.pairs import PreferencePair
from persona_rlhf.data.store import PairStore, UserSelection
from persona_rlhf.pipeline.run_dir import RunDir, before
from persona_rlhf.release import integrity
from persona_rlhf.release.deletion_records import (
    FORGOTTEN,
    adapter_folders,
    erase,
    files_with_rows,
    others_adapters,
    pending,
    pending_file,
    proof_file,
    rows_of,
    slug_hash,
    write_proof,
)
from persona_rlhf.release.hub import delete_upload, uploads_of
from persona_rlhf.release.integrity import REVOKED, RUN_MANIFEST, run_manifest_faults, write_run_manifest
from persona_rlhf.release.manifest import read_manifest
from persona_rlhf.release.redteam_report import REDTEAM, without_user
from persona_rlhf.release.report import write_report
from persona_rlhf.release.results import SUMMARY, RunResults
from persona_rlhf.simulation.users import read_utilities

# ----------------------------------------------------------------------------------------------------
# Everything in a run folder that is of one user, and how each piece goes; he is known by his pseudonym alone.
#
# Each removal is whole or not at all, and can be done again: whatever it is interrupted by, doing all of them once
# more
# ends in the same place.
# ----------------------------------------------------------------------------------------------------

_NAMELESS = (integrity.AUDIT, REVOKED, "users.jsonl")  # they call users by their pseudonyms; the last goes by itself

_PAPERS = {
    RUN_MANIFEST,
    REDTEAM,
    SUMMARY,
    "policy.json",
    "bank.json",
    "identity.json",
    "persona.json",
    "adapter_config.json",
}


_RULES = ("preferences", "not_in_force")  # of policy.json: what end users stated


class Trace(NamedTuple):
    """A piece: where it lies, what it is in words, how many of these there are, and what takes them away."""

    path: Path
    what: str
    pieces: int
    remove: Callable[[], object]


@dataclass(frozen=True, slots=True)
class TraceOwner:
    """Whose traces are looked for."""

    name: str

    def __call__(self, user_id: object) -> bool:
        return isinstance(user_id, str) and _pseudonym(user_id) == self.name


class ExternalPaths(NamedTuple):
    """What a run's config says of places outside its folder; read leniently, for some may be gone."""

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
        more, fleet = config.get("evaluation") or {}, config.get("fleet") or {}
        users = config["users"]
        asked = (users["path"], users.get("heldout", 0.25), more.get("utilities"), fleet.get("reference_cache"))
        return ExternalPaths(*asked, config["base"]["model"])
    except (AttributeError, KeyError, TypeError) as fault:
        sentence = f"the config of this run lacks a part of its form ({fault})"
        raise InputError([Problem(str(run / "config.yaml"), None, None, sentence)]) from fault


_pseudonym = lru_cache(4096)(pseudonym)


def traces(run: Path, name: str) -> Iterator[Trace]:
    """What the run folder holds of a user, piece by piece. Raises InputError where a file of it cannot be read."""
    his, inner = TraceOwner(name), RunDir(RunDir(run).addition)
    if number_of(inner.selection.known, name) is not None:
        yield Trace(inner.path, "an addition under way, all of it", 1, partial(remove_folder, inner.path))
    for folder in adapter_folders(run):
        if folder.name.lstrip(".").partition(".")[0].endswith(slug_hash(name)):
            yield Trace(folder, "adapter", 1, partial(shutil.rmtree, folder))
    yield from _files(run, his)
    yield from _checkpoints(run, his)
    yield from _papers(run, his)
    yield from _index(run, his)


def _files(run: Path, his: TraceOwner) -> Iterator[Trace]:
    """Rows of files with a row or a line a pair, a step or a user; the run's own and sources that lie in it."""
    for file in files_below(run):
        if file.name.endswith((".half", ".old")):
            continue  # swept at the end, whosever it is
        if file.name in _NAMELESS or FORGOTTEN in file.relative_to(run).parts or not files_with_rows(file):
            continue
        if file.suffix == ".json" and file.name in _PAPERS:
            continue
        if count := rows_of(file, his):
            yield Trace(file, "lines", count, partial(erase, file, his))


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, but those behind links."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def sweep(run: Path) -> None:
    """Removes what interrupted writes left behind: halves of files, and of lines. Anybody's data may be in them."""
    for path in sorted(run.rglob("*")):
        if path.name.endswith((".half", ".old")) and not path.is_symlink() and path.exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for file in (*run.rglob("metrics*.jsonl"), *run.rglob("ledger.jsonl")):
        if rows_of(file, _nobody, torn=True):
            erase(file, _nobody, torn=True)


def _nobody(_: object) -> bool:
    return False


def _checkpoints(run: Path, his: TraceOwner) -> Iterator[Trace]:
    """What an interrupted training keeps."""
    for file in sorted((run / "state").rglob("*.safetensors")):
        if file.parent.name == "trained" and file.stem.endswith(slug_hash(his.name)):
            yield Trace(file, "trained adapter of an unfinished run", 1, file.unlink)
        elif file.name == "slots.safetensors":
            from persona_rlhf.training import checkpoint

            if checkpoint.sits_in(file, his):
                yield Trace(file, "place in a checkpoint", 1, partial(checkpoint.without, file, his))


def _index(run: Path, his: TraceOwner) -> Iterator[Trace]:
    """His line among the users; his number stays free. It goes last.

    Before it goes the base's log-probabilities that his chunk asked for, if it is in training: they are computed anew
    for the others.
    """
    folder = RunDir(run)
    known = folder.selection.known
    if (number := number_of(known, his.name)) is not None:
        values = folder.chunk(number // folder.chunk_size) / folder.reference.name
        if values.exists():
            yield Trace(values, "the base's log-probabilities of a chunk, all", 1, values.unlink)
        rest = [*known[:number], None, *known[number + 1 :]]
        yield Trace(folder.users, "index line", 1, partial(folder.change_users, rest))


def number_of(known: Sequence[tuple[str, str] | None], name: str) -> int | None:
    """The number of a user; None where he is not among those known."""
    return next((number for number, user in enumerate(known) if user is not None and user[0] == name), None)


def _papers(run: Path, his: TraceOwner) -> Iterator[Trace]:
    """Pieces of files that are about everybody."""
    file = run / REDTEAM
    if file.is_file() and any(his(user["user_id"]) for user in json.loads(file.read_bytes())["users"]):
        yield Trace(file, "red team's figures", 1, partial(without_user, run, his))
    for place in sorted(run.rglob("policy.json")):
        policy = json.loads(place.read_bytes())
        if own := [rule for key in _RULES for rule in policy.get(key, ()) if his(rule["user_id"])]:
            yield Trace(place, "tier-three rules of the policy", len(own), partial(_unrule, place, policy, own))


def _unrule(file: Path, policy: dict[str, Any], own: list[dict[str, Any]]) -> None:
    """The policy without a user's own rules and their document; its hash stays that which everybody was judged by."""
    documents = {rule["document"] for rule in own}
    kept = {
        **{key: [rule for rule in policy[key] if rule not in own] for key in _RULES if key in policy},
        "documents": [document for document in policy["documents"] if document["path"] not in documents],
    }
    atomic_write(file, (json.dumps(policy | kept, indent=2, ensure_ascii=False) + "\n").encode())


def cached(outside: ExternalPaths, roll: UserSelection, name: str) -> Iterator[Trace]:
    """What `fleet.reference_cache` keeps of the user: values that no other user of the run asked for.

    A value is known by the hash of its tokens, so his pairs are tokenized again to find them. Where his pairs are no
    longer those that were trained on, nobody can say which values were his, and all go: they are computed anew when
    they are needed.
    """
    files = sorted(Path(outside.cache).glob("*.safetensors")) if outside.cache is not None else []
    number = number_of(roll.known, name)
    if not files or (roll.known and number is None):
        return
    from persona_rlhf.training.cache import drop_values, values_of

    keys = None if number is None else _keys(outside, roll._replace(out=roll.out - {name}), number)
    what = "the base's log-probabilities of his rows" if keys is not None else "the base's log-probabilities, all"
    for file in files:
        if count := values_of(file, keys):
            yield Trace(file, what, count, partial(drop_values, file, keys))


def _keys(outside: ExternalPaths, roll: UserSelection, number: int) -> set[bytes] | None:
    """The rows that he alone asked for; None where that cannot be said any more."""
    from persona_rlhf.data.tokenize import both_rows, tokenize
    from persona_rlhf.models.base import load_tokenizer
    from persona_rlhf.training.cache import key_of

    try:
        pairs = PairStore(outside.users, outside.heldout, roll)
        if pairs.known[number] != roll.known[number]:
            return None
        tokenizer = load_tokenizer(outside.model)

        def keys(told: Sequence[PreferencePair]) -> set[bytes]:
            rows = tokenize(told, tokenizer, sys.maxsize)
            return {key_of(row) for user in rows for row in both_rows((*user.train, *user.heldout))}

        his = pairs.of(range(number, number + 1))
        own = keys(his)
        for start in range(0, pairs.users, 256):
            told = pairs.of(range(start, min(start + 256, pairs.users)))
            own -= keys([pair for pair in told if pair.user_id != his[0].user_id])
    except InputError:
        return None
    return own


# ----------------------------------------------------------------------------------------------------
# `forget`: one user is deleted from a run and from what the run shares, and a proof of it is written.
#
# What is asked stands in RUN/forgotten/HASH.pending before anything goes, so a deletion that is cut short is finished
# by
# the next program that opens the run.
# ----------------------------------------------------------------------------------------------------

FORGOTTEN_EVENT = "forgotten"


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
    name, folder = pseudonym(user_id), RunDir(run)
    outside = read_external_paths(run)
    found = [*traces(run, name), *cached(outside, folder.selection, name)]
    sources = list(_sources(outside, folder, TraceOwner(name))) if data else []
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
        "faults_before": run_manifest_faults(run) if folder.finished else [],
    }
    write_proof(pending_file(run, name), order)
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
    outside, folder = read_external_paths(run), RunDir(run)
    sweep(run)
    for trace in chain(
        cached(outside, folder.selection, name), traces(run, name)
    ):  # the index line, in these, goes last
        trace.remove()
    if order["data"]:
        for trace in _sources(outside, folder, TraceOwner(name)):
            trace.remove()
    if folder.finished:
        write_report(run)
        for changed in (*(file.name for file in run.glob("*.jsonl")), "policy.json", REDTEAM):
            write_run_manifest(run, only=changed)
    remains = list(_remains(run, outside, folder, TraceOwner(name)))
    after = others_adapters(run, name)
    content = {
        **{key: order[key] for key in ("user", "at", "removed", "faults_before")},
        "others": {
            other: {"before": order["others"].get(other), "after": after.get(other)}
            for other in sorted({*order["others"], *after})
        },
        "remains": [what for what, _ in remains],
    }
    proof = write_proof(proof_file(run, name), content)
    if not any(entry.facts.get("proof") == proof for entry in integrity.read(run) if entry.event == FORGOTTEN_EVENT):
        integrity.append(run, FORGOTTEN_EVENT, user=name, proof=proof)
    if folder.finished:
        write_run_manifest(run, only=integrity.AUDIT)
    pending_file(run, name).unlink()
    return Forgotten(proof_file(run, name), content, [sentence for _, sentence in remains])


def _sources(outside: ExternalPaths, folder: RunDir, his: TraceOwner) -> Iterator[Trace]:
    """His rows in the files outside the run that its pairs come from."""
    for source in (outside.users, *folder.sources):
        for file in files_with_rows(Path(source)):
            if folder.path.resolve() in file.resolve().parents:
                continue  # its rows go in any case
            if count := rows_of(file, his):
                yield Trace(file, "rows of a source", count, partial(erase, file, his))


def _remains(run: Path, outside: ExternalPaths, folder: RunDir, his: TraceOwner) -> Iterator[tuple[str, str]]:
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
    return re.sub(rf"[a-z0-9-]*-{slug_hash(name)}", f"*-{slug_hash(name)}", part)
