"""Token rows laid out for one forward pass, with the positions that predict a completion picked out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from persona_rlhf.preferences.tokens import Row
from persona_rlhf.training.lookup import Lookup

EMPTY = Row((), ())
"""A row that fills a place: no completion, so it has no loss and no gradient."""


class Sight(NamedTuple):
    """What attention sees of packed tokens: `rows` lays them out as `lines` rows of `length`, `home` takes each token's
    result from the first row that it stands in."""

    rows: Lookup
    home: Lookup
    lines: int
    length: int


class Place(NamedTuple):
    """Where a row stands among the tokens of a batch, all lines in a row: first token of its prompt and of its
    completion. `is_first`: no earlier row shares this prompt's tokens."""

    row: Row
    prompt: int
    completion: int
    is_first: bool


class Batch(NamedTuple):
    """Rows of token ids; `source` reads the positions whose next token, `targets`, belongs to a completion.

    There is no attention mask: under causal attention a token never sees what lies to its right. `place` is where each
    completion token stands in the `[rows, longest completion]` grid. A completion's last token is no input: nothing is
    predicted from it. `positions` and `sight` are None where a line of `ids` is one row.
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
            places.append(Place(row, number * width, number * width + len(row.prompt), True))
        start += len(row.completion)
    source = Lookup([0] * start, runs, device)
    return Batch(torch.tensor(ids).to(device), None, None, source, *_answers(rows, device), places)


class _Part(NamedTuple):
    """A row in its user's line, in tokens. `turn` counts the earlier rows with the same prompt; the completion is
    without its last token. A stand-in has no answer: it fills the line of a user who has no row."""

    user: int
    prompt_at: int
    prompt: int
    turn: int
    completion_at: int
    completion: int
    answer: int


def pack(rows: Sequence[Row], users: int, pad: int, device: torch.device) -> Batch:
    """One line a user: his rows behind one another, each prompt once. `rows` are user-major, equally many a user.

    All but attention looks at tokens one by one and need not know whose row a token is in. So nothing is spent on
    padding but what evens the lines out, nor twice on a prompt that several rows share (Wang & Hegde 2024,
    "Accelerating direct preference optimization with prefix sharing"; here attention reads whole rows, without a mask).
    """
    lines, positions, parts = _lines(rows, users, pad)
    width = max(map(len, lines))
    length = max(part.prompt + part.completion for part in parts)
    seen, home, read, places, start = [], [], [], [], 0
    answered = (row for row in rows if row.completion)
    rows_fill, home_fill = [0] * (len(parts) * length), [0] * (users * width)
    for number, part in enumerate(parts):
        line, row = part.user * width, number * length
        prompt, completion = line + part.prompt_at, line + part.completion_at
        seen += [(prompt, row, part.prompt, part.turn), (completion, row + part.prompt, part.completion, 0)]
        home.append((row + part.prompt, completion, part.completion, 0))
        # Padding is a copy of the user's own first token: a neighbour's might not be a number.
        rows_fill[row : row + length] = [line] * length
        if part.turn == 0:
            home.append((row, prompt, part.prompt, 0))
            if part.prompt_at == 0:
                home_fill[line : line + width] = [row] * width
        if part.answer:
            read += [(prompt + part.prompt - 1, start, 1, part.turn), (completion, start + 1, part.completion, 0)]
            places.append(Place(next(answered), prompt, completion, part.turn == 0))
            start += part.answer
    return Batch(
        torch.tensor([line + [pad] * (width - len(line)) for line in lines]).to(device),
        torch.tensor([own + [0] * (width - len(own)) for own in positions]).to(device),
        Sight(Lookup(rows_fill, seen, device), Lookup(home_fill, home, device), len(parts), length),
        Lookup([0] * start, read, device),
        *_answers(rows, device),
        places,
    )


def _lines(rows: Sequence[Row], users: int, pad: int) -> tuple[list[list[int]], list[list[int]], list[_Part]]:
    """Each user's tokens and their positions in their rows, and where in them each row lies."""
    lines: list[list[int]] = [[] for _ in range(users)]
    positions: list[list[int]] = [[] for _ in range(users)]
    parts = []
    each = len(rows) // users
    for user, (line, counted) in enumerate(zip(lines, positions, strict=True)):
        prompts: dict[tuple[int, ...], tuple[int, int]] = {}
        for prompt, completion in rows[user * each : (user + 1) * each]:
            if not completion:
                continue
            assert prompt, "a completion needs a prompt token to be predicted from"
            at, turn = prompts.get(prompt, (len(line), 0))
            prompts[prompt] = (at, turn + 1)
            if turn == 0:
                line += prompt
                counted += range(len(prompt))
            fed = len(completion) - 1
            parts.append(_Part(user, at, len(prompt), turn, len(line), fed, len(completion)))
            line += completion[:fed]
            counted += range(len(prompt), len(prompt) + fed)
        if not line:
            parts.append(_Part(user, 0, 1, 0, 1, 0, 0))
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
