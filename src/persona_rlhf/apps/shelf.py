"""Adapters in memory: loaded when they are asked for, the least used put away when the room is full."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from persona_rlhf.apps.admitted import Admitted
from persona_rlhf.release.peft_folder import read_adapter
from persona_rlhf.training.lora import LayerSpan


class Shelf:
    """The adapters of the users who are admitted, within a budget in bytes.

    One that is being written with stays alive with its request; the newest is kept, however small the budget.
    """

    def __init__(self, admitted: Admitted, spans: Sequence[LayerSpan], budget: int) -> None:
        self._admitted, self._spans, self._budget = admitted, list(spans), budget
        self._held: OrderedDict[str, Float[Tensor, " params"]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, slug: str) -> Float[Tensor, " params"]:
        """The adapter of a user. Raises Declined where it may not be served: one that was loaded goes too."""
        with self._lock:
            try:
                return self._get(slug)
            except Exception:
                self._held.pop(slug, None)
                raise

    def _get(self, slug: str) -> Float[Tensor, " params"]:
        if slug in self._held:
            self._admitted.check(slug)
        else:
            self._admitted.check(slug, again=True)
            self._held[slug] = read_adapter(self._admitted.folder(slug), self._spans)
            self._admitted.check(slug, again=True)  # what was read is what was checked, before and after
        self._held.move_to_end(slug)
        while self.bytes > self._budget and len(self._held) > 1:
            self._held.popitem(last=False)
        return self._held[slug]

    @property
    def bytes(self) -> int:
        """Bytes of the adapters that are held."""
        return sum(flat.nbytes for flat in self._held.values())

    @property
    def slugs(self) -> list[str]:
        """Whose adapters are held, the least lately used first."""
        return list(self._held)
