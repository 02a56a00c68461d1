"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from persona_rlhf.inputs.problems import InputError, Problem


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
