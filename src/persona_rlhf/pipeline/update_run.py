"""Users added to a finished run (`add`), and all users trained again on a new base (`rebase`)."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write, pseudonym, remove_folder, write_folder
from persona_rlhf.common.run_lock import locks_run, run_lock, tell_nobody
from persona_rlhf.config.experiment import read_run_config
from persona_rlhf.data.erasure import DataSubject
from persona_rlhf.data.store import PairStore, UserSelection
from persona_rlhf.pipeline.distributed import WorkShare
from persona_rlhf.pipeline.export_choices import UPDATES
from persona_rlhf.pipeline.inputs import read_inputs
from persona_rlhf.pipeline.looks import earlier_looks, enter_earlier, ledger_of
from persona_rlhf.pipeline.monitoring import OnProgress, ProgressEvent, silent
from persona_rlhf.pipeline.run_dir import PAIRS, SOURCES, RunDir, number_of
from persona_rlhf.release import integrity
from persona_rlhf.release.comparison import Comparison, RebasedUser, compare, rebased_users, to_json, write_rebase
from persona_rlhf.release.data_curve_file import DATA_CURVE
from persona_rlhf.release.earlier_adapters import adapter_name, drop_earlier, set_aside
from persona_rlhf.release.impact_report import remove_impact
from persona_rlhf.release.integrity import RUN_MANIFEST, write_run_manifest
from persona_rlhf.release.manifest import read_manifest
from persona_rlhf.release.redteam_report import REDTEAM
from persona_rlhf.release.report import REPORT, write_report
from persona_rlhf.release.results import RESULTS, Result, RunResults, plain, read_results

ADDED_EVENT = "added"
REBASED_EVENT = "rebased"


class Added(NamedTuple):
    """Results of the added users, and how many users of the source were left out: unchanged ones, forgotten ones."""

    results: list[Result]
    unchanged: int
    forgotten: int


def add(
    run: Path,
    source: str,
    on_progress: OnProgress = silent,
    *,
    keep_earlier: bool = False,
    wait: float = 0.0,
    tell: Callable[[str], None] = tell_nobody,
) -> Added:
    """Trains users of `source` whose pairs are new to a finished run, or changed, and makes them users of the run.

    `source` holds all pairs of each of its users: they replace the pairs that the run has. Config, base and policy are
    those of the run. The users are trained in a run of their own inside the folder; the next call resumes a killed one.

    `keep_earlier` sets a changed user's adapter aside, for the way back (`release/earlier_adapters`). Where the new one
    is not released, the earlier one stays in its place.

    Raises InputError where the run is not finished, its base, policy or config changed since, it was recertified under
    other documents since, its gate shares delta among all users, or the source cannot be read; nothing is changed then.
    """
    with run_lock(run, "add", part="adding", wait=wait, tell=tell):  # readers may go on while the users are trained
        added = _train_addition(run, source, on_progress, keep_earlier)
    if not added.results:
        return added
    with run_lock(run, "add", wait=math.inf, tell=tell):  # the work is done; a reader will not be long
        if RunDir(run).addition_trained.is_file():  # else another program completed it
            _need_same_documents(run)
            complete_addition(run)
        users = RunDir(run).selection.user_digests
    if any(number_of(users, DataSubject(pseudonym(result.user_id))) is None for result in added.results):
        sentence = "a user of this addition was forgotten before its end, so none of it was added; give `add` again"
        raise InputError([Problem(str(run), None, "--users", sentence)])
    return added


def _need_same_documents(run: Path) -> None:
    """Removes a trained addition, and raises InputError, where a recertification came before its end."""
    try:
        RunDir(run).need_newest_documents("users are added")
    except InputError:
        remove_folder(RunDir(run).addition)
        raise


def _train_addition(run: Path, source: str, on_progress: OnProgress, keep_earlier: bool) -> Added:
    """Trains the new and changed users in the run inside, and marks them as trained."""
    run_dir = RunDir(run)
    inner = RunDir(run_dir.addition)
    run_dir.need_finished("users are added")
    run_dir.need_newest_documents("users are added")
    config = read_run_config(run, exact="")
    if config.gate.enabled and config.gate.family == "all":
        sentence = "this run shares delta among all of its users, so nothing of it is left for new ones"
        raise InputError([Problem(str(run / "config.yaml"), None, "gate.family", sentence)])
    selection = run_dir.selection
    store = PairStore(source, config.users.heldout, UserSelection(excluded=selection.excluded))
    in_source, in_run = [user for user in store.user_digests if user is not None], {*selection.user_digests}
    changed = [user for user in in_source if user not in in_run]
    if not changed:
        return Added([], len(in_source), store.left_out)
    if inner.path.exists() and [user for user in inner.selection.user_digests if user is not None] != changed:
        on_progress(ProgressEvent("adding", "another addition was under way; this one begins anew"))
        remove_folder(inner.path)
    if not inner.begun:
        inner.begin_as(run_dir, changed, WorkShare().chunk_size(len(changed), config.fleet.chunk))
    out = selection.excluded | {name for name, _ in in_source} - {name for name, _ in changed}
    with_source = config.model_copy(update={"users": config.users.model_copy(update={"path": source})})
    inputs = read_inputs(with_source, UserSelection(inner.selection.user_digests, frozenset(out)))
    from persona_rlhf.pipeline import train

    train.train_share(config, inner.path, resume=True, on_progress=on_progress, inputs=inputs, audit_run=run)
    results = read_results(inner.path)
    mark_trained(run, source, keep_earlier)
    return Added(results, len(in_source) - len(changed), store.left_out)


def mark_trained(run: Path, source: str, keep_earlier: bool = False) -> None:
    """Marks the added users as trained and sealed: from then on, any start of a program completes the addition."""
    mark = {"source": source, "keep_earlier": keep_earlier}
    atomic_write(RunDir(run).addition_trained, json.dumps(mark).encode())


@locks_run("add")
def complete_addition(run: Path) -> None:
    """Makes the trained users of an addition users of the run: adapters, lines, report, seal, and one audit event.

    Each file is written whole or not at all, and all of it can be done again after a kill.
    """
    run_dir = RunDir(run)
    inner = run_dir.addition
    new = {result.user_id: result for result in RunResults(inner)}
    mark = json.loads(run_dir.addition_trained.read_bytes())
    joining = _joining(run, new, mark.get("keep_earlier", False))
    _adapters(run, inner, joining)
    atomic_write(run / RESULTS, _in_place(run / RESULTS, inner / RESULTS, joining))
    for name in ("screening.jsonl", "metrics.jsonl"):
        atomic_write(run / name, _replaced(run / name, inner / name, new.__contains__))
    run_dir.add_source(mark["source"], superseded := _superseded(run, Path(mark["source"])))
    added = {user[0]: user for user in RunDir(inner).selection.user_digests if user is not None}
    before = [user if user is None else added.get(user[0], user) for user in run_dir.selection.user_digests]
    names = {user[0] for user in before if user is not None}
    run_dir.change_users([*before, *(user for name, user in added.items() if name not in names)])
    for earlier in (REDTEAM, DATA_CURVE):  # they cover the adapters released before
        (run / earlier).unlink(missing_ok=True)
    remove_impact(run)
    write_report(run)
    inner_seal = (read_manifest(inner / RUN_MANIFEST)[0] or {}).get("manifest_hash")
    events = (entry for entry in integrity.read(run) if entry.event == ADDED_EVENT)
    if not any(entry.facts.get("seal") == inner_seal for entry in events):
        users = {pseudonym(user): result.manifest_sha256 for user, result in new.items()}
        integrity.append(run, ADDED_EVENT, seal=inner_seal, users=users)
    for name in (RESULTS, "screening.jsonl", "metrics.jsonl", SOURCES, REDTEAM, DATA_CURVE, REPORT, integrity.AUDIT):
        write_run_manifest(run, only=name)
    for file in superseded:
        file.unlink()
    remove_folder(inner)


def _superseded(run: Path, source: Path) -> list[Path]:
    """Files of earlier updates of the same user from the feedback page: the new one has all of the user's pairs."""
    if source.parent.resolve() != (run / UPDATES).resolve():
        return []
    of_user = source.parent.glob(f"{source.stem.rpartition('-')[0]}-*.jsonl")
    return [file for file in sorted(of_user) if file.name != source.name]


def _joining(run: Path, new: dict[str, Result], keep_earlier: bool) -> dict[str, Result]:
    """The users whose new results replace those before: with `keep_earlier`, all but those who would lose an adapter.

    The adapters before are set aside then, once; without it, earlier ones go with the adapters that they preceded.
    """
    if not keep_earlier:
        drop_earlier(run, new)
        return new
    before: dict[str, Result | None] = dict.fromkeys(new)
    before |= {result.user_id: result for result in RunResults(run) if result.user_id in new}
    losing = {user for user, old in before.items() if old is not None and old.has_adapter and not new[user].has_adapter}
    replaced = {  # after a kill some are replaced already
        user: old
        for user, old in before.items()
        if new[user].has_adapter and adapter_name(old) != adapter_name(new[user])
    }
    if replaced:
        set_aside(run, replaced)
        drop_earlier(run, replaced, replaced)
    return {user: result for user, result in new.items() if user not in losing}


def _adapters(run: Path, inner: Path, new: dict[str, Result]) -> None:
    """Copies the new users' adapters; an earlier adapter of such a user is removed."""
    before = {result.user_id: result.path for result in RunResults(run) if result.user_id in new}
    for user, result in new.items():
        if result.path is not None:
            files = sorted((inner / result.path).iterdir())
            write_folder(run / result.path, {file.name: file.read_bytes() for file in files})
        old = before.get(user)
        if old is not None and old != result.path and (run / old).exists():
            shutil.rmtree(run / old)


def _in_place(file: Path, more: Path, users: Collection[str]) -> Iterator[bytes]:
    """The lines of a file with one line a user: these `users` of `more` in their places, new users at the end."""
    lines_of = {json.loads(line)["user_id"]: line for line in more.read_bytes().splitlines(keepends=True)}
    new = {user: line for user, line in lines_of.items() if user in users}
    with file.open("rb") as lines:
        for line in lines:
            yield new.pop(json.loads(line)["user_id"], line)
    yield from new.values()


def _replaced(file: Path, more: Path, is_new: Callable[[str], bool]) -> Iterator[bytes]:
    """The lines of a file without those of the new users, then the lines of the new users."""
    for place, wanted in ((file, False), (more, True)):
        if place.exists():
            with place.open("rb") as stream:
                yield from (line for line in stream if is_new(json.loads(line)["user_id"]) is wanted)


class Rebased(NamedTuple):
    """Every user before and after, and the means over users with their intervals and changes."""

    users: list[RebasedUser]
    figures: Comparison

    def to_json(self) -> dict[str, Any]:
        """Both as plain JSON values."""
        return {"users": plain(self.users), "figures": to_json(self.figures)}


def rebase(
    run: Path,
    base: str,
    to: Path,
    on_progress: OnProgress = silent,
    *,
    wait: float = 0.0,
    tell: Callable[[str], None] = tell_nobody,
) -> Rebased:
    """Trains and judges all users of a finished run on another base, into the folder `to`, and compares both runs.

    Pairs, config, policy and ledger of looks are those of the run; forgotten users stay out. Of the run itself, only
    its ledger changes. The next call resumes a killed one. Raises InputError where the run is not finished, its pairs
    changed since, it was recertified under other documents since, `base` has the weights of the run's base, `to` is
    another run, or the ledger cannot be used.
    """
    with run_lock(run, "rebase", shared=True, wait=wait, tell=tell):
        RunDir(run).need_finished("its base is changed")
        RunDir(run).need_newest_documents("its base is changed")
        if to.resolve() == run.resolve():
            sentence = "the run on the new base needs a folder of its own; name another with --run"
            raise InputError([Problem(str(to), None, "--run", sentence)])
        with run_lock(to, "rebase", wait=wait, tell=tell):
            return _rebase(run, base, to, on_progress)


def _rebase(run: Path, base: str, to: Path, on_progress: OnProgress) -> Rebased:
    from persona_rlhf.models.base import weights_hash

    run_dir, new = RunDir(run), RunDir(to)
    # the issuer who aligned the old base says nothing of the new one, and adapters over the old one do not fit it
    changes = [f"base.model={json.dumps(base)}", "base.aligned_by=null", "users.start=null"]
    config = read_run_config(run, changes, exact="")
    ledger = ledger_of(config, run)  # with the looks of the old run: it goes on in the new one
    config = config.model_copy(update={"gate": config.gate.model_copy(update={"ledger": ledger.file})})
    if weights_hash(config.base) == run_dir.base_hash:
        raise InputError([Problem(base, None, "--base", "these are the weights of the base that the run has")])
    run_dir.check_same({PAIRS: read_inputs(config, run_dir.selection).pairs.fingerprint})
    new.check_place(new.begun)
    ledger.check()
    enter_earlier(ledger, run, earlier_looks(run))
    if not new.begun:
        new.begin_with(run_dir)
    from persona_rlhf.pipeline import train

    train.train_share(config, to, resume=new.begun, on_progress=on_progress)
    old_results, results = read_results(run), read_results(to)
    users = rebased_users(old_results, results)
    write_rebase(to, users)
    if not any(entry.event == REBASED_EVENT for entry in integrity.read(to)):
        facts = {
            "old_base": run_dir.base_hash,
            "new_base": new.base_hash,
            "old_trail": str(integrity.head(run) or ""),
        }
        integrity.append(to, REBASED_EVENT, **facts, users=len(users))
        write_run_manifest(to, only=integrity.AUDIT)
    return Rebased(users, compare({"old base": {0: old_results}, "new base": {0: results}}))
