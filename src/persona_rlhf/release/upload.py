"""What goes to a repository of the hub: the difference between what is here and what is there, in commits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.release.repository import HUBS_OWN, Repository


class File(NamedTuple):
    """A file to be there: its bytes or where they lie, and its hashes as the hub calls large and small files."""

    source: Path | bytes
    sha256: str
    git_sha1: str

    @staticmethod
    def of(source: Path | bytes) -> File:
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
        return File(source, sha256.hexdigest(), sha1.hexdigest())

    def is_there(self, digest: str) -> bool:
        """Whether the hub's digest of a file is that of this one."""
        return digest in (self.sha256, self.git_sha1)


class Difference(NamedTuple):
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


def difference(there: Mapping[str, str], wanted: Mapping[str, File], folders: Iterable[str]) -> Difference:
    """What makes the `wanted` files be there and nothing else in `folders` ("" is the top, without its folders)."""
    folders = set(folders)
    same = [path for path, file in wanted.items() if path in there and file.is_there(there[path])]
    extra = [path for path in there.keys() - wanted.keys() - {HUBS_OWN} if path.rpartition("/")[0] in folders]
    return Difference(
        added=sorted(wanted.keys() - there.keys()),
        changed=sorted(wanted.keys() & there.keys() - set(same)),
        same=sorted(same),
        removed=sorted(extra),
    )


def send(repository: Repository, wanted: Mapping[str, File], folders: Iterable[str], message: str) -> str:
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
