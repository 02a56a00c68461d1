"""Proofs of deletion (RUN/forgotten), and the adapter folders that a deletion removes or leaves unchanged.

RUN/forgotten holds one proof per deleted user, named by a hash of the id. A run leaves out every user with a proof
there, even if its sources still hold the user's rows. During a deletion HASH.pending is in its place, from which the
next start completes the deletion.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from persona_rlhf.common.files import atomic_write, pseudonym, sha256_of
from persona_rlhf.common.version import __version__
from persona_rlhf.data.erasure import DataSubject, Trace
from persona_rlhf.release.manifest import FORMAT, read_manifest, rendered, self_hash
from persona_rlhf.release.results import RunResults

FORGOTTEN = "forgotten"
_PENDING = ".pending"


def forgotten(run: Path) -> frozenset[str]:
    """The pseudonyms of the users left out of a run, their deletion finished or not."""
    files = (run / FORGOTTEN).iterdir() if (run / FORGOTTEN).is_dir() else ()
    return frozenset(file.stem for file in files if file.suffix in (".json", _PENDING))


def proof_file(run: Path, name: str) -> Path:
    """RUN/forgotten/HASH.json."""
    return run / FORGOTTEN / f"{name}.json"


def pending_file(run: Path, name: str) -> Path:
    """RUN/forgotten/HASH.pending."""
    return run / FORGOTTEN / f"{name}{_PENDING}"


def pending(run: Path) -> list[str]:
    """The pseudonyms of users with an unfinished deletion."""
    return sorted(file.stem for file in (run / FORGOTTEN).glob(f"*{_PENDING}"))


def write_proof(file: Path, content: Mapping[str, Any]) -> str:
    """Writes a proof, or a pending one, with its own hash in it; returns that hash."""
    toolkit = {"name": "persona-rlhf", "version": __version__}
    content = {"format": FORMAT, "toolkit": toolkit, **content}
    file.parent.mkdir(exist_ok=True)
    digest = self_hash(content)
    atomic_write(file, rendered(content | {"manifest_hash": digest}))
    return digest


def slug_hash(name: str) -> str:
    """The last part of a user's slug, from the pseudonym: both are hashes of the id."""
    return name[:12]


def adapter_folders(run: Path) -> list[Path]:
    """All entries of RUN/adapters, and of its subfolders with names of two characters."""
    top = sorted((run / "adapters").iterdir()) if (run / "adapters").is_dir() else []
    nested = [path for path in top if path.is_dir() and len(path.name) == 2]
    return [path for path in top if path not in nested] + [
        path for folder in nested for path in sorted(folder.iterdir())
    ]


def adapter_traces(run: Path, user: DataSubject) -> Iterator[Trace]:
    """The adapter of a user, and remains of an interrupted write of it."""
    for folder in adapter_folders(run):
        if user.owns_slug(folder.name.lstrip(".").partition(".")[0]):
            yield Trace(folder, "adapter", 1, partial(shutil.rmtree, folder))


def others_adapters(run: Path, name: str) -> dict[str, str]:
    """A hash over the files of every other user's adapter, by the last part of the slug.

    `LC_ALL=C sha256sum * | sha256sum` in the adapter's folder prints the same hash.
    """
    folders = (folder for folder in adapter_folders(run) if not folder.name.startswith("."))
    return {folder.name[-12:]: _digest(folder) for folder in folders if not folder.name.endswith(slug_hash(name))}


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir(), key=lambda file: file.name.encode()):
        digest.update(f"{sha256_of(file)}  {file.name}\n".encode())
    return digest.hexdigest()


def forgotten_faults(run: Path) -> list[str]:
    """Unfinished deletions, changed proofs, proofs with changes of other adapters, and deleted users in the results."""
    faults = [f"{FORGOTTEN}/{name}{_PENDING}: this deletion is not finished" for name in pending(run)]
    for file in sorted((run / FORGOTTEN).glob("*.json")):
        proof, wrong = read_manifest(file)
        faults += [f"{FORGOTTEN}/{fault}" for fault in wrong]
        if proof is None:
            continue
        if proof.get("user") != file.stem or not isinstance(proof.get("others"), dict):
            faults.append(f"{FORGOTTEN}/{file.name} is not the proof of the user it is named after")
        elif changed := [name for name, hashes in proof["others"].items() if hashes["before"] != hashes["after"]]:
            faults.append(f"{FORGOTTEN}/{file.name}: the deletion changed the adapters of {len(changed)} others")
    gone = forgotten(run)
    if gone and (run / "results.jsonl").exists():
        back = sum(pseudonym(result.user_id) in gone for result in RunResults(run))
        faults += [f"results.jsonl has {back} users who were deleted"] if back else []
    return faults
