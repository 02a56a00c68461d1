"""Log-probabilities under the frozen base, computed once for all users and kept by content."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from persona_rlhf.preferences.tokens import Row
from persona_rlhf.training.checkpoint import writing
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.trunk import States


@runtime_checkable
class Known(Protocol):
    """Log-probabilities under the base, by row: a `Reference`, or a dict."""

    def __getitem__(self, row: Row, /) -> float: ...


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

    def add(self, rows: Iterable[Row], states: States | None = None) -> None:
        """Computes what is not known yet, each distinct row once, in length-sorted passes with the adapters off.

        With `states` (see `AdaptedModel.below`; {} where there are none) it starts from them, and saves nothing yet.
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
        half = file.with_suffix(".half")
        with writing(half):
            save_file(tensors, half)
        half.replace(file)


def values_of(file: Path, rows: Container[bytes] | None) -> int:
    """How many values of these rows (see `key_of`), or with None of any, a file holds. A damaged file counts as one."""
    try:
        return sum(rows is None or bytes(key) in rows for key in load_file(file)["keys"])
    except (SafetensorError, KeyError):
        return 1


def drop_values(file: Path, rows: Container[bytes] | None) -> None:
    """Takes the values of these rows, or with None all, out of a file; one that is empty then, or damaged, goes."""
    try:
        stored = load_file(file)
        kept = [] if rows is None else [n for n, key in enumerate(stored["keys"]) if bytes(key) not in rows]
    except (SafetensorError, KeyError):
        kept = []
    if not kept:
        file.unlink()
        return
    half = file.with_suffix(".half")
    with writing(half):
        save_file(stored | {name: stored[name][kept] for name in ("keys", "logps")}, half)
    half.replace(file)


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
