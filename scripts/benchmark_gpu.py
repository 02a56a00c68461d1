#!/usr/bin/env python3
"""The fleet on a GPU, on models of a real size with random weights: against TRL, and against what the device can do.

python scripts/benchmark_gpu.py --out gpu.jsonl                  # every shape that is shipped, a JSON line each
python scripts/benchmark_gpu.py --shapes smollm2-135m --rounds 5
python scripts/benchmark_gpu.py --shapes llama-3.2-1b --users 16 --left-out "TRL, precomputed reference"

A shape comes with the work that is asked of it: many short pairs for small bases, prompts and answers of 128 tokens for
1 B. TRL trains one user a round in each of its settings, the fleet `--users` side by side; seconds are wall seconds
after the device has done all it was given. `flops` counts one step by the model's shape (shared prompts once) and sets
what the fleet's steps reach against a large dense product in the base's type, measured in the same process. Time for a
thousand users is the fleet's seconds a user, a thousand times. Without a GPU it says so and measures nothing.
A shape takes about `--minutes` at most: it has fewer rounds then. Shapes that `--out` has already are not measured
again. At the end comes a table of all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import pairwise
from math import inf
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, PreTrainedConfig

from persona_rlhf.benchmarks.fleet_vs_trl import ALONE, CONSTRAINED, FLEET, PADDED, PLAIN, UPPER, compare
from persona_rlhf.benchmarks.trl_baseline import SEED, TRL_SETTINGS, Workload, made_users, random_base, workload_on
from persona_rlhf.common.files import find
from persona_rlhf.config.training import FleetSettings
from persona_rlhf.data.tokenize import both_rows
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.training.base_shape import BaseShape
from persona_rlhf.training.cache import Reference, rows_ahead
from persona_rlhf.training.engine import Engine
from persona_rlhf.training.memory import most_held

CONTENDERS = [
    *(f"TRL, {setting}" for setting in TRL_SETTINGS),
    *(ALONE, FLEET, PADDED, PLAIN, CONSTRAINED, *UPPER.values()),
]


class Task(NamedTuple):
    """The work of a shape: users side by side, their pairs and epochs, least and most tokens of prompt and answer."""

    shape: str
    users: int
    pairs: int
    epochs: int
    prompt: tuple[int, int]
    answer: tuple[int, int]


TASKS = {
    "smollm2-135m": Task("HuggingFaceTB/SmolLM2-135M-Instruct", 32, 50, 1, (12, 30), (12, 30)),
    "qwen3-0.6b": Task("Qwen/Qwen3-0.6B", 32, 50, 1, (12, 30), (12, 30)),
    "llama-3.2-1b": Task("meta-llama/Llama-3.2-1B-Instruct", 16, 16, 1, (128, 128), (127, 127)),
    "qwen3-8b": Task("Qwen/Qwen3-8B", 8, 8, 1, (128, 128), (127, 127)),
}


def work_of(config: PreTrainedConfig, task: Task, device: torch.device) -> Workload:
    people = made_users(range(task.users), task.pairs, config.vocab_size, task.prompt, task.answer)
    return workload_on(random_base(config, device, task.shape), people, task.epochs)


def flops(work: Workload, config: PreTrainedConfig) -> dict[str, float]:
    """Teraflops a second of the fleet's steps (the median one, mean lengths), and of a large product."""
    adapted = AdaptedModel(work.base, work.lora)
    reference = Reference(adapted)
    reference.add(rows_ahead(adapted, work.users))
    fleet = FleetSettings(slots=len(work.users))
    engine, ends = Engine(adapted, work.users, reference, None, work.dpo, fleet, SEED), [work.clock()]
    list(engine.run(lambda _: ends.append(work.clock())))
    adapted.close()
    seconds = median(end - start for start, end in pairwise(ends[1:]))  # the first one warms up
    rows = both_rows(pair for user in work.users for pair in user.train)
    shape = BaseShape(config, work.lora, work.base.model.dtype)
    each = shape.step(rows).both / (len(rows) // 2)
    return {
        "step_seconds": seconds,
        "step_teraflops": each * work.dpo.pairs_per_step * len(work.users) / seconds / 1e12,
        "dense_teraflops": _dense(work) / 1e12,
    }


def _dense(work: Workload, side: int = 8192) -> float:
    """Floating-point operations a second of a square product in the base's type."""
    side = side if work.base.device.type == "cuda" else 512
    left, right = (torch.randn(side, side, device=work.base.device, dtype=work.base.model.dtype) for _ in range(2))
    times = []
    for _ in range(10):
        start = work.clock()
        left @ right
        times.append(work.clock() - start)
    return 2 * side**3 / median(times)


def measure(
    config: PreTrainedConfig,
    task: Task,
    rounds: int,
    left_out: list[str],
    device: torch.device,
    minutes: float = inf,
) -> dict[str, Any]:
    """One shape, JSON-ready."""
    work = work_of(config, task, device)
    found = {"shape": task.shape, "parameters": work.base.model.num_parameters(), **task._asdict()}
    found |= compare(work, rounds, left_out, seconds=60 * minutes)
    [fleet] = [row for row in found["rows"] if row["contender"] == FLEET]
    found |= flops(work, config)
    found["share_of_dense"] = found["step_teraflops"] / found["dense_teraflops"]
    found["minutes_of_1000_users"] = fleet["seconds_per_user"] * 1000 / 60
    return found | {"peak_gib": most_held(device) / 2**30}


def table(rows: list[dict[str, Any]]) -> str:
    """The shapes as a table for docs/explanation/performance.md."""
    lines = [
        "| shape | rounds | TRL's best over the fleet | s a user | share of the dense rate | 1,000 users | peak, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        [fleet] = [each for each in row["rows"] if each["contender"] == FLEET]
        lines.append(
            f"| {row['shape']} | {row['rounds']} | {row['ratio']:.2f} | {fleet['seconds_per_user']:.2f} | "
            f"{row['share_of_dense']:.0%} | {row['minutes_of_1000_users']:.0f} min | {row['peak_gib']:.1f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", choices=TASKS, default=list(TASKS), metavar="SHAPE", help=", ".join(TASKS)
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of every contender; medians are over them")
    parser.add_argument("--users", type=int, help="users side by side, in the place of the task's number")
    parser.add_argument("--left-out", nargs="+", choices=CONTENDERS, default=[], metavar="CONTENDER")
    parser.add_argument("--minutes", type=float, default=10.0, help="most minutes of a shape, about")
    parser.add_argument("--out", type=Path, help="file for the JSON lines; shapes that it has are left out")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU here that torch can use, so nothing was measured.", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    shapes = json.loads(find("data/shapes.json").read_text())
    done: list[dict[str, Any]] = []
    if asked.out is not None and asked.out.exists():
        done = [json.loads(line) for line in asked.out.read_text().splitlines()]
    for name in asked.shapes:
        if TASKS[name].shape in {row["shape"] for row in done}:
            continue
        task = TASKS[name]._replace(**({"users": asked.users} if asked.users else {}))
        config = AutoConfig.for_model(**shapes[task.shape], eos_token_id=1, pad_token_id=0, bos_token_id=None)
        started = time.perf_counter()
        found = measure(config, task, asked.rounds, asked.left_out, device, asked.minutes)
        found |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        done.append(found)
        print(json.dumps(found), flush=True)
        if asked.out is not None:
            with asked.out.open("a") as lines:
                lines.write(json.dumps(found) + "\n")
        print(f"{name}: {found['ratio']:.2f}x, {time.perf_counter() - started:.0f} s", file=sys.stderr)
        torch.cuda.empty_cache()
    print(table(done), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
