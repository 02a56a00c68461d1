"""Cache of everything the frozen base computes once: reference log-probabilities and hidden states below the adapters.

Reference log-probabilities are kept by content, for all users. Hidden states are kept in memory or on disk, for the
users in the slots and for the constraint rows.
"""

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

from persona_rlhf.common.files import atomic_path, naming_full_disk
from persona_rlhf.data.erasure import Trace
from persona_rlhf.data.tokenize import PairRow, Row, UserRows, both_rows
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.device import to_device
from persona_rlhf.models.model_split import HiddenStates


class Reference:
    """`log pi_ref(completion | prompt)` in nats, summed over tokens, of every row added to it.

    The key of a row is the hash of its token ids, so users with the same answers share one value. `file` keeps the
    values for a resumed run (written whole or not at all, by `save`). A value in `shared` is copied when its row is
    added. Values hold for one base and kind of device only.
    """

    def __init__(self, adapted: AdaptedModel, file: Path | None = None, shared: Reference | None = None) -> None:
        self._adapted, self._file = adapted, file
        self._values: dict[bytes, float] = {}
        self._shared = shared._values if shared else {}
        self._identity = identity_of_values(adapted)
        self._unsaved = False
        if file is not None and file.exists():
            self._values |= self._read(file)

    def __getitem__(self, row: Row) -> float:
        return self._values[key_of(row)]

    def add(self, rows: Iterable[Row], states: HiddenStates | None = None) -> None:
        """Computes missing values, each distinct row once, in length-sorted passes with the adapters off.

        With `states` (see `AdaptedModel.prefix_states`; {} if no layer lies below the adapters) it starts from them,
        and saves nothing yet.
        """
        added = {key: row for row in rows if (key := key_of(row)) not in self._values}
        missing = {key: row for key, row in added.items() if key not in self._shared}
        values = {key: self._shared[key] for key in added if key not in missing}
        if missing:
            with self._adapted.using(None):
                [scores] = self._adapted.score([list(missing.values())], [states] if states else ())
            values.update(zip(missing, (score.logp for score in scores), strict=True))
        self._take(values)
        if states is None:
            self.save()

    def learn(self, other: Reference) -> None:
        """Copies all values of another reference."""
        self._take({key: value for key, value in other._values.items() if key not in self._values})
        self.save()

    def _take(self, values: dict[bytes, float]) -> None:
        self._values |= values
        self._unsaved = self._unsaved or bool(values)

    def save(self) -> None:
        """Writes the file, if there is one and values were added."""
        if self._unsaved and self._file is not None:
            self._write(self._file)
        self._unsaved = False

    def _read(self, file: Path) -> dict[bytes, float]:
        """The values written by `_write` for this base; those of a damaged file are computed again."""
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
        with atomic_path(file) as temporary:
            save_file(tensors, temporary)


def cache_traces(files: Iterable[Path], rows: Container[bytes] | None) -> Iterator[Trace]:
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
    """The identity of log-probabilities beside the rows: the base's weights, their type, and the kind of device."""
    return f"{adapted.base.weights_hash} {adapted.base.model.dtype} {adapted.base.device.type}"


def shared_reference(adapted: AdaptedModel, folder: Path) -> Reference:
    """The values that runs over one base share, in one file in `folder`.

    Runs at the same time may lose each other's values and never mix them: a file is written whole or not at all.
    """
    name = hashlib.sha256(identity_of_values(adapted).encode()).hexdigest()[:32]
    return Reference(adapted, folder / f"{name}.safetensors")


def key_of(row: Row) -> bytes:
    """The key of a row: a hash of its token ids."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(np.array([len(row.prompt), *row.prompt, *row.completion], dtype=np.int64).tobytes())
    return digest.digest()


_AT_ONCE = 256  # rows whose states are computed, and in memory, together


class DiskStates(Mapping[Row, Float[Tensor, "_tokens hidden"]]):
    """Hidden states of rows below the adapted layers, in a file mapped into memory; read onto the base's device.

    The file lies in `folder`, or in the system's temporary folder. It has no name any more, so it is gone with the
    process, however that ends. Raises DiskFullError for a full disk.
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
            place = Path(f"{file.name} (fleet.trunk_disk)")
            with naming_full_disk(place, lambda: size):  # a mapped file with holes would kill the process
                os.posix_fallocate(file.fileno(), 0, size) if hasattr(os, "posix_fallocate") else file.truncate(size)
            return torch.from_file(file.name, shared=True, size=tokens * hidden, dtype=dtype).view(tokens, hidden)

    def __getitem__(self, row: Row) -> Float[Tensor, "_tokens hidden"]:
        return self._states[self._places[row]].to(self._device)

    def of(self, rows: Iterable[Row]) -> HiddenStates:
        """The states of those of `rows` that are here, read at once: a GPU gets them in one copy."""
        here = [row for row in dict.fromkeys(rows) if row in self]
        return dict(zip(here, to_device([self._states[self._places[row]] for row in here], self._device), strict=True))

    def __contains__(self, row: object) -> bool:
        return row in self._places

    def __iter__(self) -> Iterator[Row]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class HiddenStateCache:
    """Hidden states below the adapters, by user: computed when the user takes a slot, dropped when it leaves.

    Reference log-probabilities that are missing then start from these states: nothing frozen is computed twice. Half of
    `memory` bytes is for the rows that users share, of the constraint and the `pool`; half for the slots in equal
    parts. The states of a user that does not fit are in a file in `folder`, of `disk` bytes shared likewise. If they do
    not fit there either, each step computes the states of its rows. In all cases they depend on the user's own rows
    alone, and shared ones on all that are shared. So a resumed run, and a run with other users side by side, compute
    the same bits.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        reference: Reference,
        constraint_rows: Sequence[Row],
        slots: int,
        memory: int,
        disk: int = 0,
        folder: Path | None = None,
        pool: Sequence[Row] = (),
    ) -> None:
        self._adapted, self._reference, self._folder = adapted, reference, folder
        self._memory, self._disk, self._slots = memory // 2, disk // 2, max(1, slots)
        self._users: dict[str, HiddenStates | None] = {}
        self._shared = self._kept([*constraint_rows, *pool], 1)
        if adapted.has_frozen_prefix:
            reference.add(pool, self._shared or {})

    def of(
        self, user_id: str, train: Sequence[PairRow], pairs: Sequence[PairRow], constraint_rows: Sequence[Row]
    ) -> HiddenStates:
        """The states of a step's rows: `pairs` of the user's `train` or of the pool, and its constraint rows."""
        if user_id not in self._users:
            rows = both_rows(train)
            states = self._kept(rows, self._slots)
            self._reference.add(rows, states or {})
            self._users[user_id] = states
        user, shared = self._users[user_id], self._shared
        if user is None:
            user = self._adapted.prefix_states(both_rows(pairs))
        if shared is None:
            of_pool = [row for row in both_rows(pairs) if row not in user]
            shared = self._adapted.prefix_states([*constraint_rows, *of_pool])
        rows = [*both_rows(pairs), *constraint_rows]
        read = [states.of(rows) if isinstance(states, DiskStates) else states for states in (user, shared)]
        return ChainMap(*read)  # type: ignore[arg-type]  # it is only read

    def _kept(self, rows: Sequence[Row], parts: int) -> HiddenStates | None:
        size = self._adapted.prefix_bytes(rows)
        if size <= self._memory // parts:
            return self._adapted.prefix_states(rows)
        return DiskStates(self._adapted, rows, self._folder) if size <= self._disk // parts else None

    def forget(self, user_id: str) -> None:
        """Drops the states of a user that leaves its slot."""
        self._users.pop(user_id, None)


def rows_ahead(adapted: AdaptedModel, users: Iterable[UserRows], constraint_rows: Sequence[Row] = ()) -> list[Row]:
    """The rows that the reference must hold before training starts.

    With a frozen prefix, `HiddenStateCache` adds a user's training rows when the user takes a slot.
    """
    pairs = (pair for user in users for pair in (*(() if adapted.has_frozen_prefix else user.taught), *user.deciding))
    return [*both_rows(pairs), *constraint_rows]
