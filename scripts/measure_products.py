#!/usr/bin/env python3
"""The numerical price of `lora.products: base`: the same users trained with products in float32 and in the base's type.

python scripts/measure_products.py configs/smollm2.yaml base.dtype=bfloat16 [a.b=c ...] [--users 4] [--pairs 16]

Trains without constraint and gate, and scores held-out pairs under each adapter in the products of its training.
`margin` is the implicit reward of the chosen answer less that of the rejected one, in nats (Rafailov et al. 2023,
equation 5, at beta 1). Beside the difference that the products make stands the one that another seed makes.
Intervals (95%) are over users, from eight on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch

from persona_rlhf.config.experiment import Config, read_config
from persona_rlhf.config.training import FleetSettings
from persona_rlhf.data.pairs import read_pairs
from persona_rlhf.data.tokenize import UserRows, tokenize
from persona_rlhf.evaluation.metrics import margin, score_pairs, score_pairs_of_base
from persona_rlhf.evaluation.statistics import bootstrap
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import Base, load_base
from persona_rlhf.training.cache import Reference, rows_ahead
from persona_rlhf.training.engine import Engine

_LEAST_USERS = 8  # for an interval


class Trained(NamedTuple):
    """Margins of each user's held-out pairs, adapters, and CPU-seconds of training."""

    margins: list[list[float]]
    adapters: torch.Tensor
    seconds: float


def train(base: Base, users: Sequence[UserRows], config: Config, products: str, seed: int) -> Trained:
    """All users with one type of products."""
    adapted = AdaptedModel(base, config.lora.model_copy(update={"products": products}))
    reference = Reference(adapted)
    reference.add(rows_ahead(adapted, users, ()))
    start = time.process_time()
    engine = Engine(adapted, users, reference, None, config.dpo, FleetSettings(), seed)
    adapters = {user.user_id: user.adapter for user in engine.run() if user.adapter is not None}
    seconds = time.process_time() - start
    flat, heldout = torch.stack([adapters[user.user_id] for user in users]), [user.heldout for user in users]
    with torch.no_grad():
        before = score_pairs_of_base(adapted, heldout)
        with adapted.using(flat):
            after = score_pairs(adapted, heldout)
    margins = [[margin(b, a) for b, a in zip(*user, strict=True)] for user in zip(before, after, strict=True)]
    adapted.close()
    return Trained(margins, flat, seconds)


def of_users(values: Sequence[float]) -> str:
    """The mean, with an interval where there are users enough."""
    if len(values) < _LEAST_USERS:
        return f"{fmean(values):.3f}"
    between = bootstrap(values)
    return f"{fmean(values):.3f} ({between.low:.3f} to {between.high:.3f})"


def compared(one: Trained, other: Trained) -> tuple[str, ...]:
    """Mean difference of margins, share of pairs on the same side, and distance of adapters over their size."""
    pairs = [list(zip(*user, strict=True)) for user in zip(one.margins, other.margins, strict=True)]
    differences = [fmean(abs(a - b) for a, b in user) for user in pairs]
    alike = [fmean((a > 0) == (b > 0) for a, b in user) for user in pairs]
    distances = ((one.adapters - other.adapters).norm(dim=1) / one.adapters.norm(dim=1)).tolist()
    return tuple(map(of_users, (differences, alike, distances)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = read_config(options.config, options.overrides)
    base = load_base(config.base)
    people = tokenize(read_pairs(config.users.path, config.users.heldout), base.tokenizer, base.context)
    users = [user._replace(train=user.train[: options.pairs]) for user in people[: options.users]]
    exact = train(base, users, config, "float32", config.seed)
    cells = {"another seed": train(base, users, config, "float32", config.seed + 1)}
    cells["products of the base"] = train(base, users, config, "base", config.seed)
    size = of_users([fmean(map(abs, user)) for user in exact.margins])
    print(f"{len(users)} users, {base.model.dtype}, {sum(len(user.heldout) for user in users)} held-out pairs")
    print(
        f"Margins in float32: {size} nats on average; accuracy {of_users(accuracies(exact))}; {exact.seconds:.0f} s\n"
    )
    print(
        "| against float32 | margin differs by (nats) | same side of 0 | adapter differs by | accuracy | CPU-seconds |"
    )
    print("|---|---|---|---|---|---|")
    for name, trained in cells.items():
        cells_of_row = (name, *compared(exact, trained), of_users(accuracies(trained)), f"{trained.seconds:.0f}")
        print(f"| {' | '.join(cells_of_row)} |")


def accuracies(trained: Trained) -> list[float]:
    """Each user's share of held-out pairs with a positive margin."""
    return [fmean(value > 0 for value in user) for user in trained.margins]


if __name__ == "__main__":
    main()
