#!/usr/bin/env python3
"""How well the screen tells poison: precision and recall on generated users, whose poisoned pairs are labelled.

python scripts/generate_users.py --out USERS --users 40 --poisoned 8 --kind flipped noice --share 0.1 0.3
python scripts/measure_screen.py configs/quickstart.yaml users.path=USERS

A pair is detected where the screen quarantines it (or flags it, with the quarantine off). Truth is the generator's mark
(`source: simulated poison`). Recall by kind of poison (the name of the file), precision over all; 95% Clopper-Pearson.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.experiment import read_config
from persona_rlhf.evaluation.statistics import interval
from persona_rlhf.pipeline.prepare import chunks_of, prepare, prepare_users

POISON = "simulated poison"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    options = parser.parse_args()
    try:
        ready = prepare(read_config(options.config, options.overrides))
    except InputError as fault:
        sys.exit(str(fault))
    poisoned, caught, alarms, sound = Counter[str](), Counter[str](), 0, 0
    for users in chunks_of(ready.pairs.users, 32):
        pairs = ready.pairs.of(users)
        detected = {id(seen.pair) for seen in prepare_users(ready, pairs).dropped if seen.action != "dropped"}
        for pair in pairs:
            kind = Path(pair.file).stem
            if pair.source == POISON:
                poisoned[kind] += 1
                caught[kind] += id(pair) in detected
            else:
                sound += 1
                alarms += id(pair) in detected
    table = Table("", "pairs", "detected", "share", "95% interval")
    rows = [(f"recall, {kind}", count, caught[kind]) for kind, count in sorted(poisoned.items())]
    every = caught.total()
    rows += [("recall, all poison", poisoned.total(), every), ("precision", every + alarms, every)]
    for name, n, k in [*rows, ("false alarms, sound pairs", sound, alarms)]:
        low, high = interval(k, n)
        table.add_row(name, f"{n:,}", f"{k:,}", f"{k / max(1, n):.4f}", f"{low:.4f} to {high:.4f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
