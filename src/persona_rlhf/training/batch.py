"""Token rows laid out for one forward pass, with the positions that predict a completion picked out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from persona_rlhf.preferences.tokens import Row
from persona_rlhf.training.lookup import Lookup
from persona_rlhf.training.sight import Part, Sight, look

EMPTY = Row((), ())
"""A row that fills a place: no completion, so it has no loss and no gradient."""


class Place(NamedTuple):
    """Where a row, the `number`-th, stands among the tokens of a batch, all lines in a row: first token of its prompt
    and of its completion. `is_first`: no earlier row shares this prompt's tokens."""

    row: Row
    number: int
    prompt: int
    completion: int
    is_first: bool


class Batch(NamedTuple):
    """Rows of token ids; `source` reads the positions whose next token, `targets`, belongs to a completion.

    There is no attention mask: under causal attention a token never sees what lies to its right. `place` is where each
    completion token stands in the `[rows, longest completion]` grid. A completion's last token is no input: nothing is
    predicted from it. `positions` and `sight` are None where a line of `ids` is one row. `shares`: how many tokens each
    user has in the one line of all; None where users have equally many lines.
    """

    ids: Int[Tensor, "lines width"]
    positions: Int[Tensor, "lines width"] | None
    sight: Sight | None
    source: Lookup
    targets: Int[Tensor, " tokens"]
    place: Int[Tensor, " tokens"]
    rows: int
    longest: int
    places: list[Place]
    shares: list[int] | None

    def read(self, users: int) -> list[int]:
        """How many completion tokens each of the users has."""
        each, counts = self.rows // users, [0] * users
        for row, number, *_ in self.places:
            counts[number // each] += len(row.completion)
        return counts

    def spread(self, values: Float[Tensor, " tokens"]) -> Float[Tensor, "rows longest"]:
        """Values of the completion tokens as one row each, zero where a completion is shorter."""
        grid = values.new_zeros(self.rows * self.longest)
        return grid.index_copy(0, self.place, values).view(self.rows, self.longest)


def collate(rows: Sequence[Row], pad: int, device: torch.device) -> Batch:
    """One line a row, right-padded; an empty row becomes a single padding token."""
    width = max(1, *(len(row.prompt) + len(row.completion) - 1 for row in rows))
    ids, runs, places, start = [], [], [], 0
    for number, row in enumerate(rows):
        assert row.prompt or not row.completion, "a completion needs a prompt token to be predicted from"
        line = [*row.prompt, *row.completion[:-1]] if row.completion else []
        ids.append(line + [pad] * (width - len(line)))
        runs.append((number * width + len(row.prompt) - 1, start, len(row.completion), 0))
        if row.completion:
            places.append(Place(row, number, number * width, number * width + len(row.prompt), True))
        start += len(row.completion)
    source = Lookup(len(rows) * width, [(0, start)], runs, device)
    return Batch(torch.tensor(ids).to(device), None, None, source, *_answers(rows, device), places, None)


def pack(rows: Sequence[Row], users: int, pad: int, device: torch.device, even: bool = True) -> Batch:
    """One line a user: his rows behind one another, each prompt once. `rows` are user-major, equally many a user.

    All but attention looks at tokens one by one and need not know whose row a token is in. So nothing is spent on
    padding but what makes lines `even` (else they are one), nor twice on a prompt that rows share (Wang & Hegde 2024,
    "Accelerating direct preference optimization with prefix sharing"; see `sight.look`).
    """
    lines, positions, parts = _lines(rows, users, pad)
    width = max(map(len, lines))
    widths = [width] * users if even else [len(line) for line in lines]
    starts = [0, *accumulate(widths)]
    parts = [
        part._replace(prompt_at=start + part.prompt_at, completion_at=start + part.completion_at)
        for part in parts
        for start in [starts[part.user]]
    ]
    read, places, start = [], [], 0
    for part in parts:
        if part.answer:
            read += [(part.prompt_at + part.prompt - 1, start, 1, part.turn)]
            read += [(part.completion_at, start + 1, part.completion, 0)]
            places.append(Place(rows[part.number], part.number, part.prompt_at, part.completion_at, part.turn == 0))
            start += part.answer
    ids = [line + [pad] * (width - len(line)) for line, width in zip(lines, widths, strict=True)]
    placed = [own + [0] * (width - len(own)) for own, width in zip(positions, widths, strict=True)]
    return Batch(
        torch.tensor(ids if even else [list(chain(*ids))]).to(device),
        torch.tensor(placed if even else [list(chain(*placed))]).to(device),
        look(parts, widths, device, one_call=even),
        Lookup(sum(widths), [(0, start)], read, device),
        *_answers(rows, device),
        places,
        None if even else widths,
    )


def _lines(rows: Sequence[Row], users: int, pad: int) -> tuple[list[list[int]], list[list[int]], list[Part]]:
    """Each user's tokens and their positions in their rows, and where in them each row lies."""
    lines: list[list[int]] = [[] for _ in range(users)]
    positions: list[list[int]] = [[] for _ in range(users)]
    parts = []
    each = len(rows) // users
    for user, (line, counted) in enumerate(zip(lines, positions, strict=True)):
        prompts: dict[tuple[int, ...], tuple[int, int]] = {}
        for number in range(user * each, (user + 1) * each):
            prompt, completion = rows[number]
            if not completion:
                continue
            assert prompt, "a completion needs a prompt token to be predicted from"
            at, turn = prompts.get(prompt, (len(line), 0))
            prompts[prompt] = (at, turn + 1)
            if turn == 0:
                line += prompt
                counted += range(len(prompt))
            fed = len(completion) - 1
            parts.append(Part(number, user, at, len(prompt), turn, len(line), fed, len(completion)))
            line += completion[:fed]
            counted += range(len(prompt), len(prompt) + fed)
        if not line:
            parts.append(Part(user * each, user, 0, 1, 0, 1, 0, 0))
            line.append(pad)
            counted.append(0)
    return lines, positions, parts


def _answers(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """The tokens of all completions, their places in the grid, and its size."""
    longest = max(1, *(len(row.completion) for row in rows))
    targets = [token for row in rows for token in row.completion]
    place = [n * longest + m for n, row in enumerate(rows) for m in range(len(row.completion))]
    columns = [torch.tensor(column, dtype=torch.int64).to(device) for column in (targets, place)]
    return columns[0], columns[1], len(rows), longest
