"""Atomic writes (the only implementation), sha256 of files, bundled data lookup, user slugs and pseudonyms."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError
from safetensors import SafetensorError

from persona_rlhf.common.errors import InputError, Problem, did_you_mean


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """What the system says of a file that safetensors could not write (a full disk) is raised as OSError."""
    try:
        yield
    except SafetensorError as fault:
        told = re.search(r"os error (\d+)", str(fault))
        if told is None:
            raise
        raise OSError(int(told[1]), os.strerror(int(told[1])), str(file)) from fault


# ----------------------------------------------------------------------------------------------------
# Files as the user names them: from the working directory, else from those shipped with the toolkit.
# ----------------------------------------------------------------------------------------------------

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped_root() -> Path:
    """The folder that holds `data/` and `configs/`: inside an installed package, or the checkout of an editable one."""
    installed = _PACKAGE / "_bundled"
    return installed if installed.is_dir() else _PACKAGE.parent.parent


def find(path: Path | str) -> Path:
    """The file or folder of that name: in the working directory, or else shipped with the toolkit.

    Raises InputError where it is in neither place.
    """
    try:
        wanted = Path(path).expanduser()
        if wanted.exists():
            return wanted
        if not wanted.is_absolute() and ".." not in wanted.parts and (shipped_root() / wanted).exists():
            return shipped_root() / wanted
    except (OSError, ValueError, RuntimeError) as fault:  # a name too long, with a zero byte, of an unknown user's home
        why = fault.strerror if isinstance(fault, OSError) else fault
        raise InputError([Problem(_shown(path), None, None, f"this is no path that can be opened ({why})")]) from None
    raise InputError([Problem(str(path), None, None, f"no such file or folder{_neighbour(wanted)}")])


def is_hub_id(model: str) -> bool:
    """Whether a model's name is `owner/name` of the hub: two parts, the first of which is no folder here."""
    owner, slash, name = model.partition("/")
    if not slash or not name or "/" in name or owner in ("", ".", "..", "~"):
        return False
    return not Path(owner).is_dir() and not (shipped_root() / owner).is_dir()


def _shown(path: Path | str) -> str:
    text = str(path).encode("unicode_escape").decode()
    return text if len(text) <= 80 else f"{text[:77]}..."


def _neighbour(missing: Path) -> str:
    """A hint at a file of almost that name in the folder where it was looked for."""
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


def _model(name: str) -> str:
    if is_hub_id(name):
        return name
    _existing(Path(name))
    return name


ExistingPath = Annotated[Path, Field(strict=False), AfterValidator(_existing)]
"""A path of a config that must exist; its value is where it was found."""

ModelName = Annotated[str, AfterValidator(_model)]
"""A model folder that exists, or a hub id; its value stays as written."""


# ----------------------------------------------------------------------------------------------------
# What a user is called on disk and in papers: opaque, safe, distinct names, whatever the id.
# ----------------------------------------------------------------------------------------------------

_READABLE = 24  # characters kept of the id, so that a person can find a folder
_DIGEST = 12  # hex digits: with a million users, two share all 48 bits with a chance of 0.2%


def slug(user_id: str) -> str:
    """A folder name for a user: the id's readable ASCII part, and a hash that sets apart ids that look the same.

    Only `a-z`, `0-9` and single dashes, never at the ends: no separator, dot or drive, and no name that any system
    reserves (`con-...` is not `CON`).
    """
    plain = unicodedata.normalize("NFKD", user_id).encode("ascii", "ignore").decode().casefold()
    readable = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:_READABLE].strip("-") or "user"
    digest = hashlib.sha256(user_id.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{readable}-{digest[:_DIGEST]}"


def pseudonym(user_id: str) -> str:
    """What papers that outlive a user call him: 32 hex digits of the id's sha256, nothing readable.

    Whoever knows the id can find his lines again; nobody can read the id off them.
    """
    return hashlib.sha256(user_id.encode("utf-8", "surrogatepass")).hexdigest()[:32]


# ----------------------------------------------------------------------------------------------------
# Folders and files that appear whole or not at all.
# ----------------------------------------------------------------------------------------------------


def need_vacant(folder: Path) -> None:
    """Raises InputError where something stands already; a new or an empty folder is none."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        sentence = "there is something here already, and nothing is overwritten; name a new or an empty folder"
        raise InputError([Problem(str(folder), None, None, sentence)])


@contextmanager
def drafted(folder: Path) -> Iterator[Path]:
    """A folder beside it to write files into, which takes the place of a new or empty `folder` by a rename when all is
    done; after a fault nothing is left of it."""
    need_vacant(folder)
    with new_folder(folder.absolute()) as half:  # `.` has no name
        yield half
        for file in half.iterdir():
            _flush(file)
        need_vacant(folder)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes a folder of files, flushed to the disk, and puts it in place by a rename; one that stood there goes."""
    with new_folder(folder) as half:
        for name, data in files.items():
            write_flushed(half / name, data)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, which is put in place by a rename at the end; one that stood there goes.

    Where the writing raises, nothing has happened to what stood there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    half, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("half", "old"))
    for left_over in (half, old):
        shutil.rmtree(left_over, ignore_errors=True)
    half.mkdir()
    try:
        yield half
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise
    _flush(half)
    if folder.exists():
        folder.rename(old)
    half.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder: it is there whole or not at all, and what a kill leaves has the name of a left-over."""
    gone = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


def write_file(file: Path, data: bytes) -> None:
    """Writes a file, flushed to the disk, by a rename."""
    half = file.with_name(f".{file.name}.half")
    write_flushed(half, data)
    half.replace(file)


def write_lines(file: Path, lines: Iterable[bytes]) -> None:
    """Writes a file of any length, flushed to the disk, by a rename."""
    half = file.with_name(f".{file.name}.half")
    with half.open("wb") as stream:
        stream.writelines(lines)
        stream.flush()
        os.fsync(stream.fileno())
    half.replace(file)


def write_flushed(file: Path, data: bytes) -> None:
    """Writes bytes and waits until the disk has them."""
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _flush(path: Path) -> None:
    """Makes a file, or the names in a folder, durable, where the system can open it for that."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
