"""Upload of released adapters to the Hugging Face hub, and their verification and deletion there.

One user's adapter goes to the top of a private repository; adapters of many users go to a folder each. Each upload is
recorded in the run's audit.jsonl. Repositories and folders are named by `pseudonym`: a slug shows part of the user id.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi

from persona_rlhf.common.files import pseudonym
from persona_rlhf.common.run_lock import locks_run
from persona_rlhf.release import integrity
from persona_rlhf.release.card import shared_card
from persona_rlhf.release.hub_repository import (
    GIT_ATTRIBUTES,
    MAIN,
    RemoteFiles,
    Repository,
    UploadDifference,
    difference,
)
from persona_rlhf.release.manifest import MANIFEST, read_manifest, user_mark
from persona_rlhf.release.verify import TrustedEvidence, verify

USERS = "users"
PER_COMMIT = 1_000
"""Adapters of a commit: the hub takes 25,000 files, and an interrupted commit should cost little."""

_CARD = "README.md"
_USER_FILE = re.compile(rf"{USERS}/[0-9a-f]{{32}}/[^/]+")
_BEGUN, _DONE, _DELETED = "uploading", "uploaded", "upload_deleted"


class LocalAdapter(NamedTuple):
    """A released adapter to upload: its user and its local folder."""

    user_id: str
    folder: Path


class Upload(NamedTuple):
    """The place of an adapter on the hub, as audit.jsonl records it. `path` is "" in a repository of one user.

    `commit` is None if the upload began and no end was recorded: some files may be on the hub.
    """

    user: str  # pseudonym
    repo: str
    revision: str
    path: str
    commit: str | None


class RepositoryUpload(NamedTuple):
    """The adapters that go to one repository: one user's to its top, or those of many users to a folder each."""

    repository: Repository
    adapters: Sequence[LocalAdapter]
    shared: bool

    def place(self, adapter: LocalAdapter) -> str:
        """The folder of an adapter in the repository; "" is its top."""
        return f"{USERS}/{pseudonym(adapter.user_id)}" if self.shared else ""

    def files(self) -> dict[str, CommitOperationAdd]:
        """All files to upload, hashed, by their paths in the repository."""
        files = {}
        for adapter in self.adapters:
            place = self.place(adapter)
            for file in sorted(adapter.folder.iterdir()):
                path = f"{place}/{file.name}" if place else file.name
                files[path] = CommitOperationAdd(path, file)
        if self.shared:
            files[_CARD] = CommitOperationAdd(_CARD, shared_card(self.adapters[0].folder).encode())
        return files


def repository_uploads(
    repo: str,
    adapters: Sequence[LocalAdapter],
    *,
    shared: bool,
    per_user: bool,
    revision: str = MAIN,
    api: HfApi | None = None,
) -> list[RepositoryUpload]:
    """The uploads of adapters: to one repository `repo`, shared or not, or to one per user, `repo`-PSEUDONYM."""
    api = api or HfApi(library_name="persona-rlhf")
    if per_user:
        return [
            RepositoryUpload(Repository(f"{repo}-{pseudonym(a.user_id)}", revision, api), [a], False) for a in adapters
        ]
    assert shared or len(adapters) == 1, "a repository for many is a shared one"
    return [RepositoryUpload(Repository(repo, revision, api), adapters, shared)]


def preview(run: Path, plan: RepositoryUpload, public: bool) -> UploadDifference:
    """The change that an upload would make; nothing is sent. Raises InputError as `upload` does."""
    remote = _checked(plan, public)
    return difference(remote.files, plan.files(), _folders(run, plan, remote))


@locks_run("export", shared=True)
def upload(
    run: Path, plan: RepositoryUpload, public: bool, log: Callable[[str], None], per_commit: int = PER_COMMIT
) -> str:
    """Uploads adapters to a repository and records it in the run's audit.jsonl; returns the last commit.

    A new repository is private; with `public` it is published after all files are there. A commit holds up to
    `per_commit` adapters, each of them whole. A second call completes an interrupted upload. Raises InputError if the
    repository holds other files, is public although `public` is not set, or the hub rejects the upload.
    """
    remote, files = _checked(plan, public), plan.files()
    plan.repository.create()
    stale = _folders(run, plan, remote) - {plan.place(adapter) for adapter in plan.adapters} - {""}
    remaining, sent, commit = iter(plan.adapters), 0, ""
    while batch := list(islice(remaining, per_commit)):
        sent += len(batch)
        places = {plan.place(adapter) for adapter in batch}
        last = sent == len(plan.adapters)
        of_batch = {
            path: file for path, file in files.items() if path.rpartition("/")[0] in places or (last and path == _CARD)
        }
        _record(run, _BEGUN, plan, batch, None)
        message = "One adapter" if len(batch) == 1 else f"{len(batch):,} adapters"
        commit = plan.repository.send(of_batch, places | (stale if last else set()), message)
        _record(run, _DONE, plan, batch, commit)
        if len(plan.adapters) > per_commit:
            log(f"{plan.repository.id}: {sent:,} of {len(plan.adapters):,} adapters")
    if public:
        plan.repository.publish()
    return commit


def uploads_of(run: Path, user: str) -> list[Upload]:
    """The places on the hub where the adapter of a user (by pseudonym) may be, by the run's audit.jsonl."""
    uploads: dict[tuple[str, str, str], Upload] = {}
    for entry in integrity.read(run):
        if entry.event in (_BEGUN, _DONE, _DELETED) and entry.facts.get("user") == user:
            recorded = Upload(**entry.facts)
            key = recorded[1:4]
            if entry.event == _DELETED:
                uploads.pop(key, None)
            else:
                earlier = uploads.get(key, recorded)
                uploads[key] = recorded._replace(commit=recorded.commit or earlier.commit)
    return list(uploads.values())


def delete_upload(run: Path, uploaded: Upload, api: HfApi | None = None) -> bool:
    """Deletes an adapter on the hub, with its history, and records it; returns False if it was not there.

    A user's own repository is deleted whole. Raises InputError if it holds other files, or the hub refuses.
    """
    repository = Repository(uploaded.repo, uploaded.revision, api or HfApi(library_name="persona-rlhf"))
    if uploaded.path:
        was_there = repository.delete_folder(uploaded.path)
    else:
        remote = repository.read()
        _reject_other_files(repository, remote, shared=False)
        was_there = remote.private is not None
        repository.delete()
    integrity.append(run, _DELETED, **uploaded._asdict())
    return was_there


def verify_remote(
    repo: str, witnesses: TrustedEvidence | None = None, revision: str = MAIN, api: HfApi | None = None
) -> list[str]:
    """Every fault of the adapters of a repository, as downloaded now; an empty list if there is none.

    Raises InputError if there is no such repository, or it holds no adapter of this toolkit.
    """
    repository = Repository(repo, revision, api or HfApi(library_name="persona-rlhf"), waits=(1, 2))
    evidence = witnesses or TrustedEvidence()
    with repository.downloaded() as folder:
        if (folder / MANIFEST).exists():
            return verify(folder, evidence)
        places = sorted((folder / USERS).iterdir()) if (folder / USERS).is_dir() else []
        if not places:
            raise repository.problem("this repository holds no adapter of persona-rlhf")
        return [f"{USERS}/{place.name}: {fault}" for place in places for fault in verify(place, evidence)]


def _record(
    run: Path, event: str, plan: RepositoryUpload, adapters: Iterable[LocalAdapter], commit: str | None
) -> None:
    repository = plan.repository
    uploads = (
        Upload(pseudonym(adapter.user_id), repository.id, repository.revision, plan.place(adapter), commit)
        for adapter in adapters
    )
    integrity.append_all(run, [(event, uploaded._asdict()) for uploaded in uploads])


def _folders(run: Path, plan: RepositoryUpload, remote: RemoteFiles) -> set[str]:
    """Folders of the repository that this upload fills, and those that earlier uploads of the run filled."""
    filled = {plan.place(adapter) for adapter in plan.adapters}
    if not plan.shared:
        return filled
    before = {
        entry.facts["path"]
        for entry in integrity.read(run)
        if entry.event in (_BEGUN, _DONE) and entry.facts.get("repo") == plan.repository.id and entry.facts["path"]
    }
    return filled | before & {path.rpartition("/")[0] for path in remote.files}


def _checked(plan: RepositoryUpload, public: bool) -> RemoteFiles:
    """The files of the repository. Raises InputError if this upload may not write to it."""
    repository = plan.repository
    remote = repository.read()
    if remote.private is False and not public:
        raise repository.problem("this repository is public: everybody can read it; give --public, or name another")
    _reject_other_files(repository, remote, plan.shared)
    if not plan.shared and MANIFEST in remote.files:
        with repository.downloaded([MANIFEST]) as folder:
            manifest, _ = read_manifest(folder / MANIFEST)
        if manifest is None or not _belongs_to(plan.adapters[0].user_id, manifest):
            raise repository.problem("it holds the adapter of somebody else; name another repository")
    return remote


def _belongs_to(user_id: str, manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest of any origin is of an adapter of this user."""
    try:
        return bool(manifest["user"] == user_mark(user_id, manifest["data"]["fingerprint"]))
    except (KeyError, TypeError):
        return False


def _reject_other_files(repository: Repository, remote: RemoteFiles, shared: bool) -> None:
    """Raises InputError if a repository holds anything but adapters in this layout."""
    paths = sorted(remote.files.keys() - {GIT_ATTRIBUTES, _CARD})
    if shared:
        strange = [path for path in paths if not _USER_FILE.fullmatch(path)]
    else:
        strange = [path for path in paths if "/" in path] or ([] if MANIFEST in paths else paths)
    if strange:
        layout = "a repository of many users" if shared else "one user's repository"
        raise repository.problem(f"it holds `{strange[0]}`, which is no part of {layout}; name another")
