#!/usr/bin/env python3
"""What it brings to compute a prompt once for both answers: CPU seconds a step, rows of one length, no padding at all.

python scripts/benchmark_prefix.py                     # hidden 256 x 6 layers; prompt to completion 1:1 and 4:1
python scripts/benchmark_prefix.py --shape 512x8 --rounds 7

Both sides take the same optimizer steps of the same users, in turns in one process on one thread; they end in the same
adapters up to rounding, and how far apart is printed. `twice` is the model itself on padded rows. `apart` is the packed
layout of the shared side with a prompt of its own, other tokens, for every answer: so nothing but sharing differs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from statistics import median

import torch

from persona_rlhf.benchmarks.trl_baseline import VOCABULARY, Workload, make_workload
from persona_rlhf.config.training import FleetSettings
from persona_rlhf.data.tokenize import PairRow, Row, UserRows, both_rows
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.heap import keep_large_blocks
from persona_rlhf.training.cache import Reference
from persona_rlhf.training.engine import Engine


def of_length(user: UserRows, prompt: int, completion: int, seed: int) -> UserRows:
    """The user with made-up rows of these lengths (tokens)."""
    draw = torch.Generator().manual_seed(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, VOCABULARY, (count,), generator=draw).tolist())

    rows = []
    for row in user.train:
        asked = ids(prompt)
        rows.append(PairRow(row.pair, Row(asked, ids(completion)), Row(asked, ids(completion))))
    return user._replace(train=rows)


def unshared(user: UserRows) -> UserRows:
    """The user whose rejected answers have prompts of their own, as long as they were."""
    other = [
        Row(tuple(VOCABULARY + 1 - token for token in pair.rejected.prompt), pair.rejected.completion)
        for pair in user.train
    ]
    return user._replace(train=[pair._replace(rejected=row) for pair, row in zip(user.train, other, strict=True)])


def steps(work: Workload, users: Sequence[UserRows], packs: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """CPU seconds of all steps, and the adapters; the reference is not timed."""
    adapted = AdaptedModel(work.base, work.lora)
    adapted.packs_rows = packs
    reference = Reference(adapted)
    reference.add(both_rows(pair for user in users for pair in user.train))
    engine = Engine(adapted, users, reference, None, work.dpo, FleetSettings(slots=len(users)), 0)
    started = time.process_time()
    made = {user.user_id: user.adapter for user in engine.run() if user.adapter is not None}
    seconds = time.process_time() - started
    adapted.close()
    return seconds, made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="256x6")
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_large_blocks()
    work = make_workload(options.shape, options.users, options.pairs, 1, torch.device("cpu"))
    for prompt, completion in ((48, 48), (128, 32)):
        users = [of_length(user, prompt, completion, n) for n, user in enumerate(work.users)]
        sides = {"shared": (users, True), "twice": (users, False), "apart": ([unshared(user) for user in users], True)}
        times: dict[str, list[float]] = {side: [] for side in sides}
        made = {}
        for turn in range(options.rounds):
            for side in list(sides)[:: 1 if turn % 2 else -1]:
                seconds, made[side] = steps(work, *sides[side])
                times[side].append(seconds)
        apart = max(
            float((own - made["twice"][u]).norm() / made["twice"][u].norm()) for u, own in made["shared"].items()
        )
        found = {
            "shape": options.shape,
            "prompt": prompt,
            "completion": completion,
            **{f"{side}_seconds": median(own) for side, own in times.items()},
            "ratio": median(times["twice"]) / median(times["shared"]),
            "ratio_apart": median(times["apart"]) / median(times["shared"]),
            "adapter_distance": apart,
        }
        print(json.dumps(found))


if __name__ == "__main__":
    main()
