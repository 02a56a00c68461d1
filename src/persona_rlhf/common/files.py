"""Atomic writes (the only implementation), sha256 of files, lookup of bundled files, user slugs and pseudonyms."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import sqlite3
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from persona_rlhf.common.errors import InputError, Problem, did_you_mean

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped_root() -> Path:
    """The folder that holds `data/` and `configs/`: inside an installed package, or the checkout of an editable one."""
    installed = _PACKAGE / "_bundled"
    return installed if installed.is_dir() else _PACKAGE.parent.parent


def find(path: Path | str) -> Path:
    """The file or folder of that name: in the working directory, else among the files shipped with the toolkit.

    Raises InputError if it is in neither place.
    """
    try:
        local = Path(path).expanduser()
        if local.exists():
            return local
        if not local.is_absolute() and ".." not in local.parts and (shipped_root() / local).exists():
            return shipped_root() / local
    except (OSError, ValueError, RuntimeError) as fault:  # a name too long, with a zero byte, of an unknown user's home
        why = fault.strerror if isinstance(fault, OSError) else fault
        raise InputError([Problem(_shown(path), None, None, f"this path cannot be opened ({why})")]) from None
    raise InputError([Problem(str(path), None, None, f"no such file or folder{_similar_name(local)}")])


def is_hub_id(model: str) -> bool:
    """Whether a model's name is a hub id `owner/name`: two parts, and no local folder has the owner's name."""
    owner, slash, name = model.partition("/")
    if not slash or not name or "/" in name or owner in ("", ".", "..", "~"):
        return False
    return not Path(owner).is_dir() and not (shipped_root() / owner).is_dir()


DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".gz")
"""Endings of files of rows, by which a mistyped path is told from the id of a data set on the hub."""


def is_hub_data_set(path: str) -> bool:
    """Whether a path of rows names a data set on the hub: a hub id that is no local file and does not end like one."""
    return is_hub_id(path) and not path.casefold().endswith(DATA_SUFFIXES) and not Path(path).exists()


LFS_REMEDY = "this is a pointer of git-lfs, not the file itself; run `git lfs pull` where it was cloned"
_LFS = b"version https://git-lfs.github.com/"


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is the short text that stands for a large one in a clone without git-lfs."""
    with file.open("rb") as stream:
        return stream.read(len(_LFS)) == _LFS


GGUF_REMEDY = "a .gguf file is read by the package gguf: pip install 'persona-rlhf[gguf]'"


def is_gguf(path: Path | str) -> bool:
    """Whether a path ends like a file of llama.cpp."""
    return Path(path).suffix.lower() == ".gguf"


def _shown(path: Path | str) -> str:
    text = str(path).encode("unicode_escape").decode()
    return text if len(text) <= 80 else f"{text[:77]}..."


def _similar_name(missing: Path) -> str:
    """A hint at a file of almost that name in the same folder, here or among the shipped files."""
    for folder in (missing.parent, shipped_root() / missing.parent):
        if folder.is_dir():
            hint = did_you_mean(missing.name, (entry.name for entry in folder.iterdir()))
            if hint:
                return hint
    return ""


def _existing(path: Path) -> Path:
    try:
        return find(path)
    except InputError as fault:
        raise PydanticCustomError("file", "{sentence}", {"sentence": fault.problems[0].sentence}) from None


def _data_set(path: Path) -> Path:
    return path if is_hub_data_set(path.as_posix()) else _existing(path)


def _model(name: str) -> str:
    if is_hub_id(name):
        return name
    _existing(Path(name))
    return name


ExistingPath = Annotated[Path, Field(strict=False), AfterValidator(_existing)]
"""A path of a config that must exist; its value is the path that `find` returns."""

DataPath = Annotated[Path, Field(strict=False), AfterValidator(_data_set)]
"""A path of a config that must exist, or the id of a data set on the hub, which stays as written."""

ModelName = Annotated[str, AfterValidator(_model)]
"""A model folder that exists, or a hub id; its value stays as written."""


_READABLE = 24  # characters kept of the id, so that a person can find a folder
_DIGEST = 12  # hex digits: with a million users, two share all 48 bits with a chance of 0.2%


def slug(user_id: str) -> str:
    """A folder name for a user: the readable ASCII part of the id, and a hash that keeps similar ids apart.

    It has only `a-z`, `0-9` and single dashes, never at the ends. So it holds no separator, dot or drive, and no name
    that an operating system reserves (`con-...` is not `CON`).
    """
    plain = unicodedata.normalize("NFKD", user_id).encode("ascii", "ignore").decode().casefold()
    readable = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:_READABLE].strip("-") or "user"
    digest = hashlib.sha256(user_id.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{readable}-{digest[:_DIGEST]}"


def pseudonym(user_id: str) -> str:
    """A name for a user in records that outlive the user's data: 32 hex digits of the id's sha256.

    The id cannot be read off it; somebody who knows the id can compute it and find the records.
    """
    return hashlib.sha256(user_id.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def need_vacant(folder: Path, key: str | None = None) -> None:
    """Raises InputError unless `folder` is new or an empty folder. `key` is the option that named it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        sentence = "there is something here already, and nothing is overwritten; name a new or an empty folder"
        raise InputError([Problem(str(folder), None, key, sentence)])


@contextmanager
def atomic_folder(folder: Path, *, replace: bool = True) -> Iterator[Path]:
    """A temporary folder beside `folder`, flushed to the disk and renamed to `folder` at the end.

    An existing `folder` is replaced; with `replace=False` it must be new or empty (InputError, before and after).
    If the block raises, the temporary folder is removed and `folder` is unchanged. Raises DiskFullError for a full
    disk.
    """
    folder = folder.absolute()  # `.` has no name
    if not replace:
        need_vacant(folder)
    with naming_full_disk(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    old = _beside(folder, "old")
    with naming_full_disk(folder), _claimed(folder, os.mkdir) as temporary:
        try:
            with naming_full_disk(folder, lambda: _size(temporary)):
                yield temporary
                for path in (*temporary.rglob("*"), temporary):
                    _flush(path)
            if not replace:
                need_vacant(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes a folder of files by `atomic_folder`, replacing an existing one."""
    with atomic_folder(folder) as temporary:
        for name, content in files.items():
            (temporary / name).write_bytes(content)


def remove_folder(folder: Path) -> None:
    """Removes a folder. It is renamed first, so a killed process leaves either all of it or a left-over `.old`."""
    _remove_abandoned(folder)
    old = _beside(folder, "old")
    folder.rename(old)
    shutil.rmtree(old)


@contextmanager
def atomic_path(file: Path, *, private: bool = False, needed: int = 0) -> Iterator[Path]:
    """A temporary path beside `file` for code that writes by itself; flushed and renamed to `file` at the end.

    Its name is unique, so that several processes may write `file` at once: the last one stands. A `private` file is
    readable by its owner only, from the first byte. If the block raises, the temporary file is removed and `file` is
    unchanged. Raises DiskFullError for a full disk; `needed` is the size of the file in bytes, where it is clear.
    """

    def made(temporary: Path) -> None:
        temporary.touch(0o600 if private else 0o666, exist_ok=False)

    _remove_abandoned(file)
    with naming_full_disk(file, lambda: needed), _claimed(file, made) as temporary:
        try:
            with naming_full_disk(file, lambda: max(needed, _size(temporary))):
                yield temporary
                _flush(temporary)
                temporary.replace(file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def atomic_write(file: Path, content: str | bytes | Iterable[str | bytes], *, private: bool = False) -> None:
    """Writes text (UTF-8), bytes or an iterable of either to a file, whole or not at all, by `atomic_path`."""
    content = content.encode() if isinstance(content, str) else content
    parts, needed = ([content], len(content)) if isinstance(content, bytes) else (content, 0)
    with atomic_path(file, private=private, needed=needed) as temporary, temporary.open("wb") as stream:
        stream.writelines(part.encode() if isinstance(part, str) else part for part in parts)


class DiskFullError(OSError):
    """A disk that is full, or a limit on its use, with the path that was written and the bytes that it needs at least.

    The text is a sentence for people.
    """

    def __init__(self, code: int, path: Path, needed: int) -> None:
        super().__init__(code, os.strerror(code), str(path))
        self.path, self.needed = path, needed

    def __str__(self) -> str:
        if self.errno == errno.EFBIG:
            return f"{self.path} needs {_mebibytes(self.needed)} at least, more than one file may have (ulimit -f)"
        size = f"needs {_mebibytes(self.needed)} at least" if self.needed else "cannot be written"
        return f"{self.path} {size}, and {_free(self.path)} are free there"


def full_disk_code(fault: BaseException) -> int | None:
    """The error number of a full disk, a quota or a limit on files; None for another fault.

    Libraries in Rust (safetensors, tokenizers) and SQLite report it in the text of exceptions of their own.
    """
    if isinstance(fault, sqlite3.OperationalError):
        return errno.ENOSPC if "full" in str(fault) else None
    code = fault.errno if isinstance(fault, OSError) else None
    if code is None and (reported := re.search(r"os error (\d+)", str(fault))):
        code = int(reported[1])
    return code if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else None


@contextmanager
def naming_full_disk(path: Path, needed: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Raises DiskFullError for `path` where the block meets a full disk; `needed` counts the bytes when it does."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as fault:
        if (code := full_disk_code(fault)) is None:
            raise
        raise DiskFullError(code, path, needed()) from fault


def need_room(path: Path, needed: int) -> None:
    """Raises DiskFullError where the disk of a path has less free space than a file or folder will need, in bytes."""
    if shutil.disk_usage(_nearest_folder(path)).free < needed:
        raise DiskFullError(errno.ENOSPC, path, needed)


def append_whole(stream: IO[bytes], content: bytes, *, durable: bool = True) -> None:
    """Appends bytes to a file opened for appending, whole or not at all, and flushes it to the disk if `durable`.

    Raises DiskFullError for a full disk; the bytes that it took are cut off again.
    """
    stream.flush()
    handle, rest = stream.fileno(), memoryview(content)
    end = os.fstat(handle).st_size
    try:
        with naming_full_disk(Path(stream.name), lambda: len(content)):
            while rest:
                rest = rest[os.write(handle, rest) :]
            if durable:
                os.fsync(handle)
    except OSError:
        os.ftruncate(handle, end)
        raise


def _size(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _free(path: Path) -> str:
    """The free space on the disk of a path, whose folder may not exist yet."""
    return _mebibytes(shutil.disk_usage(_nearest_folder(path)).free)


def _nearest_folder(path: Path) -> Path:
    return next(folder for folder in path.absolute().parents if folder.is_dir())


def _mebibytes(size: int) -> str:
    return f"{size / (1 << 20):,.1f} MiB" if size >= 1 << 20 else f"{size:,} bytes"


def _beside(path: Path, kind: str) -> Path:
    """A new hidden name beside a path: `.NAME.XXXXXXXX.half` for unfinished writes, `.old` for what they replace."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{kind}")


@contextmanager
def _claimed(path: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """A new temporary path for `path`, made and locked, so that other processes do not take it for an abandoned one."""
    while True:
        temporary = _beside(path, "half")
        make(temporary)
        try:
            handle = os.open(temporary, os.O_RDONLY)
        except FileNotFoundError:  # it was taken for an abandoned one before it was locked
            continue
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if temporary.exists():
            break
        os.close(handle)
    try:
        yield temporary
    finally:
        os.close(handle)


def _remove_abandoned(path: Path) -> None:
    """Removes the unfinished writes of a path whose processes ended, and what they replaced."""
    if not path.parent.is_dir():
        return
    with os.scandir(path.parent) as entries:
        leftovers = [entry.path for entry in entries if entry.name.startswith(f".{path.name}.")]
    for leftover in leftovers:
        if leftover.endswith((".half", ".old")):
            with contextlib.suppress(OSError):  # it is in use, or another process removed it
                _remove_unclaimed(Path(leftover))


def _remove_unclaimed(path: Path) -> None:
    """Removes a file or folder. Raises OSError where a process holds it, or it cannot be removed."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        os.close(handle)


def sha256_of(file: Path) -> str:
    """The sha256 of a file in hex, read block by block."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Makes a file, or the names in a folder, durable, if the system can open it for that."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
