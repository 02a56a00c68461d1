"""Token rows laid out for one forward pass: right-padded, with the positions that predict a completion picked out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from persona_rlhf.preferences.tokens import Row

EMPTY = Row((), ())
"""A row that fills a place: no completion, so it has no loss and no gradient."""


class Batch(NamedTuple):
    """Rows of token ids; `source` are the flat positions whose next token, `targets`, belongs to a completion.

    There is no attention mask: under causal attention a token never sees the padding to its right, so the real
    positions are exact. `place` is where each completion token stands in the `[rows, longest completion]` grid.
    """

    ids: Int[Tensor, "rows length"]
    source: Int[Tensor, " tokens"]
    targets: Int[Tensor, " tokens"]
    place: Int[Tensor, " tokens"]
    longest: int

    def spread(self, values: Float[Tensor, " tokens"]) -> Float[Tensor, "rows longest"]:
        """Values of the completion tokens as one row each, zero where a completion is shorter."""
        grid = values.new_zeros(self.ids.shape[0] * self.longest)
        return grid.index_copy(0, self.place, values).view(-1, self.longest)


def collate(rows: Sequence[Row], pad: int, device: torch.device) -> Batch:
    """Lays rows out in their order; an empty row becomes a single padding token."""
    length = max(1, *(len(row.prompt) + len(row.completion) for row in rows))
    longest = max(1, *(len(row.completion) for row in rows))
    ids, source, targets, place = [], [], [], []
    for number, (prompt, completion) in enumerate(rows):
        assert prompt or not completion, "a completion needs a prompt token to be predicted from"
        ids.append([*prompt, *completion, *[pad] * (length - len(prompt) - len(completion))])
        first = number * length + len(prompt) - 1
        source.extend(range(first, first + len(completion)))
        targets.extend(completion)
        place.extend(range(number * longest, number * longest + len(completion)))
    place_on = {"dtype": torch.int64, "device": device}
    return Batch(
        torch.tensor(ids, **place_on),  # type: ignore[call-overload]
        torch.tensor(source, **place_on),  # type: ignore[call-overload]
        torch.tensor(targets, **place_on),  # type: ignore[call-overload]
        torch.tensor(place, **place_on),  # type: ignore[call-overload]
        longest,
    )
