"""Deletion proofs; rows erased from data files."""

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
from persona_rlhf.common.files import atomic_write, pseudonym
from persona_rlhf.common.version import __version__
from persona_rlhf.data.readers import files_of
from persona_rlhf.release.manifest import FORMAT, read_manifest, rendered, self_hash
from persona_rlhf.release.results import RunResults

# ----------------------------------------------------------------------------------------------------
# One user's rows taken out of preference files, whatever the kind; everybody else's stay, in their order.
# ----------------------------------------------------------------------------------------------------

His = Callable[[object], bool]
"""Whether a `user_id` is that of the user."""


def files_with_rows(path: Path) -> list[Path]:
    """The files that rows can be taken out of, in a path of preferences; none for a hub data set or a saved one."""
    if path.is_dir():
        try:
            return [file for file in files_of(path) if erasable(file)]
        except InputError:
            return []
    return [path] if path.is_file() and erasable(path) else []


def erasable(file: Path) -> bool:
    """Whether `erase` knows this kind of file."""
    name = file.name.casefold().removesuffix(".gz")
    return name.endswith((".jsonl", ".ndjson", ".json", ".csv", ".parquet"))


def rows_of(file: Path, his: His, torn: bool = False) -> int:
    """How many rows of a file are the user's; `torn`: so are lines that cannot be read, as a kill leaves them."""
    name = file.name.casefold()
    if name.endswith(".parquet"):
        return sum(map(his, _column(file)))
    if name.endswith(".csv"):
        return sum(his(row.get("user_id")) for row in _table(file)[1])
    return sum(_is_his(line, his, torn) for line in _lines(file))


def erase(file: Path, his: His, torn: bool = False) -> None:
    """Writes the file without the user's rows, whole or not at all; the others' lines stay as they are, byte by byte.

    A table (CSV, Parquet) is written anew, with the same columns and the others' values.
    """
    name = file.name.casefold()
    if name.endswith(".parquet"):
        atomic_write(file, [_parquet_without(file, his)])
    elif name.endswith(".csv"):
        atomic_write(file, [_csv_without(file, his)])
    else:
        kept = (line for line in _lines(file) if not _is_his(line, his, torn))
        atomic_write(file, [gzip.compress(b"".join(kept), mtime=0)] if name.endswith(".gz") else kept)


def _lines(file: Path) -> Iterator[bytes]:
    with gzip.open(file) if file.name.casefold().endswith(".gz") else file.open("rb") as stream:
        yield from stream


def _is_his(line: bytes, his: His, torn: bool) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return torn and bool(line.strip())
    return isinstance(row, dict) and his(row.get("user_id"))


def _table(file: Path) -> tuple[list[str], list[dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        table = csv.DictReader(stream)
        return list(table.fieldnames or ()), list(table)


def _csv_without(file: Path, his: His) -> bytes:
    names, rows = _table(file)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for row in rows if not his(row.get("user_id")))
    return text.getvalue().encode()


def _column(file: Path) -> list[object]:
    from pyarrow import ArrowException, parquet

    try:
        if "user_id" not in parquet.read_schema(file).names:
            return []
        found: list[object] = parquet.read_table(file, columns=["user_id"])["user_id"].to_pylist()
    except ArrowException as fault:
        raise InputError([Problem(str(file), None, None, f"the file is not Parquet ({fault})")]) from fault
    return found


def _parquet_without(file: Path, his: His) -> bytes:
    from pyarrow import BufferOutputStream, parquet  # it comes with `datasets`

    kept = [not his(user) for user in _column(file)]
    out = BufferOutputStream()
    parquet.write_table(parquet.read_table(file).filter(kept), out)
    written: bytes = out.getvalue().to_pybytes()
    return written


# ----------------------------------------------------------------------------------------------------
# Who asked to be forgotten: RUN/forgotten, a proof of deletion for each, which names him by a hash alone.
#
# A run leaves out whoever has a proof there, whatever its sources still hold. While a deletion is under way there is
# HASH.pending in its place, from which any later start finishes it.
# ----------------------------------------------------------------------------------------------------

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
    toolkit = {"name": "persona-rlhf", "version": __version__}
    content = {"format": FORMAT, "toolkit": toolkit, **content}
    file.parent.mkdir(exist_ok=True)
    digest = self_hash(content)
    atomic_write(file, rendered(content | {"manifest_hash": digest}))
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
