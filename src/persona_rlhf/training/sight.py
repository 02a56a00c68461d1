"""What attention sees of packed tokens: which of them ask, and which of them each may look at."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from persona_rlhf.training.lookup import Lookup

_MASK = 1 << 24  # most entries of a mask: rows with longer ones are seen whole


class Part(NamedTuple):
    """Where the `number`-th row lies among all tokens. `turn` counts the earlier rows with the same prompt; the
    completion is without its last token. A stand-in has no answer: it fills the line of a user who has no row."""

    number: int
    user: int
    prompt_at: int
    prompt: int
    turn: int
    completion_at: int
    completion: int
    answer: int


class Sight(NamedTuple):
    """Queries and keys of packed tokens, laid out for one or two causal calls of attention.

    First `prompts`, (lines, length): each once and without its last token; none where length is 0. Then the lines of
    all `rows`: the tokens that predict a completion ask, and see of their row what `seen` tells; where that is None,
    every token asks and sees those before it. `home` takes each token's result out of what the calls give, one behind
    the other. `last` is for a layer of which only those predicting tokens are read: no call for the prompts.
    """

    queries: Lookup
    keys: Lookup
    home: Lookup
    prompts: tuple[int, int]
    rows: int
    seen: Bool[Tensor, "lines 1 queries keys"] | None
    last: Sight | None


def look(parts: Sequence[Part], widths: Sequence[int], device: torch.device, whole: bool) -> Sight:
    """The sight of the parts of users who have `widths` tokens: `whole` rows in one call, or in two where that costs
    less. Two compute a prompt's own attention once for all its rows, but need a mask."""
    keys = max(part.prompt + part.completion for part in parts)
    entries = len(parts) * max(1 + part.completion for part in parts) * keys
    firsts = [part for part in parts if part.turn == 0]
    apart = len(firsts) * _causal(max(part.prompt for part in firsts) - 1) + entries
    if whole or entries > _MASK or apart >= len(parts) * _causal(keys):
        return _whole(parts, widths, device)
    return _apart(parts, firsts, widths, device)._replace(last=_apart(parts, [], widths, device))


def _causal(length: int) -> int:
    """Scores that a causal kernel computes of a row: in blocks of 32 queries (torch on a CPU)."""
    return length * (length + 32) // 2


def _whole(parts: Sequence[Part], widths: Sequence[int], device: torch.device) -> Sight:
    length = max(part.prompt + part.completion for part in parts)
    seen, home = [], []
    for row, part in enumerate(parts):
        at = row * length
        seen += [(part.prompt_at, at, part.prompt, part.turn)]
        seen += [(part.completion_at, at + part.prompt, part.completion, 0)]
        home += [(at + part.prompt, part.completion_at, part.completion, 0)]
        home += [(at, part.prompt_at, part.prompt, 0)] if part.turn == 0 else []
    rows = Lookup(_own_tokens(parts, widths, length), seen, device)
    back = Lookup(_own_results(parts, widths, 0, length), home, device)
    return Sight(rows, rows, back, (0, 0), len(parts), None, None)


def _apart(parts: Sequence[Part], firsts: Sequence[Part], widths: Sequence[int], device: torch.device) -> Sight:
    """`firsts`: the parts whose prompts are attended to by themselves."""
    length = max((part.prompt for part in firsts), default=1) - 1
    asked = max(1 + part.completion for part in parts)
    seen = max(part.prompt + part.completion for part in parts)
    start = len(firsts) * length
    prompts = [(part.prompt_at, line * length, part.prompt - 1, 0) for line, part in enumerate(firsts)]
    queries, keys, home = [*prompts], [*prompts], [(place, source, count, 0) for source, place, count, _ in prompts]
    for row, part in enumerate(parts):
        at, to, last = start + row * asked, start + row * seen, part.prompt - 1
        queries += [(part.prompt_at + last, at, 1, part.turn), (part.completion_at, at + 1, part.completion, 0)]
        keys += [(part.prompt_at, to, last, part.turn + bool(firsts)), (part.prompt_at + last, to + last, 1, part.turn)]
        keys += [(part.completion_at, to + part.prompt, part.completion, 0)]
        home += [(at, part.prompt_at + last, 1, 0)] if part.turn == 0 else []
        home += [(at + 1, part.completion_at, part.completion, 0)]
    before = torch.tensor([part.prompt for part in parts])[:, None, None] + torch.arange(asked)[:, None]
    return Sight(
        Lookup([*_own_tokens(firsts, widths, length), *_own_tokens(parts, widths, asked)], queries, device),
        Lookup([*_own_tokens(firsts, widths, length), *_own_tokens(parts, widths, seen)], keys, device),
        Lookup(_own_results(parts, widths, start, asked), home, device),
        (len(firsts), length),
        len(parts),
        (torch.arange(seen) < before)[:, None].to(device),
        None,
    )


def _own_tokens(parts: Sequence[Part], widths: Sequence[int], length: int) -> list[int]:
    """Padding of each part's line: its user's first token. A neighbour's might not be a number."""
    starts = [0, *accumulate(widths)]
    return [at for part in parts for at in [starts[part.user]] * length]


def _own_results(parts: Sequence[Part], widths: Sequence[int], start: int, length: int) -> list[int]:
    """What a token takes that no result is meant for: one of its user."""
    first: dict[int, int] = {}
    for row, part in enumerate(parts):
        first.setdefault(part.user, start + row * length)
    return [at for user, width in enumerate(widths) for at in [first[user]] * width]
