"""Batched decoding with a KV cache, greedy or sampled: one loop for the prompts of all users."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from persona_rlhf.models.base import Base
from persona_rlhf.models.device import to_device
from persona_rlhf.models.model_split import max_row_length


def nucleus(
    logits: Float[Tensor, "rows vocabulary"], top_p: Float[Tensor, " rows"]
) -> Float[Tensor, "rows vocabulary"]:
    """Logits of the nucleus: the fewest most likely tokens with `top_p` (0, 1] of the probability; others become -inf.

    Holtzman et al. 2020, The Curious Case of Neural Text Degeneration, section 3.1. The most likely token always stays.
    """
    ordered, order = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    excluded = (before >= top_p[:, None]) & (top_p < 1)[:, None]
    excluded[:, 0] = False
    return logits.masked_fill(torch.zeros_like(excluded).scatter(1, order, excluded), -torch.inf)


class Generated(NamedTuple):
    """An answer: its token ids without the end token, and whether the end token came within the limit."""

    ids: tuple[int, ...]
    finished: bool


_BLOCK = 8
"""Tokens a row that a GPU decodes before the host reads them; up to seven after the end of an answer are dropped."""


def _attends_whole_rows(base: Base) -> bool:
    """Whether a mask of our own holds in every layer of a base on a GPU, by its kernels: there are no windows."""
    config = base.model.config.get_text_config()
    torch_attention = config._attn_implementation == "sdpa"
    return base.device.type == "cuda" and torch_attention and max_row_length(config) == math.inf


class DecodeStep(NamedTuple):
    """One decoding step: numbers of the rows still in the batch, and each one's next token."""

    rows: list[int]
    tokens: list[int]


Choose = Callable[[Float[Tensor, "rows vocabulary"], Sequence[int]], Tensor]
"""Picks one token per row, given the logits and the numbers of the rows."""


def decode(
    base: Base,
    users: int,
    prompts: Sequence[tuple[int, ...]],
    choose: Choose,
    done: Sequence[bool],
    keep_users: Callable[[Sequence[int]], None] | None = None,
    block: int = 1,
) -> Iterator[DecodeStep]:
    """Continues user-major prompts (equally many per user) by one token per step, with the adapters that are on.

    Prompts are left-padded and masked. Between steps the caller marks finished rows in `done`; decoding ends when all
    are. Finished rows leave the batch while the users keep equally many. With `keep_users`, finished users leave it
    too: it is called with the positions of the users that stay.

    Tokens are read from the device after every `block` steps, and come to the caller then.
    """
    device = base.device
    width = max(map(len, prompts))
    ids = torch.tensor([[base.pad_id] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    step_ids, mask = to_device([ids, mask], device)
    rows = list(range(len(prompts)))
    cache, whole = DynamicCache(config=base.model.config), _attends_whole_rows(base)
    while not all(done[row] for row in rows):
        chosen_tokens = []
        for _ in range(block):
            # A mask of four dimensions is used as it is; for one of two the model asks whether any row is padded.
            seen = mask[:, None, None, :].bool() if whole and step_ids.shape[1] == 1 else mask
            output = base.model(
                input_ids=step_ids,
                attention_mask=seen,
                position_ids=(mask.cumsum(1) - 1).clamp(0, base.context - 1)[:, -step_ids.shape[1] :],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            tokens = choose(output.logits[:, -1].float(), rows)
            chosen_tokens.append(tokens)
            step_ids = tokens[:, None]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        for of_step in torch.stack(chosen_tokens).tolist():
            yield DecodeStep(rows, of_step)
        ended, per_user = [done[row] for row in rows], len(rows) // users
        staying = [
            user
            for user in range(users)
            if keep_users is None or not all(ended[user * per_user : (user + 1) * per_user])
        ]
        kept = _rows_to_keep(ended, per_user, staying)
        if kept and 2 * len(kept) <= len(rows):
            chosen = torch.tensor(kept, device=device)
            step_ids, mask = step_ids[chosen], mask[chosen]
            cache.batch_select_indices(chosen)
            rows = [rows[n] for n in kept]
            if keep_users is not None and len(staying) < users:
                keep_users(staying)
                users = len(staying)


def generate_answers(
    base: Base,
    users: int,
    prompts: Sequence[tuple[int, ...]],
    seeds: Sequence[int | None],
    max_new_tokens: int,
    temperature: float,
    on_step: Callable[[], None] = lambda: None,
) -> list[Generated]:
    """Answers to user-major prompts (equally many per user) with the adapters that are on; see `decode`.

    A row with seed None is padding and counts as finished. Sampling draws from one generator per row. An answer ends
    where it fills the base's context, since some bases have no position embeddings beyond it. `on_step` is called after
    every token.
    """
    draws = _uniforms(seeds, max_new_tokens) if temperature > 0 else None
    answers: list[list[int]] = [[] for _ in prompts]
    finished, done = [False] * len(prompts), [seed is None for seed in seeds]
    steps, ends, block = 0, base.eos_ids, 1 if base.device.type == "cpu" else min(_BLOCK, max_new_tokens)
    current: tuple[Sequence[int], Tensor] | None = None

    def choose(logits: Float[Tensor, "rows vocabulary"], rows: Sequence[int]) -> Tensor:
        nonlocal steps, current
        steps += 1
        if draws is None:
            return logits.argmax(-1)
        if current is None or current[0] is not rows:  # the draws of these rows, on the device until rows leave
            current = (rows, to_device([draws[list(rows)]], logits.device)[0])
        return inverse_sample(logits / temperature, current[1][:, min(steps, max_new_tokens) - 1])

    for step in islice(decode(base, users, prompts, choose, done, block=block), max_new_tokens):
        for row, token in zip(step.rows, step.tokens, strict=True):
            if done[row]:
                continue
            finished[row] = token in ends
            if not finished[row]:
                answers[row].append(token)
            done[row] = finished[row] or len(prompts[row]) + len(answers[row]) >= base.context
        on_step()
    return [Generated(tuple(ids), ended) for ids, ended in zip(answers, finished, strict=True)]


def _rows_to_keep(done: Sequence[bool], per_user: int, users: Sequence[int]) -> list[int]:
    """Rows of these users that stay: all unfinished ones, and finished ones to keep equally many per user."""
    blocks = [range(user * per_user, (user + 1) * per_user) for user in users]
    most = max((sum(not done[n] for n in block) for block in blocks), default=0)
    return [n for block in blocks for n in sorted(sorted(block, key=lambda n: done[n])[:most])]


def _uniforms(seeds: Sequence[int | None], steps: int) -> Float[Tensor, "rows steps"]:
    """Uniform random numbers, one stream per row from its own seed."""
    streams = [torch.rand(steps, generator=torch.Generator().manual_seed(seed or 0)) for seed in seeds]
    return torch.stack(streams)


def inverse_sample(logits: Float[Tensor, "rows vocabulary"], draws: Float[Tensor, " rows"]) -> Tensor:
    """One token per row: the inverse of the cumulative distribution at the row's uniform number."""
    cumulative = torch.softmax(logits.double(), dim=-1).cumsum(-1)
    tokens = torch.searchsorted(cumulative, draws.double()[:, None] * cumulative[:, -1:])
    return tokens.squeeze(1).clamp(max=logits.shape[-1] - 1)
