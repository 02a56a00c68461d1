"""Released adapters on the hub: one private repository a user, or one for many; each upload is in the audit trail.

On the hub a user is called by his `pseudonym`, in paths as in names: a slug shows the readable part of a user id, and
whoever may read a repository (or only a list of their names) is not therefore to learn who is in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi

from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.preferences.identity import pseudonym
from persona_rlhf.release import audit
from persona_rlhf.release.card import shared_card
from persona_rlhf.release.manifest import MANIFEST, read_manifest, user_mark
from persona_rlhf.release.repository import HUBS_OWN, MAIN, Held, Repository
from persona_rlhf.release.upload import Difference, File, difference, send
from persona_rlhf.release.verify import Witnesses, verify

USERS = "users"
PER_COMMIT = 1_000
"""Adapters of a commit: the hub takes 25,000 files, and what a broken line costs should be little."""

_CARD = "README.md"
_PLACE = re.compile(rf"{USERS}/[0-9a-f]{{32}}/[^/]+")
_BEGUN, _DONE, _DELETED = "uploading", "uploaded", "upload_deleted"


class Adapter(NamedTuple):
    """A released adapter on its way: whose it is, and its folder here."""

    user_id: str
    folder: Path


class Upload(NamedTuple):
    """Where an adapter was put on the hub. `path` is "" where the repository is one user's.

    `commit` is None where the upload was begun and nobody wrote down that it ended: something may be there.
    """

    user: str  # pseudonym
    repo: str
    revision: str
    path: str
    commit: str | None


class Parcel(NamedTuple):
    """What goes to one repository: one user's adapter to its top, or those of many to a folder each."""

    repository: Repository
    adapters: Sequence[Adapter]
    shared: bool

    def place(self, adapter: Adapter) -> str:
        """The folder of an adapter in the repository; "" is its top."""
        return f"{USERS}/{pseudonym(adapter.user_id)}" if self.shared else ""

    def files(self) -> dict[str, File]:
        """Everything that is to be there, hashed."""
        found = {}
        for adapter in self.adapters:
            place = self.place(adapter)
            for file in sorted(adapter.folder.iterdir()):
                found[f"{place}/{file.name}" if place else file.name] = File.of(file)
        if self.shared:
            found[_CARD] = File.of(shared_card(self.adapters[0].folder).encode())
        return found


def parcels(
    repo: str,
    adapters: Sequence[Adapter],
    *,
    shared: bool,
    per_user: bool,
    revision: str = MAIN,
    api: HfApi | None = None,
) -> list[Parcel]:
    """How adapters are put into repositories: the one `repo`, shared or not, or one each, called `repo`-PSEUDONYM."""
    api = api or HfApi(library_name="persona-rlhf")
    if per_user:
        return [Parcel(Repository(f"{repo}-{pseudonym(a.user_id)}", revision, api), [a], False) for a in adapters]
    assert shared or len(adapters) == 1, "a repository for many is a shared one"
    return [Parcel(Repository(repo, revision, api), adapters, shared)]


def preview(run: Path, parcel: Parcel, public: bool) -> Difference:
    """What an upload would change; nothing is sent. Raises InputError as `upload` does."""
    held = _checked(parcel, public)
    return difference(held.files, parcel.files(), _folders(run, parcel, held))


def upload(run: Path, parcel: Parcel, public: bool, say: Callable[[str], None], per_commit: int = PER_COMMIT) -> str:
    """Puts a parcel where it goes, and writes down in the run that it did; the last commit.

    A repository is made private, and public only when all is there. Adapters go `per_commit` to a commit, those of one
    user never in two; a run of this that was broken off is gone on with by the next. Raises InputError where the
    repository is another's, or public without `public` being said, and where the hub does not take it.
    """
    held, files = _checked(parcel, public), parcel.files()
    parcel.repository.create()
    stale = _folders(run, parcel, held) - {parcel.place(adapter) for adapter in parcel.adapters} - {""}
    left, sent, commit = iter(parcel.adapters), 0, ""
    while batch := list(islice(left, per_commit)):
        sent += len(batch)
        places = {parcel.place(adapter) for adapter in batch}
        last = sent == len(parcel.adapters)
        own = {
            path: file for path, file in files.items() if path.rpartition("/")[0] in places or (last and path == _CARD)
        }
        marks = [(adapter, parcel.place(adapter)) for adapter in batch]
        _record(run, _BEGUN, parcel.repository, marks, None)
        commit = send(parcel.repository, own, places | (stale if last else set()), _message(len(batch)))
        _record(run, _DONE, parcel.repository, marks, commit)
        if len(parcel.adapters) > per_commit:
            say(f"{parcel.repository.id}: {sent:,} of {len(parcel.adapters):,} adapters")
    if public:
        parcel.repository.publish()
    return commit


def uploads(run: Path, user_id: str) -> list[Upload]:
    """Where a user's adapter may be on the hub, by the run's audit trail."""
    return uploads_of(run, pseudonym(user_id))


def uploads_of(run: Path, name: str) -> list[Upload]:
    """The same of the user whom this pseudonym calls."""
    found: dict[tuple[str, str, str], Upload] = {}
    for entry in audit.read(run):
        if entry.event in (_BEGUN, _DONE, _DELETED) and entry.facts.get("user") == name:
            where = Upload(**entry.facts)
            if entry.event == _DELETED:
                found.pop(where[1:4], None)
            else:
                known = found.get(where[1:4], where)
                found[where[1:4]] = where._replace(commit=where.commit or known.commit)
    return list(found.values())


def delete_upload(run: Path, found: Upload, api: HfApi | None = None) -> bool:
    """Asks the hub to delete an adapter, history and all, and writes down that it did; False if it was not there.

    A user's own repository goes whole, but not where it has come to hold anything else. Raises InputError there, and
    where the hub does not do it.
    """
    repository = Repository(found.repo, found.revision, api or HfApi(library_name="persona-rlhf"))
    if found.path:
        was_there = repository.delete_folder(found.path)
    else:
        held = repository.read()
        _refuse_strangers(repository, held, shared=False)
        was_there = held.private is not None
        repository.delete()
    audit.append(run, _DELETED, **found._asdict())
    return was_there


def verify_remote(
    repo: str, witnesses: Witnesses | None = None, revision: str = MAIN, api: HfApi | None = None
) -> list[str]:
    """Everything wrong with the adapters of a repository, as downloaded now; an empty list where all is well.

    Raises InputError where there is no such repository, or nothing of ours in it.
    """
    repository = Repository(repo, revision, api or HfApi(library_name="persona-rlhf"), waits=(1, 2))
    with repository.downloaded() as folder:
        if (folder / MANIFEST).exists():
            return verify(folder, witnesses or Witnesses())
        inside = sorted((folder / USERS).iterdir()) if (folder / USERS).is_dir() else []
        if not inside:
            raise _problem(repository, "this repository holds no adapter of persona-rlhf")
        return [
            f"{USERS}/{place.name}: {fault}" for place in inside for fault in verify(place, witnesses or Witnesses())
        ]


def _record(run: Path, event: str, to: Repository, marks: Iterable[tuple[Adapter, str]], commit: str | None) -> None:
    whose = (Upload(pseudonym(adapter.user_id), to.id, to.revision, place, commit) for adapter, place in marks)
    audit.append_all(run, [(event, mark._asdict()) for mark in whose])


def _folders(run: Path, parcel: Parcel, held: Held) -> set[str]:
    """Folders of the repository that are the parcel's own: those it fills, and those that this run filled before."""
    mine = {parcel.place(adapter) for adapter in parcel.adapters}
    if not parcel.shared:
        return mine
    before = {
        entry.facts["path"]
        for entry in audit.read(run)
        if entry.event in (_BEGUN, _DONE) and entry.facts.get("repo") == parcel.repository.id and entry.facts["path"]
    }
    return mine | before & {path.rpartition("/")[0] for path in held.files}


def _message(adapters: int) -> str:
    return "One adapter" if adapters == 1 else f"{adapters:,} adapters"


def _checked(parcel: Parcel, public: bool) -> Held:
    """What the repository holds. Raises InputError where it is not this parcel's to write to."""
    repository = parcel.repository
    held = repository.read()
    if held.private is False and not public:
        raise _problem(repository, "everybody can read this repository; give --public, or name another")
    _refuse_strangers(repository, held, parcel.shared)
    if not parcel.shared and MANIFEST in held.files:
        with repository.downloaded([MANIFEST]) as folder:
            manifest, _ = read_manifest(folder / MANIFEST)
        if manifest is None or not _is_of(parcel.adapters[0].user_id, manifest):
            raise _problem(repository, "it holds the adapter of somebody else; name another repository")
    return held


def _is_of(user_id: str, manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest, wherever it comes from, is of an adapter of this user."""
    try:
        return bool(manifest["user"] == user_mark(user_id, manifest["data"]["fingerprint"]))
    except (KeyError, TypeError):
        return False


def _refuse_strangers(repository: Repository, held: Held, shared: bool) -> None:
    """Raises InputError where a repository holds anything but adapters laid out in this way."""
    others = sorted(held.files.keys() - {HUBS_OWN, _CARD})
    if shared:
        strange = [path for path in others if not _PLACE.fullmatch(path)]
    else:
        strange = [path for path in others if "/" in path] or ([] if MANIFEST in others else others)
    if strange:
        kind = "a repository of many users" if shared else "one user's repository"
        raise _problem(repository, f"it holds `{strange[0]}`, which is no part of {kind}; name another")


def _problem(repository: Repository, sentence: str) -> InputError:
    return InputError([Problem(repository.id, None, None, sentence)])
