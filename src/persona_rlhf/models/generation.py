"""Decoding with a KV cache for a whole cohort: one loop writes the answers of all users, greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from persona_rlhf.models.base import Base


def nucleus(
    logits: Float[Tensor, "rows vocabulary"], top_p: Float[Tensor, " rows"]
) -> Float[Tensor, "rows vocabulary"]:
    """The logits with all but the fewest most likely tokens that hold `top_p` (0, 1] of the probability taken out.

    Holtzman et al. 2020, The Curious Case of Neural Text Degeneration, section 3.1. The most likely token always stays.
    """
    ordered, order = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    out = (before >= top_p[:, None]) & (top_p < 1)[:, None]
    out[:, 0] = False
    return logits.masked_fill(torch.zeros_like(out).scatter(1, order, out), -torch.inf)


class Generated(NamedTuple):
    """Token ids of an answer without its end token, and whether the end token came within the limit."""

    ids: tuple[int, ...]
    finished: bool


class DecodeStep(NamedTuple):
    """The rows that are still in the batch, by number, and the next token of each."""

    rows: list[int]
    tokens: list[int]


Choose = Callable[[Float[Tensor, "rows vocabulary"], Sequence[int]], Tensor]
"""A token a row from the logits of the rows of these numbers."""


def decode(
    base: Base,
    users: int,
    prompts: Sequence[tuple[int, ...]],
    choose: Choose,
    done: Sequence[bool],
    leave: Callable[[Sequence[int]], None] | None = None,
) -> Iterator[DecodeStep]:
    """Goes on with user-major prompts (equally many a user) a token a step, under whatever adapters are on.

    Prompts are left-padded and masked. The caller marks the rows that need no more in `done` between the steps; the
    last step is the one after which all are. Rows that are done leave the batch as far as the users keep equally
    many; with `leave`, which is told the places of the users who stay, users who are done leave it too.
    """
    device = base.device
    width = max(map(len, prompts))
    ids = torch.tensor([[base.pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    rows = list(range(len(prompts)))
    cache, step_ids = DynamicCache(config=base.model.config), ids
    while not all(done[row] for row in rows):
        positions = (mask.cumsum(1) - 1).clamp(0, base.context - 1)[:, -step_ids.shape[1] :]
        output = base.model(
            input_ids=step_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        tokens = choose(output.logits[:, -1].float(), rows)
        yield DecodeStep(rows, tokens.tolist())
        step_ids = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        ended, each = [done[row] for row in rows], len(rows) // users
        staying = [u for u in range(users) if leave is None or not all(ended[u * each : (u + 1) * each])]
        kept = _survivors(ended, each, staying)
        if kept and 2 * len(kept) <= len(rows):
            chosen = torch.tensor(kept, device=device)
            step_ids, mask = step_ids[chosen], mask[chosen]
            cache.batch_select_indices(chosen)
            rows = [rows[n] for n in kept]
            if leave is not None and len(staying) < users:
                leave(staying)
                users = len(staying)


def write_answers(
    base: Base,
    users: int,
    prompts: Sequence[tuple[int, ...]],
    seeds: Sequence[int | None],
    max_new_tokens: int,
    temperature: float,
) -> list[Generated]:
    """Answers to user-major prompts (equally many a user) under whatever adapters are on; see `decode`.

    A row with seed None is a filler and counts as done. Sampling draws from each row's own generator. An answer that
    fills the base's context is cut there: some bases know no position beyond it.
    """
    draws = _uniforms(seeds, max_new_tokens) if temperature > 0 else None
    written: list[list[int]] = [[] for _ in prompts]
    finished, done = [False] * len(prompts), [seed is None for seed in seeds]
    steps, ends = 0, base.eos_ids

    def choose(logits: Float[Tensor, "rows vocabulary"], rows: Sequence[int]) -> Tensor:
        if draws is None:
            return logits.argmax(-1)
        return inverse_sample(logits / temperature, draws[list(rows), steps].to(logits.device))

    for step in islice(decode(base, users, prompts, choose, done), max_new_tokens):
        for row, token in zip(step.rows, step.tokens, strict=True):
            if done[row]:
                continue
            finished[row] = token in ends
            if not finished[row]:
                written[row].append(token)
            done[row] = finished[row] or len(prompts[row]) + len(written[row]) >= base.context
        steps += 1
    return [Generated(tuple(own), ended) for own, ended in zip(written, finished, strict=True)]


def _survivors(done: Sequence[bool], each: int, staying: Sequence[int]) -> list[int]:
    """Places to keep, of the users who stay: all that are not done, and as many done ones as make the users equal."""
    runs = [range(user * each, (user + 1) * each) for user in staying]
    most = max((sum(not done[n] for n in run) for run in runs), default=0)
    return [n for run in runs for n in sorted(sorted(run, key=lambda n: done[n])[:most])]


def _uniforms(seeds: Sequence[int | None], steps: int) -> Float[Tensor, "rows steps"]:
    """One stream of uniform numbers a row, from its own seed."""
    streams = [torch.rand(steps, generator=torch.Generator().manual_seed(seed or 0)) for seed in seeds]
    return torch.stack(streams)


def inverse_sample(logits: Float[Tensor, "rows vocabulary"], draws: Float[Tensor, " rows"]) -> Tensor:
    """A token a row by inverting the cumulative distribution at the row's uniform number."""
    cumulative = torch.softmax(logits.double(), dim=-1).cumsum(-1)
    found = torch.searchsorted(cumulative, draws.double()[:, None] * cumulative[:, -1:])
    return found.squeeze(1).clamp(max=logits.shape[-1] - 1)
