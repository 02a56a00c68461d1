#!/usr/bin/env python3
"""Times the fleet against TRL's DPOTrainer, with the dials that `persona-rlhf bench` leaves alone; JSON on stdout."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from persona_rlhf.benchmarks.fleet_vs_trl import PADDED, PLAIN, bench, compare, render
from persona_rlhf.benchmarks.trl_baseline import real_workload
from persona_rlhf.config.training import BaseSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="192x4", help="bundled, 192x4, 256x6 or 512x8")
    parser.add_argument("--users", type=int, default=8, help="users of the fleet")
    parser.add_argument("--pairs", type=int, help="pairs a user; the shape knows a number that takes minutes")
    parser.add_argument("--epochs", type=int, help="passes over them")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every contender; medians are over them")
    parser.add_argument("--base", help="a base in place of a shape, with --preferences")
    parser.add_argument("--preferences", type=Path, help="file or folder of preferences for --base")
    parser.add_argument("--dtype", default="auto", help="type of the base's weights: auto, float32 or bfloat16")
    args = parser.parse_args()
    if (args.base is None) != (args.preferences is None):
        parser.error("--base and --preferences go together")
    if args.base is None:
        result = bench(args.shape, args.users, args.pairs, args.epochs, args.rounds)
    else:
        settings = BaseSettings(model=args.base, dtype=args.dtype)
        work = real_workload(settings, args.preferences, args.users, args.pairs or 8, args.epochs or 1)
        result = {"shape": args.base} | compare(work, args.rounds, [PADDED, PLAIN])
    Console(stderr=True).print(render(result))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
