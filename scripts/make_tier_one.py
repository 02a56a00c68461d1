"""Writes the probe banks of the bundled world: the public one, or with a seed a private one.

    python scripts/make_tier_one.py data/policy/tier_one                    # the public bank
    python scripts/make_tier_one.py /somewhere/else --seed "a secret text"  # a private bank, another for each seed

A private bank holds no probe of the public one. Its requests combine the same topics with other wordings; none of them
but those of `train` is in the corpus of the bundled base. Keep the seed and the folder outside the repository: anyone
who has the seed can draw the bank.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from persona_rlhf.common.files import atomic_write
from persona_rlhf.simulation.banks import bank_rows


def main() -> None:
    """Writes one file a category."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the banks")
    parser.add_argument("--seed", default="", help="secret text of at most 64 bytes; without it, the public bank")
    options = parser.parse_args()
    if len(options.seed.encode()) > 64:
        parser.error("--seed: at most 64 bytes")
    options.out.mkdir(parents=True, exist_ok=True)
    for category, rows in bank_rows(options.seed).items():
        path = options.out / f"{category}.jsonl"
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {len(rows)} probes")


if __name__ == "__main__":
    main()
