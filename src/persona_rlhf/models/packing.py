"""Token rows as one batch: packed with shared prompts or one row per line, with the layout of attention calls."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.device import to_device
from persona_rlhf.models.gather import DeterministicGather, GatherRun

EMPTY = Row((), ())
"""A row without tokens. It pads a user's list of rows and has neither loss nor gradient."""


_ROWS_PER_CALL = 8  # rows of like length share an attention call; a call costs little on a CPU
_LEAST_SHARED = 8  # tokens of a prefix that is worth a run of its own; chat templates with a system prompt have more
_MAX_MASK = 1 << 22  # most entries of a call's mask; longer rows are attended whole


class SharedPrefix(NamedTuple):
    """The first `length` tokens of a user's prompts, those of the chat template, which lie in the batch once.

    `repeat` counts the earlier rows of the user.
    """

    start: int
    length: int
    repeat: int


class PackedRow(NamedTuple):
    """Position of the `number`-th row among all tokens; starts are token positions, lengths are in tokens.

    `prompt_start` is the place of the first prompt token that the prefix leaves; `prompt_length` counts the prefix too.
    A completion's last token is no input, so `completion_length` leaves it out; `target_length` has it. `repeat` counts
    the earlier rows that share the prompt. A user without rows has one placeholder with no targets.
    """

    number: int
    user: int
    prefix: SharedPrefix
    prompt_start: int
    prompt_length: int
    repeat: int
    completion_start: int
    completion_length: int
    target_length: int

    @property
    def length(self) -> int:
        """Input tokens of the row."""
        return self.prompt_length + self.completion_length

    def runs(self, begin: int) -> list[GatherRun]:
        """The row's tokens from its `begin`-th on as runs, placed from 0 on."""
        shared = self.prefix.length
        prefix = GatherRun(self.prefix.start + begin, 0, shared - begin, self.prefix.repeat)
        left = max(0, begin - shared)  # tokens of the prompt after the prefix that are left out
        place = max(0, shared - begin)
        prompt = GatherRun(self.prompt_start + left, place, self.prompt_length - shared - left, self.repeat)
        completion = GatherRun(self.completion_start, self.prompt_length - begin, self.completion_length, 0)
        return [run for run in (prefix, prompt, completion) if run.length > 0]


class AttentionCall(NamedTuple):
    """One attention call over `lines` of `queries` query tokens and `keys` key tokens.

    `mask` is added to the scores: 0 for visible keys, else -inf. Its leading dimensions are the lines. Without a mask
    the call is causal, and queries and keys are the same tokens.
    """

    lines: int
    queries: int
    keys: int
    mask: Float[Tensor, "*lines queries keys"] | None


class AttentionLayout(NamedTuple):
    """Query tokens, key tokens and masks of the attention calls over packed rows.

    queries, keys: gather the tokens of all calls, one call behind the other
    outputs: gathers each token's output from the calls' outputs
    """

    queries: DeterministicGather
    keys: DeterministicGather
    outputs: DeterministicGather
    calls: list[AttentionCall]


def attention_layout(rows: Sequence[PackedRow], widths: Sequence[int], one_call: bool) -> AttentionLayout:
    """Layout of the attention over packed rows; `widths` are the tokens of each user's line.

    With `one_call` all rows are attended whole in one call. Otherwise rows of like length share a call. Where that
    costs less, only the first row of each prompt is attended whole. The queries of the other rows are the tokens that
    predict their completion, under a mask.
    """
    if one_call:
        return _build_layout([list(rows)], [], widths)
    groups = _group_by_length(rows)
    first, repeated = (_group_by_length([row for row in rows if (row.repeat == 0) == new]) for new in (True, False))
    masked = [_masked_scores(group) for group in groups]
    cost = sum(map(_causal_scores, first)) + sum(map(_masked_scores, repeated))
    if max(masked) > _MAX_MASK or cost >= sum(map(_causal_scores, groups)):
        return _build_layout(groups, [], widths)
    return _build_layout(first, repeated, widths)


def _group_by_length(rows: Sequence[PackedRow]) -> list[list[PackedRow]]:
    """Groups of rows of like length, the longest first."""
    ordered = sorted(rows, key=lambda row: row.length, reverse=True)
    return [ordered[n : n + _ROWS_PER_CALL] for n in range(0, len(ordered), _ROWS_PER_CALL)]


def _causal_scores(rows: Sequence[PackedRow]) -> int:
    """Scores that a causal kernel computes for rows, in blocks of 32 queries (torch on a CPU)."""
    length = rows[0].length
    return len(rows) * length * (length + 32) // 2


def _masked_scores(rows: Sequence[PackedRow]) -> int:
    """Scores of rows whose queries are the predicting tokens."""
    return len(rows) * max(1 + row.completion_length for row in rows) * rows[0].length


def _build_layout(
    causal: Sequence[Sequence[PackedRow]],
    predicting: Sequence[Sequence[PackedRow]],
    widths: Sequence[int],
) -> AttentionLayout:
    """One call per group: over whole rows (`causal`), or with the predicting tokens as queries (`predicting`)."""
    calls, queries, keys, outputs = list[AttentionCall](), _Lines(widths), _Lines(widths), list[GatherRun]()
    first_output: dict[int, int] = {}
    for groups in (causal, predicting):
        for rows in groups:
            begins = [row.prompt_length - 1 if groups is predicting else 0 for row in rows]
            query_count = max(row.length - begin for row, begin in zip(rows, begins, strict=True))
            key_count = max(row.length for row in rows)
            for row, begin in zip(rows, begins, strict=True):
                runs = row.runs(begin)
                start = queries.add(row.user, query_count, runs)
                keys.add(row.user, key_count, row.runs(0))
                owned = [run for run in runs if run.repeat == 0]
                outputs += [GatherRun(start + run.place, run.source, run.length, 0) for run in owned]
                first_output.setdefault(row.user, start)
            mask = _causal_mask(begins, query_count, key_count) if groups is predicting else None
            calls.append(AttentionCall(len(rows), query_count, key_count, mask))
    # Tokens without an output of their own take one of the same user's.
    fill = [(first_output[user], width) for user, width in enumerate(widths)]
    gather = DeterministicGather.of(queries.places, fill, outputs)
    return AttentionLayout(queries.gather(), keys.gather(), gather, calls)


def _causal_mask(begins: Sequence[int], queries: int, keys: int) -> Float[Tensor, "lines 1 queries keys"]:
    """Mask of lines whose first query is the `begins`-th token of its row."""
    hidden = torch.arange(keys) > torch.tensor(begins)[:, None, None, None] + torch.arange(queries)[:, None]
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


class _Lines:
    """Tokens in padded lines. Padding copies the user's own first token: another user's might be NaN."""

    def __init__(self, widths: Sequence[int]) -> None:
        self._starts = [0, *accumulate(widths)]
        self._fill: list[tuple[int, int]] = []
        self.places = 0
        self._runs: list[GatherRun] = []

    def add(self, user: int, length: int, runs: Sequence[GatherRun]) -> int:
        """Adds a line of `length` places with the runs of a row; returns its first place."""
        start = self.places
        self._fill.append((self._starts[user], length))
        self.places += length
        self._runs += [run._replace(place=start + run.place) for run in runs]
        return start

    def gather(self) -> DeterministicGather:
        """The gather of all lines from the packed tokens."""
        return DeterministicGather.of(self._starts[-1], self._fill, self._runs)


class RowPlace(NamedTuple):
    """Token positions of the `number`-th row in a batch: of its prompt and of its completion.

    prefix: the first tokens of the prompt, shared by the user's rows; the rest begins at `prompt_start`
    owns_prompt: no earlier row shares the rest of the prompt
    """

    row: Row
    number: int
    prefix: SharedPrefix
    prompt_start: int
    completion_start: int
    owns_prompt: bool

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Start and length of the row's input tokens, in their order: shared ones, the prompt's others, completion."""
        rest, fed = len(self.row.prompt) - self.prefix.length, len(self.row.completion) - 1
        return [(self.prefix.start, self.prefix.length), (self.prompt_start, rest), (self.completion_start, fed)]


class Batch(NamedTuple):
    """Token rows as the input of one forward pass, with the positions that predict completion tokens.

    There is no padding mask: under causal attention no token reads what is to its right.

    position_ids, layout: None where a line of `input_ids` is one row
    predictors: gathers the positions whose next token is a completion token; `targets` are those tokens
    grid_index: place of each completion token in the flattened grid `[row_count, longest]`
    longest: tokens of the longest completion
    tokens_per_user: tokens of each user in the single line; None where users have equally many lines
    """

    input_ids: Int[Tensor, "lines width"]
    position_ids: Int[Tensor, "lines width"] | None
    layout: AttentionLayout | None
    predictors: DeterministicGather
    targets: Int[Tensor, " tokens"]
    grid_index: Int[Tensor, " tokens"]
    row_count: int
    longest: int
    row_places: list[RowPlace]
    tokens_per_user: list[int] | None

    def on(self, device: torch.device) -> Batch:
        """The batch on another device, in one copy for each type of its tensors."""
        moved = to_device(self._replace(row_places=[], tokens_per_user=None), device)
        return moved._replace(row_places=self.row_places, tokens_per_user=self.tokens_per_user)

    def targets_per_user(self, users: int) -> list[int]:
        """Number of completion tokens of each user."""
        rows_per_user, counts = self.row_count // users, [0] * users
        for place in self.row_places:
            counts[place.number // rows_per_user] += len(place.row.completion)
        return counts

    def to_grid(self, values: Float[Tensor, " tokens"]) -> Float[Tensor, "rows longest"]:
        """Values of the completion tokens, one row per completion, padded with zeros."""
        grid = values.new_zeros(self.row_count * self.longest)
        return grid.index_copy(0, self.grid_index, values).view(self.row_count, self.longest)


def collate(rows: Sequence[Row], pad: int, device: torch.device) -> Batch:
    """A batch with one row per line, padded on the right. An empty row becomes one padding token."""
    width = max(1, *(len(row.prompt) + len(row.completion) - 1 for row in rows))
    ids, runs, places, targets = list[list[int]](), list[GatherRun](), list[RowPlace](), 0
    for number, row in enumerate(rows):
        assert row.prompt or not row.completion, "a completion needs a prompt token to be predicted from"
        line = [*row.prompt, *row.completion[:-1]] if row.completion else []
        ids.append(line + [pad] * (width - len(line)))
        runs.append(GatherRun(number * width + len(row.prompt) - 1, targets, len(row.completion), 0))
        if row.completion:
            start = number * width
            places.append(RowPlace(row, number, SharedPrefix(start, 0, 0), start, start + len(row.prompt), True))
        targets += len(row.completion)
    predictors = DeterministicGather.of(len(rows) * width, [(0, targets)], runs)
    return Batch(torch.tensor(ids), None, None, predictors, *_targets(rows), places, None).on(device)


def pack(rows: Sequence[Row], users: int, pad: int, device: torch.device, equal_lines: bool = True) -> Batch:
    """A batch with one line per user: the user's rows behind one another, each prompt once.

    `rows` are user-major, equally many per user. With `equal_lines` the lines are padded to the longest; without, all
    users share one line and nothing is padded. All layers but attention treat tokens one by one, so a shared prompt is
    computed once (Wang & Hegde 2024, "Accelerating direct preference optimization with prefix sharing"), and so are the
    first tokens that all prompts of a user share.
    """
    lines, positions, packed = _pack_lines(rows, users, pad)
    longest = max(map(len, lines))
    widths = [longest] * users if equal_lines else [len(line) for line in lines]
    starts = [0, *accumulate(widths)]
    packed = [
        row._replace(
            prefix=row.prefix._replace(start=start + row.prefix.start),
            prompt_start=start + row.prompt_start,
            completion_start=start + row.completion_start,
        )
        for row in packed
        for start in [starts[row.user]]
    ]
    runs, places, targets = list[GatherRun](), list[RowPlace](), 0
    for row in packed:
        if row.target_length:
            last, begins = row.prompt_start + row.prompt_length - row.prefix.length - 1, row.completion_start
            runs += [GatherRun(last, targets, 1, row.repeat), GatherRun(begins, targets + 1, row.completion_length, 0)]
            places.append(RowPlace(rows[row.number], row.number, row.prefix, row.prompt_start, begins, row.repeat == 0))
            targets += row.target_length
    ids = [line + [pad] * (width - len(line)) for line, width in zip(lines, widths, strict=True)]
    padded = [line + [0] * (width - len(line)) for line, width in zip(positions, widths, strict=True)]
    return Batch(
        torch.tensor(ids if equal_lines else [list(chain(*ids))]),
        torch.tensor(padded if equal_lines else [list(chain(*padded))]),
        attention_layout(packed, widths, one_call=equal_lines),
        DeterministicGather.of(sum(widths), [(0, targets)], runs),
        *_targets(rows),
        places,
        None if equal_lines else widths,
    ).on(device)


def _pack_lines(rows: Sequence[Row], users: int, pad: int) -> tuple[list[list[int]], list[list[int]], list[PackedRow]]:
    """Token ids and position ids of each user's line, and the rows' places within it."""
    ids: list[list[int]] = [[] for _ in range(users)]
    positions: list[list[int]] = [[] for _ in range(users)]
    packed = []
    rows_per_user = len(rows) // users
    for user, (user_ids, user_positions) in enumerate(zip(ids, positions, strict=True)):
        prompts: dict[tuple[int, ...], tuple[int, int]] = {}
        numbers = range(user * rows_per_user, (user + 1) * rows_per_user)
        shared = _shared_length({rows[number].prompt for number in numbers if rows[number].completion})
        count = 0
        for number in numbers:
            prompt, completion = rows[number]
            if not completion:
                continue
            assert prompt, "a completion needs a prompt token to be predicted from"
            if not user_ids:
                user_ids += prompt[:shared]
                user_positions += range(shared)
            start, repeat = prompts.get(prompt, (len(user_ids), 0))
            prompts[prompt] = (start, repeat + 1)
            if repeat == 0:
                user_ids += prompt[shared:]
                user_positions += range(shared, len(prompt))
            fed, prefix = len(completion) - 1, SharedPrefix(0, shared, count)
            lengths = (len(prompt), repeat, len(user_ids), fed, len(completion))
            packed.append(PackedRow(number, user, prefix, start, *lengths))
            count += 1
            user_ids += completion[:fed]
            user_positions += range(len(prompt), len(prompt) + fed)
        if not user_ids:
            packed.append(PackedRow(user * rows_per_user, user, SharedPrefix(0, 0, 0), 0, 1, 0, 1, 0, 0))
            user_ids.append(pad)
            user_positions.append(0)
    return ids, positions, packed


def _shared_length(prompts: Collection[tuple[int, ...]]) -> int:
    """Tokens that all of several prompts begin with; 0 where they are too few to pay for a run of their own."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # all others lie between them
    most = min(map(len, prompts)) - 1  # the last token of a prompt predicts, and is no part of it
    unlike = (n for n, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    shared = min(next(unlike, most), most)
    return shared if shared >= _LEAST_SHARED else 0


def _targets(rows: Sequence[Row]) -> tuple[Tensor, Tensor, int, int]:
    """`targets`, `grid_index`, `row_count` and `longest` of a batch."""
    longest = max(1, *(len(row.completion) for row in rows))
    targets = [token for row in rows for token in row.completion]
    index = [n * longest + m for n, row in enumerate(rows) for m in range(len(row.completion))]
    columns = [torch.tensor(column, dtype=torch.int64) for column in (targets, index)]
    return columns[0], columns[1], len(rows), longest
