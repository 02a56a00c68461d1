"""Who asked to be forgotten: RUN/forgotten, a proof of deletion for each, which names him by a hash alone.

A run leaves out whoever has a proof there, whatever its sources still hold. While a deletion is under way there is
HASH.pending in its place, from which any later start finishes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import persona_rlhf
from persona_rlhf.preferences.identity import pseudonym
from persona_rlhf.release.folder import write_file
from persona_rlhf.release.manifest import FORMAT, read_manifest, rendered, self_hash
from persona_rlhf.release.results import RunResults

LIST = "forgotten"
_PENDING = ".pending"


def forgotten(run: Path) -> frozenset[str]:
    """The pseudonyms of those who stay out of a run, their deletion finished or not."""
    files = (run / LIST).iterdir() if (run / LIST).is_dir() else ()
    return frozenset(file.stem for file in files if file.suffix in (".json", _PENDING))


def proof_file(run: Path, name: str) -> Path:
    """RUN/forgotten/HASH.json."""
    return run / LIST / f"{name}.json"


def pending_file(run: Path, name: str) -> Path:
    """RUN/forgotten/HASH.pending."""
    return run / LIST / f"{name}{_PENDING}"


def pending(run: Path) -> list[str]:
    """The pseudonyms of those whose deletion was begun and not finished."""
    return sorted(file.stem for file in (run / LIST).glob(f"*{_PENDING}"))


def write_paper(file: Path, content: Mapping[str, Any]) -> str:
    """Writes a proof, or what is to become one, with its own hash in it, which is returned."""
    toolkit = {"name": "persona-rlhf", "version": persona_rlhf.__version__}
    content = {"format": FORMAT, "toolkit": toolkit, **content}
    file.parent.mkdir(exist_ok=True)
    digest = self_hash(content)
    write_file(file, rendered(content | {"manifest_hash": digest}))
    return digest


def tail(name: str) -> str:
    """What a user's slug ends with, from his pseudonym: both are hashes of his id."""
    return name[:12]


def adapter_folders(run: Path) -> list[Path]:
    """Everything in RUN/adapters, and in its subfolders by hash, which have names of two characters."""
    top = sorted((run / "adapters").iterdir()) if (run / "adapters").is_dir() else []
    nested = [path for path in top if path.is_dir() and len(path.name) == 2]
    return [path for path in top if path not in nested] + [
        path for folder in nested for path in sorted(folder.iterdir())
    ]


def others_adapters(run: Path, name: str) -> dict[str, str]:
    """What the files of every other user's adapter hash to, by the tail of his slug.

    It is what `LC_ALL=C sha256sum * | sha256sum` prints in the adapter's folder, so anybody can check it.
    """
    folders = (folder for folder in adapter_folders(run) if not folder.name.startswith("."))
    return {folder.name[-12:]: _digest(folder) for folder in folders if not folder.name.endswith(tail(name))}


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir(), key=lambda file: file.name.encode()):
        digest.update(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n".encode())
    return digest.hexdigest()


def forgotten_faults(run: Path) -> list[str]:
    """Where a deletion is unfinished, its proof was changed or shows a change of others, or the user is back."""
    faults = [f"{LIST}/{name}{_PENDING}: this deletion is not finished" for name in pending(run)]
    for file in sorted((run / LIST).glob("*.json")):
        proof, wrong = read_manifest(file)
        faults += [f"{LIST}/{fault}" for fault in wrong]
        if proof is None:
            continue
        if proof.get("user") != file.stem or not isinstance(proof.get("others"), dict):
            faults.append(f"{LIST}/{file.name} is no proof of the deletion it is named after")
        elif changed := [name for name, own in proof["others"].items() if own["before"] != own["after"]]:
            faults.append(f"{LIST}/{file.name}: the deletion changed the adapters of {len(changed)} others")
    gone = forgotten(run)
    if gone and (run / "results.jsonl").exists():
        back = sum(pseudonym(result.user_id) in gone for result in RunResults(run))
        faults += [f"results.jsonl has {back} users who were to be forgotten"] if back else []
    return faults
