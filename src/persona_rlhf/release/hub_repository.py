"""One repository of the Hugging Face hub: its files, single commits, deletion with history, and retries.

huggingface_hub reads the token by itself (HF_TOKEN, or its login); this module never sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from time import sleep
from typing import NamedTuple, TypeVar

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
from huggingface_hub.utils.sha import git_hash

from persona_rlhf.common.errors import InputError, Problem

T = TypeVar("T")

MAIN = "main"
GIT_ATTRIBUTES = ".gitattributes"  # the hub puts it into every repository
_SHA256_DIGITS = 64
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]  # of the HTTP client that this huggingface_hub uses
_RETRIED = (408, 409, 412, 425, 429)  # and all from 500
_LONGEST_WAIT = 300.0  # seconds, even if the hub asks for more
_MISSING = "there is no such repository or revision on the hub, or the token may not see it (404)"


class RemoteFiles(NamedTuple):
    """The files of a revision: sha256 of large files, git's sha1 of small ones, by path.

    `commit` is None if there is no such revision, `private` None if there is no such repository.
    """

    commit: str | None
    files: dict[str, str]
    private: bool | None


class UploadDifference(NamedTuple):
    """Paths of a repository that an upload adds, changes, leaves as they are, and removes; each sorted."""

    added: list[str]
    changed: list[str]
    same: list[str]
    removed: list[str]

    @property
    def sent(self) -> list[str]:
        """Paths whose bytes are sent."""
        return self.added + self.changed

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)

    def __str__(self) -> str:
        return (
            f"{len(self.added)} added, {len(self.changed)} changed, {len(self.same)} the same, "
            f"{len(self.removed)} removed"
        )


def has_digest(file: CommitOperationAdd, digest: str) -> bool:
    """Whether a file has the hub's digest: the sha256 of a large file, git's sha1 of a small one."""
    if len(digest) == _SHA256_DIGITS:
        return file.upload_info.sha256.hex() == digest
    with file.as_file() as stream:
        return git_hash(stream.read()) == digest


def difference(
    remote: Mapping[str, str], local: Mapping[str, CommitOperationAdd], folders: Iterable[str]
) -> UploadDifference:
    """The change after which `folders` hold the `local` files and no others ("" is the top, without its folders)."""
    folders = set(folders)
    same = [path for path, file in local.items() if path in remote and has_digest(file, remote[path])]
    extra = [path for path in remote.keys() - local.keys() - {GIT_ATTRIBUTES} if path.rpartition("/")[0] in folders]
    return UploadDifference(
        added=sorted(local.keys() - remote.keys()),
        changed=sorted(local.keys() & remote.keys() - set(same)),
        same=sorted(same),
        removed=sorted(extra),
    )


@dataclass(frozen=True)
class Repository:
    """A repository by its id, at a branch. `waits` are the seconds before each further attempt."""

    id: str
    revision: str = MAIN
    api: HfApi = field(default_factory=lambda: HfApi(library_name="persona-rlhf"))
    waits: tuple[float, ...] = (1, 2, 4, 8, 16)

    def __post_init__(self) -> None:
        if self.id.count("/") != 1:
            raise self.problem("a repository of the hub reads OWNER/NAME")

    def read(self) -> RemoteFiles:
        """The files that the revision holds now."""
        return self.retried(self.read_once)

    def read_once(self) -> RemoteFiles:
        """`read` without retries: part of a step that is retried as a whole."""
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
        """Creates the repository, private, and the branch, unless they exist."""
        self.retried(lambda: self.api.create_repo(self.id, private=True, exist_ok=True))
        if self.revision != MAIN:
            self.retried(lambda: self.api.create_branch(self.id, branch=self.revision, exist_ok=True))

    def send(self, local: Mapping[str, CommitOperationAdd], folders: Iterable[str], message: str) -> str:
        """Makes `folders` hold the local files and no others, in one commit or none; returns the resulting commit.

        Each attempt starts from the hub's current files: a commit whose response was lost counts as done, and a
        concurrent commit becomes the parent. The files on the hub are then compared with the local ones. Raises
        InputError if they differ, or the hub does not take them.
        """
        folders = set(folders)

        def attempt() -> str:
            remote = self.read_once()
            assert remote.commit is not None, "a repository is created before it is written to"
            change = difference(remote.files, local, folders)
            if not change:
                return remote.commit
            return self._commit([local[path] for path in change.sent], change.removed, remote.commit, message)

        commit = self.retried(attempt)
        if wrong := difference(self.read().files, local, folders):
            raise self.problem(f"the hub does not hold what was sent ({wrong}); run the command again")
        return commit

    def _commit(self, added: Iterable[CommitOperationAdd], removed: Iterable[str], parent: str, message: str) -> str:
        """One commit on top of `parent`, or none at all; returns its id. Each operation object is used once."""
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(file.path_in_repo, file.path_or_fileobj) for file in added),
            *map(CommitOperationDelete, removed),
        ]
        commit = self.api.create_commit(
            self.id, operations, commit_message=message, revision=self.revision, parent_commit=parent
        )
        return str(commit.oid)

    def publish(self) -> None:
        """Makes the repository public."""
        self.retried(lambda: self.api.update_repo_settings(self.id, private=False))

    def delete(self) -> None:
        """Deletes the repository with all its history. A missing repository is no error."""
        self.retried(lambda: self.api.delete_repo(self.id, missing_ok=True))

    def delete_folder(self, path: str) -> bool:
        """Deletes a folder from the branch and its history, and its large files from the hub's store.

        All three parts run on each call, so that a call completes an earlier one that was interrupted. Returns False
        if the revision does not exist.
        """

        def delete_files() -> bool:
            remote = self.read_once()
            inside = [name for name in remote.files if name.startswith(f"{path}/")]
            if inside and remote.commit is not None:
                self._commit([], inside, remote.commit, "Delete an adapter")
            return remote.commit is not None

        def free_large_files() -> None:
            large = [file for file in self.api.list_lfs_files(self.id) if file.filename.startswith(f"{path}/")]
            self.api.permanently_delete_lfs_files(self.id, large)

        if not self.retried(delete_files):
            return False
        self.retried(lambda: self.api.super_squash_history(self.id, branch=self.revision))
        self.retried(free_large_files)
        return True

    @contextmanager
    def downloaded(self, paths: list[str] | None = None) -> Iterator[Path]:
        """A temporary folder with the files of the revision (those that match `paths`), removed at the end."""
        if (commit := self.read().commit) is None:
            raise self.problem(_MISSING)
        with TemporaryDirectory(prefix="persona-rlhf-") as temporary:
            folder = Path(temporary) / "repository"
            folder.mkdir()
            self.retried(
                lambda: self.api.snapshot_download(
                    self.id, revision=commit, local_dir=folder, allow_patterns=paths, ignore_patterns=[GIT_ATTRIBUTES]
                )
            )
            rmtree(folder / ".cache", ignore_errors=True)  # written by huggingface_hub
            yield folder

    def retried(self, call: Callable[[], T]) -> T:
        """The result of a call to the hub, repeated after transient errors. Raises InputError if no attempt succeeds.

        huggingface_hub 2.4 retries uploads of large files, listings and downloads, but not `create_repo`, `model_info`
        and `create_commit`. Without this method 12 of the 48 tests in test_hub.py fail. `http_backoff` takes one HTTP
        request, and a commit may be repeated only after the hub's files are read again.
        """
        waits = iter(self.waits)
        while True:
            try:
                return call()
            except HFValidationError as invalid:
                raise self.problem(str(invalid).splitlines()[0]) from None
            except (_HTTP_ERROR, OSError, RuntimeError) as error:
                cause = _hub_error(error)
                if cause is None:
                    raise
                wait = next(waits, None) if _is_transient(cause) else None
                if wait is None:
                    raise self.problem(self._sentence(cause)) from None
                sleep(min(_LONGEST_WAIT, max(wait, _retry_after(cause))))

    def _sentence(self, error: BaseException) -> str:
        if isinstance(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, so the hub is not contacted; unset it, or name a local folder"
        if not isinstance(error, HfHubHTTPError):
            return f"the hub cannot be reached ({type(error).__name__}); check the network and run the command again"
        if isinstance(error, RepositoryNotFoundError):
            return _MISSING
        status = error.response.status_code
        owner = self.id.partition("/")[0]
        sentences = {
            401: "the hub does not know the token (401); set HF_TOKEN, or log in with `hf auth login`",
            403: f"the token may not do this (403); it needs write access to the repositories of {owner}",
            404: _MISSING,
        }
        try:
            phrase = f"{status} {HTTPStatus(status).phrase}"
        except ValueError:
            phrase = str(status)
        later = "; run the command again later: files on the hub are not sent again" if _is_transient(error) else ""
        return sentences.get(status, f"the hub answered {phrase}{later}")

    def problem(self, sentence: str) -> InputError:
        """An error about this repository."""
        return InputError([Problem(self.id, None, None, sentence)])


def _hub_error(error: Exception) -> BaseException | None:
    """The error of the hub or the network in `error`, if any. Uploads wrap theirs; a full disk is no such error."""
    wraps = isinstance(error, (RuntimeError, LocalEntryNotFoundError)) and error.__cause__ is not None
    cause = error.__cause__ if wraps else error
    of_hub = isinstance(cause, (_HTTP_ERROR, OfflineModeIsEnabled, ConnectionError, RuntimeError))
    return cause if of_hub else None


def _is_transient(error: BaseException) -> bool:
    """Whether a later attempt may succeed."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _RETRIED or error.response.status_code >= 500
    return not isinstance(error, OfflineModeIsEnabled)


def _retry_after(error: BaseException) -> float:
    """Seconds that the hub's `Retry-After` asks to wait; 0 if it is absent or a date."""
    text = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(text) if text.isdecimal() else 0.0
