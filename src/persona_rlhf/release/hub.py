"""Upload to, verify on and delete from the Hugging Face hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from time import sleep
from typing import Any, NamedTuple, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import pseudonym
from persona_rlhf.release import integrity
from persona_rlhf.release.card import shared_card
from persona_rlhf.release.manifest import MANIFEST, read_manifest, user_mark
from persona_rlhf.release.verify import TrustedEvidence, verify

# ----------------------------------------------------------------------------------------------------
# One repository of the hub: what it holds, one commit at a time, and another try where the line or the hub fails.
#
# The token is the hub's own affair: it is read by huggingface_hub (HF_TOKEN, or its login) and never by us.
# ----------------------------------------------------------------------------------------------------

T = TypeVar("T")

MAIN = "main"
HUBS_OWN = ".gitattributes"  # the hub puts it into every repository
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]  # of the HTTP client that this huggingface_hub uses
_AGAIN = (408, 409, 412, 425, 429)  # and all from 500: asked again, from what the hub holds by then
_LONGEST_WAIT = 300.0  # seconds, whatever the hub asks for
_NOT_THERE = "there is no such repository or revision on the hub, or the token may not see it (404)"


class RemoteFiles(NamedTuple):
    """What a revision of a repository holds: sha256 of large files, git's sha1 of small ones, by path.

    `commit` is None where there is no such revision, `private` None where there is no such repository.
    """

    commit: str | None
    files: dict[str, str]
    private: bool | None


@dataclass(frozen=True)
class Repository:
    """A repository by its id, at a branch. `waits` are the seconds before each further try."""

    id: str
    revision: str = MAIN
    api: HfApi = field(default_factory=lambda: HfApi(library_name="persona-rlhf"))
    waits: tuple[float, ...] = (1, 2, 4, 8, 16)

    def __post_init__(self) -> None:
        if self.id.count("/") != 1:
            raise self._problem("a repository of the hub reads OWNER/NAME")

    def read(self) -> RemoteFiles:
        """What is there now."""
        return self.patiently(self.look)

    def look(self) -> RemoteFiles:
        """As `read`, with one try: for a step that is tried again as a whole."""
        try:
            info = self.api.model_info(self.id)
        except RepositoryNotFoundError:
            return RemoteFiles(None, {}, None)
        try:
            commit = self.api.model_info(self.id, revision=self.revision).sha
        except RevisionNotFoundError:
            return RemoteFiles(None, {}, info.private)
        tree = self.api.list_repo_tree(self.id, recursive=True, revision=commit)
        files = {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in tree if isinstance(f, RepoFile)}
        return RemoteFiles(commit, files, info.private)

    def create(self) -> None:
        """Makes the repository, private, and the branch, where they are not there yet."""
        self.patiently(lambda: self.api.create_repo(self.id, private=True, exist_ok=True))
        if self.revision != MAIN:
            self.patiently(lambda: self.api.create_branch(self.id, branch=self.revision, exist_ok=True))

    def commit(self, added: Mapping[str, Path | bytes], removed: Iterable[str], parent: str, message: str) -> str:
        """One commit on top of `parent`, or none at all; the new commit. Not tried again: by then `parent` is old."""
        operations: list[CommitOperationAdd | CommitOperationDelete] = []
        for path, source in added.items():
            operations.append(CommitOperationAdd(path, str(source) if isinstance(source, Path) else source))
        operations += [CommitOperationDelete(path) for path in removed]
        made = self.api.create_commit(
            self.id, operations, commit_message=message, revision=self.revision, parent_commit=parent
        )
        return str(made.oid)

    def publish(self) -> None:
        """Lets everybody read the repository."""
        self.patiently(lambda: self.api.update_repo_settings(self.id, private=False))

    def delete(self) -> None:
        """Deletes the repository with all its history; one that is not there is no fault."""
        self.patiently(lambda: self.api.delete_repo(self.id, missing_ok=True))

    def delete_folder(self, path: str) -> bool:
        """Deletes a folder from the branch, from the branch's history, and its large files from the hub's store.

        Each part is done whether or not it was done before, so that what a kill left is finished by the next call.
        False where there is no such revision (any more).
        """

        def deleted() -> bool:
            held = self.look()
            inside = [name for name in held.files if name.startswith(f"{path}/")]
            if inside and held.commit is not None:
                self.commit({}, inside, held.commit, "Delete an adapter")
            return held.commit is not None

        def freed() -> None:
            large = [file for file in self.api.list_lfs_files(self.id) if file.filename.startswith(f"{path}/")]
            self.api.permanently_delete_lfs_files(self.id, large)

        if not self.patiently(deleted):
            return False
        self.patiently(lambda: self.api.super_squash_history(self.id, branch=self.revision))
        self.patiently(freed)
        return True

    @contextmanager
    def downloaded(self, paths: list[str] | None = None) -> Iterator[Path]:
        """A temporary folder with the files of the revision (those that match `paths`), gone at the end."""
        if (commit := self.read().commit) is None:
            raise self._problem(_NOT_THERE)
        with TemporaryDirectory(prefix="persona-rlhf-") as temporary:
            folder = Path(temporary) / "repository"
            folder.mkdir()
            self.patiently(
                lambda: self.api.snapshot_download(
                    self.id, revision=commit, local_dir=folder, allow_patterns=paths, ignore_patterns=[HUBS_OWN]
                )
            )
            rmtree(folder / ".cache", ignore_errors=True)  # the hub's own notes
            yield folder

    def patiently(self, ask: Callable[[], T]) -> T:
        """Asks the hub, again after a while where it is busy, broken or not reached; it says how long, or `waits` do.

        Raises InputError with one sentence where that does not help.
        """
        waits = iter(self.waits)
        while True:
            try:
                return ask()
            except HFValidationError as invalid:
                raise self._problem(str(invalid).splitlines()[0]) from None
            except (_HTTP_ERROR, OSError, RuntimeError) as raised:
                fault = _of_the_hub(raised)
                if fault is None:
                    raise
                wait = next(waits, None) if _passing(fault) else None
                if wait is None:
                    raise self._problem(self._sentence(fault)) from None
                sleep(min(_LONGEST_WAIT, max(wait, _asked_wait(fault))))

    def _sentence(self, fault: BaseException) -> str:
        if isinstance(fault, OfflineModeIsEnabled):
            return "the hub is not asked while HF_HUB_OFFLINE is set; unset it, or name a folder that is here"
        if not isinstance(fault, HfHubHTTPError):
            return f"the hub cannot be reached ({type(fault).__name__}); check the network and run the command again"
        status = fault.response.status_code
        owner = self.id.partition("/")[0]
        known = {
            401: "the hub does not know the token (401); set HF_TOKEN, or log in with `hf auth login`",
            403: f"the token may not do this (403); it needs write access to what is {owner}'s",
            404: _NOT_THERE,
        }
        if isinstance(fault, RepositoryNotFoundError):
            return _NOT_THERE
        try:
            phrase = f"{status} {HTTPStatus(status).phrase}"
        except ValueError:
            phrase = str(status)
        later = "; run the command again later: what is there already is not sent again" if _passing(fault) else ""
        return known.get(status, f"the hub answered {phrase}{later}")

    def _problem(self, sentence: str) -> InputError:
        return InputError([Problem(self.id, None, None, sentence)])


def _of_the_hub(raised: Exception) -> BaseException | None:
    """The hub's or the line's fault in what was raised, if it is one: uploads wrap theirs; a full disk is ours."""
    wraps = isinstance(raised, (RuntimeError, LocalEntryNotFoundError)) and raised.__cause__ is not None
    fault = raised.__cause__ if wraps else raised
    known = isinstance(fault, (_HTTP_ERROR, OfflineModeIsEnabled, ConnectionError, RuntimeError))
    return fault if known else None


def _passing(fault: BaseException) -> bool:
    """Whether it may be over in a while."""
    if isinstance(fault, HfHubHTTPError):
        return fault.response.status_code in _AGAIN or fault.response.status_code >= 500
    return not isinstance(fault, OfflineModeIsEnabled)


def _asked_wait(fault: BaseException) -> float:
    """Seconds that the hub asks to wait, in `Retry-After`; 0 where it says nothing (or a date)."""
    text = fault.response.headers.get("Retry-After", "") if isinstance(fault, HfHubHTTPError) else ""
    return float(text) if text.isdecimal() else 0.0


# ----------------------------------------------------------------------------------------------------
# What goes to a repository of the hub: the difference between what is here and what is there, in commits.
# ----------------------------------------------------------------------------------------------------


class UploadFile(NamedTuple):
    """A file to be there: its bytes or where they lie, and its hashes as the hub calls large and small files."""

    source: Path | bytes
    sha256: str
    git_sha1: str

    @staticmethod
    def of(source: Path | bytes) -> UploadFile:
        """Hashes the file, a block at a time."""
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        if isinstance(source, bytes):
            sha256.update(source)
            sha1.update(source)
        else:
            with source.open("rb") as stream:
                while block := stream.read(1 << 20):
                    sha256.update(block)
                    sha1.update(block)
        return UploadFile(source, sha256.hexdigest(), sha1.hexdigest())

    def is_there(self, digest: str) -> bool:
        """Whether the hub's digest of a file is that of this one."""
        return digest in (self.sha256, self.git_sha1)


class UploadDifference(NamedTuple):
    """Paths of a repository that an upload adds, changes, leaves as they are, and removes; each sorted."""

    added: list[str]
    changed: list[str]
    same: list[str]
    removed: list[str]

    @property
    def sends(self) -> list[str]:
        """Paths whose bytes go over the line."""
        return self.added + self.changed

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)

    def __str__(self) -> str:
        return (
            f"{len(self.added)} added, {len(self.changed)} changed, {len(self.same)} the same, "
            f"{len(self.removed)} removed"
        )


def difference(there: Mapping[str, str], wanted: Mapping[str, UploadFile], folders: Iterable[str]) -> UploadDifference:
    """What makes the `wanted` files be there and nothing else in `folders` ("" is the top, without its folders)."""
    folders = set(folders)
    same = [path for path, file in wanted.items() if path in there and file.is_there(there[path])]
    extra = [path for path in there.keys() - wanted.keys() - {HUBS_OWN} if path.rpartition("/")[0] in folders]
    return UploadDifference(
        added=sorted(wanted.keys() - there.keys()),
        changed=sorted(wanted.keys() & there.keys() - set(same)),
        same=sorted(same),
        removed=sorted(extra),
    )


def send(repository: Repository, wanted: Mapping[str, UploadFile], folders: Iterable[str], message: str) -> str:
    """Makes the repository hold the files, in one commit or none; the commit that holds them.

    Every try begins with what is there: a commit whose answer was lost is found to be done, and one that somebody else
    made meanwhile is built upon. What arrived is compared with what was sent. Raises InputError.
    """
    folders = set(folders)

    def step() -> str:
        held = repository.look()
        change = difference(held.files, wanted, folders)
        if not change and held.commit is not None:
            return held.commit
        sources = {path: wanted[path].source for path in change.sends}
        assert held.commit is not None, "a repository is created before it is written to"
        return repository.commit(sources, change.removed, held.commit, message)

    commit = repository.patiently(step)
    if wrong := difference(repository.read().files, wanted, folders):
        sentence = f"the hub does not hold what was sent ({wrong}); run the command again"
        raise InputError([Problem(repository.id, None, None, sentence)])
    return commit


# ----------------------------------------------------------------------------------------------------
# Released adapters on the hub: one private repository a user, or one for many; each upload is in the audit trail.
#
# On the hub a user is called by his `pseudonym`, in paths as in names: a slug shows the readable part of a user id,
# and
# whoever may read a repository (or only a list of their names) is not therefore to learn who is in it.
# ----------------------------------------------------------------------------------------------------

USERS = "users"
PER_COMMIT = 1_000
"""Adapters of a commit: the hub takes 25,000 files, and what a broken line costs should be little."""

_CARD = "README.md"
_PLACE = re.compile(rf"{USERS}/[0-9a-f]{{32}}/[^/]+")
_BEGUN, _DONE, _DELETED = "uploading", "uploaded", "upload_deleted"


class LocalAdapter(NamedTuple):
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


class RepositoryUpload(NamedTuple):
    """What goes to one repository: one user's adapter to its top, or those of many to a folder each."""

    repository: Repository
    adapters: Sequence[LocalAdapter]
    shared: bool

    def place(self, adapter: LocalAdapter) -> str:
        """The folder of an adapter in the repository; "" is its top."""
        return f"{USERS}/{pseudonym(adapter.user_id)}" if self.shared else ""

    def files(self) -> dict[str, UploadFile]:
        """Everything that is to be there, hashed."""
        found = {}
        for adapter in self.adapters:
            place = self.place(adapter)
            for file in sorted(adapter.folder.iterdir()):
                found[f"{place}/{file.name}" if place else file.name] = UploadFile.of(file)
        if self.shared:
            found[_CARD] = UploadFile.of(shared_card(self.adapters[0].folder).encode())
        return found


def repository_uploads(
    repo: str,
    adapters: Sequence[LocalAdapter],
    *,
    shared: bool,
    per_user: bool,
    revision: str = MAIN,
    api: HfApi | None = None,
) -> list[RepositoryUpload]:
    """How adapters are put into repositories: the one `repo`, shared or not, or one each, called `repo`-PSEUDONYM."""
    api = api or HfApi(library_name="persona-rlhf")
    if per_user:
        return [
            RepositoryUpload(Repository(f"{repo}-{pseudonym(a.user_id)}", revision, api), [a], False) for a in adapters
        ]
    assert shared or len(adapters) == 1, "a repository for many is a shared one"
    return [RepositoryUpload(Repository(repo, revision, api), adapters, shared)]


def preview(run: Path, parcel: RepositoryUpload, public: bool) -> UploadDifference:
    """What an upload would change; nothing is sent. Raises InputError as `upload` does."""
    held = _checked(parcel, public)
    return difference(held.files, parcel.files(), _folders(run, parcel, held))


def upload(
    run: Path, parcel: RepositoryUpload, public: bool, say: Callable[[str], None], per_commit: int = PER_COMMIT
) -> str:
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
    for entry in integrity.read(run):
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
    integrity.append(run, _DELETED, **found._asdict())
    return was_there


def verify_remote(
    repo: str, witnesses: TrustedEvidence | None = None, revision: str = MAIN, api: HfApi | None = None
) -> list[str]:
    """Everything wrong with the adapters of a repository, as downloaded now; an empty list where all is well.

    Raises InputError where there is no such repository, or nothing of ours in it.
    """
    repository = Repository(repo, revision, api or HfApi(library_name="persona-rlhf"), waits=(1, 2))
    with repository.downloaded() as folder:
        if (folder / MANIFEST).exists():
            return verify(folder, witnesses or TrustedEvidence())
        inside = sorted((folder / USERS).iterdir()) if (folder / USERS).is_dir() else []
        if not inside:
            raise _problem(repository, "this repository holds no adapter of persona-rlhf")
        return [
            f"{USERS}/{place.name}: {fault}"
            for place in inside
            for fault in verify(place, witnesses or TrustedEvidence())
        ]


def _record(
    run: Path, event: str, to: Repository, marks: Iterable[tuple[LocalAdapter, str]], commit: str | None
) -> None:
    whose = (Upload(pseudonym(adapter.user_id), to.id, to.revision, place, commit) for adapter, place in marks)
    integrity.append_all(run, [(event, mark._asdict()) for mark in whose])


def _folders(run: Path, parcel: RepositoryUpload, held: RemoteFiles) -> set[str]:
    """Folders of the repository that are the parcel's own: those it fills, and those that this run filled before."""
    mine = {parcel.place(adapter) for adapter in parcel.adapters}
    if not parcel.shared:
        return mine
    before = {
        entry.facts["path"]
        for entry in integrity.read(run)
        if entry.event in (_BEGUN, _DONE) and entry.facts.get("repo") == parcel.repository.id and entry.facts["path"]
    }
    return mine | before & {path.rpartition("/")[0] for path in held.files}


def _message(adapters: int) -> str:
    return "One adapter" if adapters == 1 else f"{adapters:,} adapters"


def _checked(parcel: RepositoryUpload, public: bool) -> RemoteFiles:
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


def _refuse_strangers(repository: Repository, held: RemoteFiles, shared: bool) -> None:
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
