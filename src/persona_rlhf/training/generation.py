"""Decoding with a KV cache for a whole cohort: one loop writes the answers of all users, greedy or sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from persona_rlhf.training.base import Base


class Generated(NamedTuple):
    """Token ids of an answer without its end token, and whether the end token came within the limit."""

    ids: tuple[int, ...]
    finished: bool


def write_answers(
    base: Base,
    users: int,
    prompts: Sequence[tuple[int, ...]],
    seeds: Sequence[int | None],
    max_new_tokens: int,
    temperature: float,
) -> list[Generated]:
    """Answers to user-major prompts (equally many a user) under whatever adapters are on.

    Prompts are left-padded and masked. Rows that are done leave the batch, as far as the users keep equally many. A
    row with seed None is a filler and counts as done. Sampling draws from each row's own generator. An answer that
    fills the base's context is cut there: some bases know no position beyond it.
    """
    device, ends = base.device, base.eos_ids
    width = max(map(len, prompts))
    ids = torch.tensor([[base.pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    draws = _uniforms(seeds, max_new_tokens) if temperature > 0 else None
    written: list[list[int]] = [[] for _ in prompts]
    finished, done = [False] * len(prompts), [seed is None for seed in seeds]
    rows = list(range(len(prompts)))
    cache, step_ids = DynamicCache(config=base.model.config), ids
    for step in range(max_new_tokens):
        positions = (mask.cumsum(1) - 1).clamp(0, base.context - 1)[:, -step_ids.shape[1] :]
        output = base.model(
            input_ids=step_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1].float()
        if draws is None:
            tokens = logits.argmax(-1)
        else:
            tokens = _inverse_sample(logits / temperature, draws[rows, step].to(device))
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if done[row]:
                continue
            finished[row] = token in ends
            if not finished[row]:
                written[row].append(token)
            done[row] = finished[row] or len(prompts[row]) + len(written[row]) >= base.context
        if all(done[row] for row in rows):
            break
        step_ids = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        kept = _survivors([done[row] for row in rows], users)
        if 2 * len(kept) <= len(rows):
            chosen = torch.tensor(kept, device=device)
            step_ids, mask = step_ids[chosen], mask[chosen]
            cache.batch_select_indices(chosen)
            rows = [rows[n] for n in kept]
    return [Generated(tuple(own), ended) for own, ended in zip(written, finished, strict=True)]


def _survivors(done: Sequence[bool], users: int) -> list[int]:
    """Places to keep: all that are not done, and as many done ones a user as make the users equal."""
    each = len(done) // users
    runs = [range(user * each, (user + 1) * each) for user in range(users)]
    most = max(sum(not done[n] for n in run) for run in runs)
    return [n for run in runs for n in sorted(sorted(run, key=lambda n: done[n])[:most])]


def _uniforms(seeds: Sequence[int | None], steps: int) -> Float[Tensor, "rows steps"]:
    """One stream of uniform numbers a row, from its own seed."""
    streams = [torch.rand(steps, generator=torch.Generator().manual_seed(seed or 0)) for seed in seeds]
    return torch.stack(streams)


def _inverse_sample(logits: Float[Tensor, "rows vocabulary"], draws: Float[Tensor, " rows"]) -> Tensor:
    """A token a row by inverting the cumulative distribution at the row's uniform number."""
    cumulative = torch.softmax(logits.double(), dim=-1).cumsum(-1)
    found = torch.searchsorted(cumulative, draws.double()[:, None] * cumulative[:, -1:])
    return found.squeeze(1).clamp(max=logits.shape[-1] - 1)
