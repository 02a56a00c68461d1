"""Proofs of deletion (RUN/forgotten), and the erasure of one user's rows from data files.

RUN/forgotten holds one proof per deleted user, named by a hash of the id. A run leaves out every user with a proof
there, even if its sources still hold the user's rows. During a deletion HASH.pending is in its place, from which the
next start completes the deletion.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write, pseudonym, sha256_of
from persona_rlhf.common.version import __version__
from persona_rlhf.data.readers import files_of
from persona_rlhf.release.manifest import FORMAT, read_manifest, rendered, self_hash
from persona_rlhf.release.results import RunResults

IsUser = Callable[[object], bool]
"""Whether a `user_id` is that of the user to delete."""


def files_with_rows(path: Path) -> list[Path]:
    """The files of a path of preferences from which rows can be erased; none for a data set of the hub."""
    if path.is_dir():
        try:
            return [file for file in files_of(path) if erasable(file)]
        except InputError:
            return []
    return [path] if path.is_file() and erasable(path) else []


def erasable(file: Path) -> bool:
    """Whether `erase` can rewrite this kind of file."""
    name = file.name.casefold().removesuffix(".gz")
    return name.endswith((".jsonl", ".ndjson", ".json", ".csv", ".parquet"))


def rows_of(file: Path, is_user: IsUser, torn: bool = False) -> int:
    """The number of rows of a file that are the user's; with `torn`, unreadable lines of a killed process count too."""
    name = file.name.casefold()
    if name.endswith(".parquet"):
        return sum(map(is_user, _column(file)))
    if name.endswith(".csv"):
        return sum(is_user(row.get("user_id")) for row in _table(file)[1])
    return sum(_is_of_user(line, is_user, torn) for line in _lines(file))


def erase(file: Path, is_user: IsUser, torn: bool = False) -> None:
    """Rewrites a file without the user's rows. The other lines stay the same, byte by byte.

    A table (CSV, Parquet) is written again with the same columns and the other users' values.
    """
    name = file.name.casefold()
    if name.endswith(".parquet"):
        atomic_write(file, _parquet_without(file, is_user))
    elif name.endswith(".csv"):
        atomic_write(file, _csv_without(file, is_user))
    else:
        kept = (line for line in _lines(file) if not _is_of_user(line, is_user, torn))
        atomic_write(file, [gzip.compress(b"".join(kept), mtime=0)] if name.endswith(".gz") else kept)


def _lines(file: Path) -> Iterator[bytes]:
    with gzip.open(file) if file.name.casefold().endswith(".gz") else file.open("rb") as stream:
        yield from stream


def _is_of_user(line: bytes, is_user: IsUser, torn: bool) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return torn and bool(line.strip())
    return isinstance(row, dict) and is_user(row.get("user_id"))


def _table(file: Path) -> tuple[list[str], list[dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        table = csv.DictReader(stream)
        return list(table.fieldnames or ()), list(table)


def _csv_without(file: Path, is_user: IsUser) -> bytes:
    names, rows = _table(file)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for row in rows if not is_user(row.get("user_id")))
    return text.getvalue().encode()


def _column(file: Path) -> list[object]:
    from pyarrow import ArrowException, parquet

    try:
        if "user_id" not in parquet.read_schema(file).names:
            return []
        users: list[object] = parquet.read_table(file, columns=["user_id"])["user_id"].to_pylist()
    except ArrowException as fault:
        raise InputError([Problem(str(file), None, None, f"the file is not Parquet ({fault})")]) from fault
    return users


def _parquet_without(file: Path, is_user: IsUser) -> bytes:
    from pyarrow import BufferOutputStream, parquet  # it comes with `datasets`

    kept = [not is_user(user) for user in _column(file)]
    out = BufferOutputStream()
    parquet.write_table(parquet.read_table(file).filter(kept), out)
    written: bytes = out.getvalue().to_pybytes()
    return written


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
