#!/usr/bin/env python3
"""Times the fleet against TRL's DPOTrainer, with the dials that `persona-rlhf bench` leaves alone; JSON on stdout."""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from persona_rlhf.benchmarks.fleet_vs_trl import bench, render


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="192x4", help="bundled, 192x4, 256x6 or 512x8")
    parser.add_argument("--users", type=int, default=8, help="users of the fleet")
    parser.add_argument("--pairs", type=int, help="pairs a user; the shape knows a number that takes minutes")
    parser.add_argument("--epochs", type=int, help="passes over them")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every contender; medians are over them")
    result = bench(**vars(parser.parse_args()))
    Console(stderr=True).print(render(result))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
