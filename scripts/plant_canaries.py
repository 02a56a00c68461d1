"""Writes the pairs of a test user whose chosen answers hold drawn codes, for `canaries` of the impact report.

    python scripts/plant_canaries.py users/canaries.jsonl [--number 16] [--seed N] [--user canary]

Train with the file in users.path, measure with `persona-rlhf report RUN --impact --ask`, and forget the user.
"""

from __future__ import annotations

import argparse
import json
import secrets
from collections.abc import Sequence
from pathlib import Path

from persona_rlhf.common.files import atomic_write
from persona_rlhf.data.canaries import canary_rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--number", type=int, default=16)
    parser.add_argument("--seed", type=int, help="default: drawn, so that nobody knows the codes")
    parser.add_argument("--user", default="canary")
    chosen = parser.parse_args(arguments)
    seed = secrets.randbits(64) if chosen.seed is None else chosen.seed
    rows = canary_rows(chosen.user, chosen.number, seed)
    atomic_write(chosen.out, (json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
