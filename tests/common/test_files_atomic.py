"""Files and folders that are written whole or not at all."""

import errno
import os
import resource
import signal
import stat

import pytest
from safetensors import SafetensorError

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import (
    DiskFullError,
    append_whole,
    atomic_folder,
    atomic_path,
    atomic_write,
    need_room,
    write_folder,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", ["é\n", "é\n".encode(), ["é", "\n"], (part for part in ("é".encode(), b"\n"))])
def test_text_bytes_and_parts_of_either_are_written(tmp_path, content):
    (tmp_path / "a").write_bytes(b"before")
    atomic_write(tmp_path / "a", content)
    assert (tmp_path / "a").read_bytes() == "é\n".encode()
    assert names(tmp_path) == ["a"]


def parts_that_fail():
    yield "half"
    raise KeyboardInterrupt


@pytest.mark.parametrize("private", [False, True])
def test_a_fault_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path, private):
    (tmp_path / "a").write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "a", parts_that_fail(), private=private)
    assert (tmp_path / "a").read_bytes() == b"before"
    assert names(tmp_path) == ["a"]


def test_the_bytes_are_on_the_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: steps.append("fsync") or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda *paths: steps.append("replace") or replace(*paths))
    atomic_write(tmp_path / "a", b"new")
    assert steps == ["fsync", "replace"]


def test_a_private_file_is_its_owners_from_the_first_byte(tmp_path):
    (tmp_path / ".a.half").write_bytes(b"left over, readable by all")
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "a", mode_then_fail(tmp_path), private=True)
    atomic_write(tmp_path / "a", b"secret", private=True)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def mode_then_fail(folder):
    [file] = folder.glob(".a.*")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    yield b"secret"
    raise KeyboardInterrupt


def test_writers_of_one_file_do_not_share_a_temporary_file(tmp_path):
    with atomic_path(tmp_path / "a") as one, atomic_path(tmp_path / "a") as two:
        one.write_bytes(b"1")
        two.write_bytes(b"2")
    assert (tmp_path / "a").read_bytes() == b"1"  # the outer block ended last
    assert names(tmp_path) == ["a"]


def test_writers_of_one_folder_do_not_share_a_temporary_folder(tmp_path):
    with atomic_folder(tmp_path / "f") as one, atomic_folder(tmp_path / "f") as two:
        (one / "a").write_bytes(b"1")
        (two / "b").write_bytes(b"2")
    assert names(tmp_path) == ["f"]
    assert names(tmp_path / "f") == ["a"]


def killed(work):
    """Runs `work` in a process of its own that is killed inside."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path):
    def in_a_file():
        with atomic_path(tmp_path / "a"):
            os.kill(os.getpid(), signal.SIGKILL)

    def in_a_folder():
        with atomic_folder(tmp_path / "f"):
            os.kill(os.getpid(), signal.SIGKILL)

    killed(in_a_file)
    killed(in_a_folder)
    assert len(names(tmp_path)) == 2
    atomic_write(tmp_path / "a", b"new")
    write_folder(tmp_path / "f", {"new": b"2"})
    assert names(tmp_path) == ["a", "f"]


@pytest.mark.parametrize("library", ["safetensors", "tokenizers"])
def test_a_full_disk_is_an_os_error_also_where_a_library_reports_it_in_words(tmp_path, library):
    kind = {"safetensors": SafetensorError, "tokenizers": Exception}[library]
    for whole in (atomic_path, atomic_folder):
        with pytest.raises(DiskFullError) as fault, whole(tmp_path / "a"):
            raise kind("I/O error: No space left on device (os error 28)")
        assert (fault.value.errno, fault.value.filename) == (errno.ENOSPC, str(tmp_path / "a"))
        with pytest.raises(kind, match="invalid header"), whole(tmp_path / "a"):
            raise kind("invalid header")
    assert names(tmp_path) == []


def full_at(size, work):
    """The sentence of the DiskFullError that `work` ends with where no file may be larger; in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            work()
        except DiskFullError as fault:
            os.write(writer, str(fault).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as stream:
        return stream.read()


@pytest.mark.parametrize("content", [b"x" * 5_000, "x" * 5_000, [b"x" * 2_500] * 2])
def test_a_file_that_does_not_fit_is_named_with_its_size_and_nothing_of_it_is_left(tmp_path, content):
    (tmp_path / "a").write_bytes(b"before")
    sentence = full_at(1_000, lambda: atomic_write(tmp_path / "a", content))
    assert sentence.startswith(f"{tmp_path / 'a'} needs {'1,000' if isinstance(content, list) else '5,000'} bytes at")
    assert (tmp_path / "a").read_bytes() == b"before"
    assert names(tmp_path) == ["a"]


def test_a_folder_that_does_not_fit_is_named_and_nothing_of_it_is_left(tmp_path):
    write_folder(tmp_path / "f", {"old": b"1"})
    sentence = full_at(1_000, lambda: write_folder(tmp_path / "f", {"one": b"x" * 900, "two": b"x" * 2_000}))
    assert sentence.startswith(f"{tmp_path / 'f'} needs 1,900 bytes at least")
    assert names(tmp_path) == ["f"]
    assert names(tmp_path / "f") == ["old"]


def test_lines_that_do_not_fit_are_taken_back_whole(tmp_path):
    file = tmp_path / "log"

    def work():
        with file.open("ab") as stream:
            append_whole(stream, b"first\n")
            append_whole(stream, b"x" * 5_000 + b"\n")

    assert full_at(1_000, work).startswith(f"{file} needs 5,001 bytes")
    assert file.read_bytes() == b"first\n"


def test_room_is_checked_before_the_work(tmp_path):
    need_room(tmp_path / "new" / "out", 1)
    with pytest.raises(DiskFullError, match=r"out needs .* at least, and .* are free there"):
        need_room(tmp_path / "new" / "out", 1 << 60)


def test_a_folder_is_replaced_whole_or_left_as_it_was(tmp_path):
    write_folder(tmp_path / "f", {"old": b"1"})
    with pytest.raises(ValueError, match="null byte"):
        write_folder(tmp_path / "f", {"new": b"2", "\0": b"no name"})
    assert names(tmp_path) == ["f"]
    assert names(tmp_path / "f") == ["old"]
    write_folder(tmp_path / "f", {"new": b"2"})
    assert names(tmp_path / "f") == ["new"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(InputError, match="nothing is overwritten"), atomic_folder(tmp_path / "f", replace=False):
        write_folder(tmp_path / "f", {"theirs": b"1"})
    assert names(tmp_path) == ["f"]
    assert names(tmp_path / "f") == ["theirs"]
