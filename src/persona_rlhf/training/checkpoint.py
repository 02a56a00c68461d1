"""Checkpoints, from which a killed run resumes exactly: the state of the slots, and the adapters of finished users."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_path
from persona_rlhf.data.erasure import DataSubject, Trace


def save(file: Path, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
    """Writes tensors and notes (JSON) as one safetensors file, whole or not at all, and on the disk when it returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file, needed=sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, {"notes": json.dumps(notes)})


def checkpoint_traces(run: Path, user: DataSubject) -> Iterator[Trace]:
    """The user's trained adapters and slots in the checkpoints of an unfinished run."""
    for file in sorted((run / "state").rglob("*.safetensors")):
        if file.parent.name == "trained" and user.owns_slug(file.stem):
            yield Trace(file, "trained adapter of an unfinished run", 1, file.unlink)
        elif file.name == "slots.safetensors":
            notes = load(file, torch.device("cpu"))[1]
            if any(map(user, (*notes["users"], *notes["waiting"]))):
                yield Trace(file, "place in a checkpoint", 1, partial(_erase, file, user))


def _erase(file: Path, user: DataSubject) -> None:
    """Frees the user's slot in a checkpoint, filled with zeros, and removes the user from the queue."""
    tensors, notes = load(file, torch.device("cpu"))
    for slot, seated in enumerate(notes["users"]):
        if user(seated):
            notes["users"][slot], notes["steps"][slot], notes["seconds"][slot] = None, 0, 0.0
            for tensor in tensors.values():
                tensor[slot] = 0
    notes["waiting"] = [waiting for waiting in notes["waiting"] if not user(waiting)]
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
