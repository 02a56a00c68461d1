"""One repository of the hub: what it holds, one commit at a time, and another try where the line or the hub fails.

The token is the hub's own affair: it is read by huggingface_hub (HF_TOKEN, or its login) and never by us.
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

from persona_rlhf.inputs.problems import InputError, Problem

T = TypeVar("T")

MAIN = "main"
HUBS_OWN = ".gitattributes"  # the hub puts it into every repository
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]  # of the HTTP client that this huggingface_hub uses
_AGAIN = (408, 409, 412, 425, 429)  # and all from 500: asked again, from what the hub holds by then
_LONGEST_WAIT = 300.0  # seconds, whatever the hub asks for
_NOT_THERE = "there is no such repository or revision on the hub, or the token may not see it (404)"


class Held(NamedTuple):
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

    def read(self) -> Held:
        """What is there now."""
        return self.patiently(self.look)

    def look(self) -> Held:
        """As `read`, with one try: for a step that is tried again as a whole."""
        try:
            info = self.api.model_info(self.id)
        except RepositoryNotFoundError:
            return Held(None, {}, None)
        try:
            commit = self.api.model_info(self.id, revision=self.revision).sha
        except RevisionNotFoundError:
            return Held(None, {}, info.private)
        tree = self.api.list_repo_tree(self.id, recursive=True, revision=commit)
        files = {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in tree if isinstance(f, RepoFile)}
        return Held(commit, files, info.private)

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
