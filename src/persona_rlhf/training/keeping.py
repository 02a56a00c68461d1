"""What a base keeps of itself while it is aligned: its own answers to harmless prompts, every token of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from persona_rlhf.preferences.tokens import Row
from persona_rlhf.training.batch import collate

_STRETCH = 50
"""Batches among which rows of like length are put together."""


class Kept:
    """The divergence of a model in training from what it was: KL(was || is), in nats a token.

    Learning sampled answers has the same gradient on average; here every token speaks for the whole vocabulary, so a
    few answers hold what would else take many, and none of them is learned by heart. Costs a second copy of the
    weights, which is taken here.
    """

    def __init__(self, model: PreTrainedModel, rows: Sequence[Row], batch_size: int, seed: int) -> None:
        self._was = copy.deepcopy(model).requires_grad_(False).eval()
        self._batches = _batches(rows, batch_size, Random(f"kept {seed}"))

    def divergence(self, model: nn.Module) -> Float[Tensor, ""]:
        """On the next rows, with gradient."""
        batch = collate(next(self._batches), 0, self._was.device)

        def log_shares(of: nn.Module) -> Float[Tensor, "tokens vocabulary"]:
            logits: Tensor = of(input_ids=batch.ids, use_cache=False).logits
            return batch.source(logits.flatten(0, 1)).float().log_softmax(-1)

        with torch.no_grad():
            was = log_shares(self._was)
        return nn.functional.kl_div(log_shares(model), was, reduction="sum", log_target=True) / len(was)


class Keeping:
    """Put before a trainer of TRL, it adds the divergence to its loss, `keep` times."""

    def __init__(self, *args: Any, kept: Kept | None, keep: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept, self._keep = kept, keep

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """TRL's loss and ours."""
        trl: Any = super()
        found = trl.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._kept is None or not self._keep:
            return found
        loss, outputs = found if return_outputs else (found, None)
        loss = loss + self._keep * self._kept.divergence(model)
        return (loss, outputs) if return_outputs else loss


def _batches(rows: Sequence[Row], size: int, rng: Random) -> Iterator[list[Row]]:
    """Without end: every row once a pass, in an order of chance, rows of like length together."""
    while True:
        order = rng.sample(rows, len(rows))
        stretches = [order[n : n + size * _STRETCH] for n in range(0, len(order), size * _STRETCH)]
        alike = [sorted(stretch, key=lambda row: row.length) for stretch in stretches]
        batches = [stretch[n : n + size] for stretch in alike for n in range(0, len(stretch), size)]
        rng.shuffle(batches)
        yield from batches
