"""Checkpoints, from which a killed run resumes exactly: the state of the slots, and the adapters of finished users."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_path


def save(file: Path, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
    """Writes tensors and notes (JSON) as one safetensors file, whole or not at all, and on the disk when it returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, {"notes": json.dumps(notes)})


def sits_in(file: Path, gone: Callable[[str], bool]) -> bool:
    """Whether a user for whom `gone` is true has a slot of a checkpoint, or waits for one."""
    notes = load(file, torch.device("cpu"))[1]
    return any(user is not None and gone(user) for user in (*notes["users"], *notes["waiting"]))


def without(file: Path, gone: Callable[[str], bool]) -> None:
    """Removes the users for whom `gone` is true from a checkpoint: their slots become free and hold zeros."""
    tensors, notes = load(file, torch.device("cpu"))
    for place, user in enumerate(notes["users"]):
        if user is not None and gone(user):
            notes["users"][place], notes["steps"][place], notes["seconds"][place] = None, 0, 0.0
            for tensor in tensors.values():
                tensor[place] = 0
    notes["waiting"] = [user for user in notes["waiting"] if not gone(user)]
    save(file, tensors, notes)


def load(file: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and notes of a checkpoint. Raises InputError if the file is damaged."""
    try:
        with safe_open(file, framework="pt", device=str(device)) as stored:
            notes = json.loads(stored.metadata()["notes"])
            return {name: stored.get_tensor(name) for name in stored.keys()}, notes  # noqa: SIM118
    except Exception as fault:  # safetensors raises its own kinds, and a cut file may fail anywhere
        sentence = f"the checkpoint is damaged ({fault}); delete it to start its users anew"
        raise InputError([Problem(str(file), None, None, sentence)]) from fault


def stored_files(folder: Path) -> Iterator[Path]:
    """The complete files of a checkpoint folder, sorted; halves left by a killed process are removed."""
    if folder.is_dir():
        for file in sorted(folder.iterdir()):
            if file.name.endswith(".half"):
                file.unlink()
            elif file.suffix == ".safetensors":
                yield file
