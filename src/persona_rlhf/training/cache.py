"""What the frozen base computes once: reference log-probs, hidden states (RAM/disk)."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import ChainMap
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from persona_rlhf.common.files import atomic_path
from persona_rlhf.data.erasure import Trace
from persona_rlhf.data.tokenize import PairRow, Row, UserRows, both_rows
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.model_split import HiddenStates
from persona_rlhf.training.constraint import ConstraintBank, ConstraintSample

# ----------------------------------------------------------------------------------------------------
# Log-probabilities under the frozen base, computed once for all users and kept by content.
# ----------------------------------------------------------------------------------------------------


class Reference:
    """`log pi_ref(completion | prompt)` in nats, summed over tokens, of every row it was asked for.

    A row is known by the hash of its token ids, so users who judged the same answers share one value, and `file`
    keeps the values for a resumed run (written whole or not at all, by `save`). What `known` has is taken from there
    when it is asked for, and kept too. Values hold for one base and device only.
    """

    def __init__(self, adapted: AdaptedModel, file: Path | None = None, known: Reference | None = None) -> None:
        self._adapted, self._file = adapted, file
        self._values: dict[bytes, float] = {}
        self._known = known._values if known else {}
        self._identity = identity_of_values(adapted)
        self._unsaved = False
        if file is not None and file.exists():
            self._values |= self._read(file)

    def __getitem__(self, row: Row) -> float:
        return self._values[key_of(row)]

    def add(self, rows: Iterable[Row], states: HiddenStates | None = None) -> None:
        """Computes what is not known yet, each distinct row once, in length-sorted passes with the adapters off.

        With `states` (of `AdaptedModel.prefix_states`; {} where there are none) it starts from them and saves nothing.
        """
        wanted = {key: row for row in rows if (key := key_of(row)) not in self._values}
        missing = {key: row for key, row in wanted.items() if key not in self._known}
        found = {key: self._known[key] for key in wanted if key not in missing}
        if missing:
            with self._adapted.using(None):
                [scores] = self._adapted.score([list(missing.values())], [states] if states else ())
            found.update(zip(missing, (score.logp for score in scores), strict=True))
        self._take(found)
        if states is None:
            self.save()

    def learn(self, other: Reference) -> None:
        """Takes over all that another one has."""
        self._take({key: value for key, value in other._values.items() if key not in self._values})
        self.save()

    def _take(self, found: dict[bytes, float]) -> None:
        self._values |= found
        self._unsaved = self._unsaved or bool(found)

    def save(self) -> None:
        """Writes the file, where there is one and it does not have all values yet."""
        if self._unsaved and self._file is not None:
            self._write(self._file)
        self._unsaved = False

    def _read(self, file: Path) -> dict[bytes, float]:
        """What `_write` wrote for this base; nothing of a damaged file, whose values are computed again."""
        try:
            stored = load_file(file)
            if bytes(stored["base"]).decode() != self._identity:
                return {}
            return dict(zip(map(bytes, stored["keys"]), stored["logps"].tolist(), strict=True))
        except (SafetensorError, KeyError, ValueError):
            return {}

    def _write(self, file: Path) -> None:
        keys = np.frombuffer(b"".join(self._values), dtype=np.uint8).reshape(len(self._values), -1)
        tensors: dict[str, np.ndarray[Any, Any]] = {
            "keys": keys,
            "logps": np.array(list(self._values.values()), dtype=np.float64),
            "base": np.frombuffer(self._identity.encode(), dtype=np.uint8),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file, writer=str(os.getpid())) as temporary:
            save_file(tensors, temporary)


def traces(files: Iterable[Path], rows: Container[bytes] | None) -> Iterator[Trace]:
    """The log-probabilities of one user's rows (see `key_of`) in files of a cache; with None, all that a file holds.

    A damaged file counts as one value.
    """
    what = "the base's log-probabilities, all" if rows is None else "the base's log-probabilities of the user's rows"
    for file in files:
        try:
            count = sum(rows is None or bytes(key) in rows for key in load_file(file)["keys"])
        except (SafetensorError, KeyError):
            count = 1
        if count:
            yield Trace(file, what, count, partial(_erase, file, rows))


def _erase(file: Path, rows: Container[bytes] | None) -> None:
    """Drops the values of rows, or with None all, from a file; an empty or damaged file is deleted."""
    try:
        stored = load_file(file)
        kept = [] if rows is None else [n for n, key in enumerate(stored["keys"]) if bytes(key) not in rows]
    except (SafetensorError, KeyError):
        kept = []
    if not kept:
        file.unlink()
        return
    with atomic_path(file) as temporary:
        save_file(stored | {name: stored[name][kept] for name in ("keys", "logps")}, temporary)


def identity_of_values(adapted: AdaptedModel) -> str:
    """What log-probabilities depend on beside the rows: the base's weights, their type, and the kind of device."""
    return f"{adapted.base.weights_hash} {adapted.base.model.dtype} {adapted.base.device.type}"


def shared_reference(adapted: AdaptedModel, folder: Path) -> Reference:
    """The values that runs over one base keep for each other, in a file of their own in `folder`.

    Runs at the same time may lose each other's values, never mix them: a file is written whole or not at all.
    """
    name = hashlib.sha256(identity_of_values(adapted).encode()).hexdigest()[:32]
    return Reference(adapted, folder / f"{name}.safetensors")


def key_of(row: Row) -> bytes:
    """What a row is known by: a hash of its token ids."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(np.array([len(row.prompt), *row.prompt, *row.completion], dtype=np.int64).tobytes())
    return digest.digest()


# ----------------------------------------------------------------------------------------------------
# Hidden states that memory has no room for: in a file that is mapped into memory and has no name any more, so that it
# is gone with the process, however that ends.
# ----------------------------------------------------------------------------------------------------

_AT_ONCE = 256  # rows whose states are computed, and in memory, together


class DiskStates(Mapping[Row, Float[Tensor, "_tokens hidden"]]):
    """The states of rows below the adapted layers, on disk; what is asked for comes back to the base's device.

    The file lies in `folder`, or where the system keeps what is temporary. Raises OSError where the disk is full.
    """

    def __init__(self, adapted: AdaptedModel, rows: Sequence[Row], folder: Path | None = None) -> None:
        distinct = list(dict.fromkeys(row for row in rows if row.completion))
        self._device, self._places = adapted.base.device, dict[Row, slice]()
        end = 0
        for row in distinct:
            start, end = end, end + len(row.prompt) + len(row.completion) - 1
            self._places[row] = slice(start, end)
        self._states = self._mapped(adapted, end, folder)
        for at in range(0, len(distinct), _AT_ONCE):
            for row, states in adapted.prefix_states(distinct[at : at + _AT_ONCE]).items():
                self._states[self._places[row]] = states.to("cpu")

    @staticmethod
    def _mapped(adapted: AdaptedModel, tokens: int, folder: Path | None) -> Float[Tensor, "_all hidden"]:
        hidden, dtype = adapted.base.model.config.get_text_config().hidden_size, adapted.base.model.dtype
        with tempfile.NamedTemporaryFile(dir=folder, prefix="states-") as file:
            size = tokens * hidden * dtype.itemsize
            try:  # a mapped file with holes in it would kill the process where the disk is full
                os.posix_fallocate(file.fileno(), 0, size) if hasattr(os, "posix_fallocate") else file.truncate(size)
            except OSError as fault:
                raise OSError(fault.errno, "no space left for hidden states (fleet.trunk_disk)", file.name) from fault
            return torch.from_file(file.name, shared=True, size=tokens * hidden, dtype=dtype).view(tokens, hidden)

    def __getitem__(self, row: Row) -> Float[Tensor, "_tokens hidden"]:
        return self._states[self._places[row]].to(self._device)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


# ----------------------------------------------------------------------------------------------------
# What training stands on: the hidden states below the adapters, kept for the users in the slots and for the bank; and
# the base's log-probabilities of what they were computed for.
# ----------------------------------------------------------------------------------------------------


class HiddenStateCache:
    """Hidden states by user, computed when he takes his slot and forgotten when he leaves it.

    What `reference` does not know of his rows by then starts from them too: nothing frozen is computed twice.
    `memory` bytes are shared: half for the bank, half for the slots in equal parts. Whoever does not fit finds his
    states in a file in `folder`, of `disk` bytes shared likewise; who does not fit there either has those of each
    step's rows computed in that step. However it is, they depend on his own rows alone, so a resumed run and a run with
    other neighbours compute the same bits.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        reference: Reference,
        bank: ConstraintBank | None,
        slots: int,
        memory: int,
        disk: int = 0,
        folder: Path | None = None,
    ) -> None:
        self._adapted, self._reference, self._folder = adapted, reference, folder
        self._memory, self._disk, self._slots = memory // 2, disk // 2, max(1, slots)
        self._users: dict[str, HiddenStates | None] = {}
        self._bank = self._kept(bank.rows() if bank else [], 1)

    def of(
        self, user_id: str, train: Sequence[PairRow], pairs: Sequence[PairRow], draw: ConstraintSample | None
    ) -> HiddenStates:
        """The states of a step's rows: `pairs` of the user's `train`, and the constraint rows of `draw`."""
        if user_id not in self._users:
            own = both_rows(train)
            kept = self._kept(own, self._slots)
            self._reference.add(own, kept or {})
            self._users[user_id] = kept
        user, bank = self._users[user_id], self._bank
        if user is None:
            user = self._adapted.prefix_states(both_rows(pairs))
        if bank is None:
            bank = self._adapted.prefix_states([] if draw is None else draw.rows)
        return ChainMap(user, bank)  # type: ignore[arg-type]  # it is only read

    def _kept(self, rows: Sequence[Row], parts: int) -> HiddenStates | None:
        size = self._adapted.prefix_bytes(rows)
        if size <= self._memory // parts:
            return self._adapted.prefix_states(rows)
        return DiskStates(self._adapted, rows, self._folder) if size <= self._disk // parts else None

    def forget(self, user_id: str) -> None:
        """Drops what is kept for a user who leaves his slot."""
        self._users.pop(user_id, None)


def rows_ahead(adapted: AdaptedModel, users: Iterable[UserRows], bank: ConstraintBank | None) -> list[Row]:
    """The rows that the reference must know before anyone takes a slot: in `Ground`, a user's own come with him."""
    pairs = (pair for user in users for pair in (*(() if adapted.has_frozen_prefix else user.train), *user.deciding))
    return both_rows(pairs) + (bank.rows() if bank else [])
