"""`add`, `rebase`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write, pseudonym, remove_folder, write_folder
from persona_rlhf.config.experiment import Config, read_run_config
from persona_rlhf.data.store import PairStore, UserSelection
from persona_rlhf.models.base import weights_hash
from persona_rlhf.pipeline import train
from persona_rlhf.pipeline.distributed import WorkShare
from persona_rlhf.pipeline.inputs import read_inputs
from persona_rlhf.pipeline.run_dir import PAIRS, SOURCES, RunDir
from persona_rlhf.release import integrity
from persona_rlhf.release.comparison import Comparison, RebasedUser, compare, rebased_users, to_json, write_rebase
from persona_rlhf.release.integrity import RUN_MANIFEST, write_run_manifest
from persona_rlhf.release.manifest import read_manifest
from persona_rlhf.release.redteam_report import REDTEAM
from persona_rlhf.release.report import REPORT, write_report
from persona_rlhf.release.results import RESULTS, Result, RunResults, plain, read_results

# ----------------------------------------------------------------------------------------------------
# The end of `add`: users who were trained in a run of their own, inside the folder of another, become users of that.
#
# The joined run is written file by file, each whole or not at all, and all of it can be done again: from the moment
# that
# everything is trained, judged and sealed, any later start of a program finishes it.
# ----------------------------------------------------------------------------------------------------

ADDED_EVENT = "added"


def begin_joining(run: Path, source: str) -> None:
    """Everything is trained: from here on, it is finished whatever happens."""
    atomic_write(RunDir(run).joining, json.dumps({"source": source}).encode())


def join(run: Path) -> None:
    """Makes the users of the run inside users of the run: adapters, lines, report, seal, and one line in the trail."""
    folder = RunDir(run)
    inner = folder.adding
    new = {result.user_id: result for result in RunResults(inner)}
    _adapters(run, inner, new)
    atomic_write(run / RESULTS, _in_place(run / RESULTS, inner / RESULTS))
    for name in ("screening.jsonl", "metrics.jsonl"):
        atomic_write(run / name, _others_then(run / name, inner / name, new.__contains__))
    folder.add_source(json.loads(folder.joining.read_bytes())["source"])
    own = {user[0]: user for user in RunDir(inner).roll.known if user is not None}
    rest = [user if user is None else own.get(user[0], user) for user in folder.roll.known]
    there = {user[0] for user in rest if user is not None}
    folder.change_users([*rest, *(user for name, user in own.items() if name not in there)])
    (run / REDTEAM).unlink(missing_ok=True)  # it is about those who were released before
    write_report(run)
    papers = (read_manifest(inner / RUN_MANIFEST)[0] or {}).get("manifest_hash")
    if not any(entry.facts.get("seal") == papers for entry in integrity.read(run) if entry.event == ADDED_EVENT):
        users = {pseudonym(user): result.manifest_sha256 for user, result in new.items()}
        integrity.append(run, ADDED_EVENT, seal=papers, users=users)
    for name in (RESULTS, "screening.jsonl", "metrics.jsonl", SOURCES, REDTEAM, REPORT, integrity.AUDIT):
        write_run_manifest(run, only=name)
    remove_folder(inner)


def _adapters(run: Path, inner: Path, new: dict[str, Result]) -> None:
    """The new users' adapters; of those who had one before, the old one goes."""
    before = {result.user_id: result.path for result in RunResults(run) if result.user_id in new}
    for user, result in new.items():
        if result.path is not None:
            files = sorted((inner / result.path).iterdir())
            write_folder(run / result.path, {file.name: file.read_bytes() for file in files})
        old = before.get(user)
        if old is not None and old != result.path and (run / old).exists():
            shutil.rmtree(run / old)


def _in_place(file: Path, more: Path) -> Iterator[bytes]:
    """The lines of a file with a line a user: those of changed users in their places, those of new ones at the end."""
    new = {json.loads(line)["user_id"]: line for line in more.read_bytes().splitlines(keepends=True)}
    with file.open("rb") as lines:
        for line in lines:
            yield new.pop(json.loads(line)["user_id"], line)
    yield from new.values()


def _others_then(file: Path, more: Path, is_new: Callable[[str], bool]) -> Iterator[bytes]:
    """The lines of a file but those of the new users, and then theirs."""
    for place, wanted in ((file, False), (more, True)):
        if place.exists():
            with place.open("rb") as stream:
                yield from (line for line in stream if is_new(json.loads(line)["user_id"]) is wanted)


# ----------------------------------------------------------------------------------------------------
# `add`: users new to a finished run, or whose pairs changed, are trained into it; the others stay as they are.
# ----------------------------------------------------------------------------------------------------


class Added(NamedTuple):
    """Who was trained, and how many users of the source were not: nothing of theirs changed, or they asked to be
    forgotten."""

    results: list[Result]
    unchanged: int
    forgotten: int


def add(run: Path, source: str, console: Console) -> Added:
    """Trains the users of `source` whose pairs the run does not have as they are there, and makes them users of it.

    Whoever is in `source` is there with all of his pairs: they replace what the run had of him. The run's config, base
    and policy are those that it began with. A call that was killed is gone on with by the next.

    Raises InputError where the run is not finished, its base, policy or config changed since, its gate shares delta
    among all users, or the source cannot be read; nothing is changed then.
    """
    folder = RunDir(run)
    inner = RunDir(folder.adding)
    if not folder.finished:
        sentence = "this run is not finished; go on with it (train has --resume) before users are added"
        raise InputError([Problem(str(run), None, None, sentence)])
    config = read_run_config(run, exact=True)
    if config.gate.enabled and config.gate.family == "all":
        sentence = "this run shares delta among all of its users, so nothing of it is left for new ones"
        raise InputError([Problem(str(run / "config.yaml"), None, "gate.family", sentence)])
    roll = folder.roll
    wanted, store = _wanted(config, source, roll)
    there = len([user for user in store.known if user is not None])
    if not wanted:
        return Added([], there, store.left_out)
    if inner.path.exists() and [user for user in inner.roll.known if user is not None] != wanted:
        console.print("another addition was under way; this one begins anew")
        remove_folder(inner.path)
    if not inner.begun:
        inner.begin_as(folder, wanted, WorkShare().chunk_size(len(wanted), config.fleet.chunk))
    out = roll.out | {user[0] for user in store.known if user is not None} - {name for name, _ in wanted}
    asked = config.model_copy(update={"users": config.users.model_copy(update={"path": source})})
    materials = read_inputs(asked, UserSelection(inner.roll.known, frozenset(out)))
    train.train(config, inner.path, True, console, materials, trail=run)
    results = read_results(inner.path)
    begin_joining(run, source)
    join(run)
    return Added(results, there - len(wanted), store.left_out)


def _wanted(config: Config, source: str, roll: UserSelection) -> tuple[list[tuple[str, str]], PairStore]:
    """The users of a source whom the run does not have, or has with other pairs; and all of the source."""
    store = PairStore(source, config.users.heldout, UserSelection(out=roll.out))
    known = {user for user in roll.known if user is not None}
    return [user for user in store.known if user is not None and user not in known], store


# ----------------------------------------------------------------------------------------------------
# `rebase`: a new base voids every adapter, so all users are trained again on it, beside the run that they are in.
# ----------------------------------------------------------------------------------------------------

REBASED_EVENT = "rebased"


class Rebased(NamedTuple):
    """Every user before and after, and the means over users with their intervals and changes."""

    users: list[RebasedUser]
    figures: Comparison

    def to_json(self) -> dict[str, Any]:
        """Both as plain JSON values."""
        return {"users": plain(self.users), "figures": to_json(self.figures)}


def rebase(run: Path, base: str, to: Path, console: Console) -> Rebased:
    """Trains and judges all users of a finished run on another base, into the folder `to`, from the pairs and under
    the config and policy that they had; and holds both runs against each other. The old run is only read.

    Those who asked to be forgotten stay out. A call that was killed is gone on with by the next. Raises InputError
    where the run is not finished, its pairs changed since, `base` is the base that it has, or `to` is another run.
    """
    folder, new = RunDir(run), RunDir(to)
    if not folder.finished:
        sentence = "this run is not finished; go on with it (train has --resume) before its base is changed"
        raise InputError([Problem(str(run), None, None, sentence)])
    # who aligned the old base says nothing of the new one
    config = read_run_config(run, [f"base.model={json.dumps(base)}", "base.aligned_by=null"], exact=True)
    if weights_hash(config.base) == folder.base_hash:
        raise InputError([Problem(base, None, "--base", "these are the weights of the base that the run has")])
    folder.check_same({PAIRS: read_inputs(config, folder.roll).pairs.fingerprint})
    new.check_place(new.begun)
    if not new.begun:
        new.begin_with(folder)
    train.train(config, to, new.begun, console)
    old_results, results = read_results(run), read_results(to)
    users = rebased_users(old_results, results)
    write_rebase(to, users)
    if not any(entry.event == REBASED_EVENT for entry in integrity.read(to)):
        facts = {"old_base": folder.base_hash, "new_base": new.base_hash, "old_trail": str(integrity.head(run) or "")}
        integrity.append(to, REBASED_EVENT, **facts, users=len(users))
        write_run_manifest(to, only=integrity.AUDIT)
    return Rebased(users, compare({"old base": {0: old_results}, "new base": {0: results}}))
