"""Log-probabilities under the frozen base, computed once for all users and kept by content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from persona_rlhf.preferences.tokens import Row
from persona_rlhf.training.checkpoint import writing
from persona_rlhf.training.fleet import AdaptedModel


class Reference:
    """`log pi_ref(completion | prompt)` in nats, summed over tokens, of every row it was asked for.

    A row is known by the hash of its token ids, so users who judged the same answers share one value, and `file`
    keeps the values for a resumed run (written whole or not at all). `known` is another one, whose values are taken
    over. Values hold for one base and device only.
    """

    def __init__(self, adapted: AdaptedModel, file: Path | None = None, known: Reference | None = None) -> None:
        self._adapted, self._file = adapted, file
        self._values: dict[bytes, float] = dict(known._values) if known else {}
        self._identity = f"{adapted.base.weights_hash} {adapted.base.model.dtype} {adapted.base.device.type}"
        if file is not None and file.exists():
            self._values |= self._read(file)

    def __getitem__(self, row: Row) -> float:
        return self._values[_key(row)]

    def add(self, rows: Iterable[Row]) -> None:
        """Computes what is not known yet, each distinct row once, in length-sorted passes with the adapters off."""
        missing = {key: row for row in rows if (key := _key(row)) not in self._values}
        if not missing:
            return
        with self._adapted.using(None):
            [scores] = self._adapted.score([list(missing.values())])
        self._values.update(zip(missing, (score.logp for score in scores), strict=True))
        if self._file is not None:
            self._write(self._file)

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


def _key(row: Row) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(np.array([len(row.prompt), *row.prompt, *row.completion], dtype=np.int64).tobytes())
    return digest.digest()
