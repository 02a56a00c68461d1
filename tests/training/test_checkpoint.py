import errno
import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from persona_rlhf.common.errors import InputError
from persona_rlhf.training import checkpoint

CPU = torch.device("cpu")


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(4, 3).T, "none": torch.zeros(0, 7)}
    notes = {"users": ["ä/b", None, "\U0001f600"], "steps": [1, 2, 3]}
    checkpoint.save(tmp_path / "deep" / "x.safetensors", tensors, notes)
    found, told = checkpoint.load(tmp_path / "deep" / "x.safetensors", CPU)
    assert told == notes
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "x.safetensors"
    checkpoint.save(file, {"a": torch.zeros(2)}, {"n": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(file, {"a": torch.ones(2)}, {"n": 2})
    assert checkpoint.load(file, CPU)[1] == {"n": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_full_disk_is_the_systems_error_and_leaves_nothing_half(tmp_path, monkeypatch):
    """safetensors has its own kind of error."""

    def full(tensors, half, notes):
        half.write_bytes(b"some of it")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="x.safetensors needs 10 bytes") as fault:
        checkpoint.save(tmp_path / "x.safetensors", {}, {})
    assert fault.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "foreign"])
def test_a_damaged_file_is_one_clear_sentence(tmp_path, damage):
    file = tmp_path / "x.safetensors"
    checkpoint.save(file, {"a": torch.zeros(200)}, {"n": 1})
    whole = file.read_bytes()
    if damage == "foreign":
        save_file({"a": torch.zeros(2)}, file)
    else:
        file.write_bytes({"cut": whole[: len(whole) // 2], "garbage": b"\xff" * 64, "empty": b""}[damage])
    with pytest.raises(InputError) as fault:
        checkpoint.load(file, CPU)
    [problem] = fault.value.problems
    assert problem.file == str(file)
    assert "damaged" in problem.sentence
    assert "delete it" in problem.sentence
    assert "\n" not in problem.sentence


def test_halves_of_a_killed_save_are_swept_away(tmp_path):
    checkpoint.save(tmp_path / "b.safetensors", {}, {"n": 2})
    checkpoint.save(tmp_path / "a.safetensors", {}, {"n": 1})
    (tmp_path / "c.safetensors.half").write_bytes(b"cut")
    (tmp_path / "notes.txt").write_text("not ours")
    assert [path.name for path in checkpoint.stored_files(tmp_path)] == ["a.safetensors", "b.safetensors"]
    assert not (tmp_path / "c.safetensors.half").exists()
    assert list(checkpoint.stored_files(tmp_path / "nowhere")) == []
