"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes a folder of files, flushed to the disk, and puts it in place by a rename; one that stood there goes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    half, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("half", "old"))
    for left_over in (half, old):
        shutil.rmtree(left_over, ignore_errors=True)
    half.mkdir()
    for name, data in files.items():
        write_flushed(half / name, data)
    _flush_folder(half)
    if folder.exists():
        folder.rename(old)
    half.rename(folder)
    _flush_folder(folder.parent)
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


def _flush_folder(folder: Path) -> None:
    """Makes the names in a folder durable, where the system can open a folder."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
