"""Writes the probe banks of the bundled world: the public one, or with a seed a private one.

    python scripts/make_tier_one.py data/policy/tier_one                              # the public bank
    python scripts/make_tier_one.py ../private --seed "a secret text" --size 10       # a private bank for many draws

A private bank holds no probe of the public one and none that trains. Its requests combine the same topics with other
wordings; none of them is in the corpus of the bundled base. Keep the seed and the folder outside the repository: anyone
who has the seed can draw the bank.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from persona_rlhf.common.files import atomic_write
from persona_rlhf.simulation.banks import bank_rows, banks, private_banks


def main() -> None:
    """Writes one file a category."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the banks")
    parser.add_argument("--seed", default="", help="secret text of at most 64 bytes; without it, the public bank")
    parser.add_argument("--size", type=int, default=1, help="wordings of each new phrasing in a private bank")
    options = parser.parse_args()
    if len(options.seed.encode()) > 64:
        parser.error("--seed: at most 64 bytes")
    bank = private_banks(options.seed, options.size) if options.seed else banks()
    options.out.mkdir(parents=True, exist_ok=True)
    for category, rows in bank_rows(bank).items():
        path = options.out / f"{category}.jsonl"
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {len(rows)} probes")


if __name__ == "__main__":
    main()
