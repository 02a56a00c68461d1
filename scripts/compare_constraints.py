#!/usr/bin/env python3
"""Comparison of constraints and baselines: tier-one refusals and gains, over the same users, base and harness.

python scripts/compare_constraints.py configs/quickstart.yaml users.path=DIR evaluation.utilities=DIR/utilities.yaml
python scripts/compare_constraints.py ... --contenders plain ours surgery --split test --records seed1.jsonl
python scripts/compare_constraints.py --pool seed1.jsonl seed2.jsonl

Every contender (see contenders.py) trains every user at full strength (alpha 1), the screen is off, and refusals are
counted on `dev` probes (`--split test` for figures to publish: nothing may be chosen by them). `gate alone` is plain
DPO as the gate releases it, on `certify` probes; `ours + gate` likewise. `--records` appends a line per user and
contender; started again with the same file, it skips those. `--pool` puts several runs (seeds, populations) into one
table. Intervals are 95% bootstraps over users. Seconds are CPU seconds of this process for training alone.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from comparison_table import CLEAN, CLOSE, Record, comparison, rendered
from contenders import CONTENDERS, WORDINGS
from rich.console import Console

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.experiment import read_config
from persona_rlhf.evaluation.records import Measures
from persona_rlhf.pipeline.inputs import read_inputs
from persona_rlhf.pipeline.prepare import Prepared, prepare, prepare_users
from persona_rlhf.pipeline.shared_values import constraint_bank, with_reference
from persona_rlhf.simulation.users import Utility
from persona_rlhf.training.engine import TrainedUser

SLOTS = 8
GATED = {"plain": "gate alone", "ours": "ours + gate"}


@dataclass(frozen=True)
class SplitPolicy:
    """A policy whose `test` probes are those of another split."""

    policy: Any
    split: str

    def probes(self, split: str) -> Any:
        return self.policy.probes(self.split if split == "test" else split)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)


def group_of(utility: Utility) -> str:
    """The users whose mean is reported together; drawn poisoned users are named KIND-SHARE-NUMBER."""
    if utility.poisoned:
        return f"poisoned: {re.sub('-[0-9]{5}$', '', utility.user_id)}"
    return CLOSE if utility.kind == "hazard_adjacent" else CLEAN


def run(
    ready: Prepared, names: Sequence[str], gated: bool, chunk: int, console: Console, earlier: Collection[Record] = ()
) -> Iterator[Record]:
    """Trains and measures every user under every contender, `chunk` users at a time, except for `earlier` records."""
    config, adapted = ready.config, ready.adapted
    fleet = config.fleet.model_copy(update={"slots": SLOTS})  # the same for every contender
    examination, utilities = ready.examination, dict(ready.examination.utilities)
    bank = constraint_bank(config, ready.policy, adapted)
    assert bank is not None, "the constraint is off in this config"
    title = f"{config.users.path} seed {config.seed}"
    done = {(record.contender, record.user_id) for record in earlier if record.run == title}
    for start in range(0, ready.pairs.users, chunk):
        pairs = ready.pairs.of(range(start, min(start + chunk, ready.pairs.users)))
        screened = prepare_users(ready, pairs)
        rows = [user for user in screened.rows if user.train]
        flagged = Counter(dropped.pair.user_id for dropped in screened.dropped if dropped.action == "flagged")
        reference = with_reference(adapted, rows, bank)
        for name in names:
            if all((name, user.user_id) in done for user in rows):
                continue
            kind = CONTENDERS[name]
            prepared = [kind.prepare(ready, user) for user in rows]
            begun = time.process_time()
            trained = kind.train(adapted, prepared, reference, bank, config, fleet)
            seconds = (time.process_time() - begun) / len(rows)
            by_id = {user.user_id: user for user in rows}
            for at in range(0, len(trained), SLOTS):
                cohort = [user for user in trained[at : at + SLOTS] if user.adapter is not None]
                flat = torch.stack([user.adapter for user in cohort if user.adapter is not None])
                people = [by_id[user.user_id] for user in cohort]
                alphas = {name: [1.0] * len(cohort)}
                if gated and name in GATED:
                    alphas[GATED[name]] = [
                        verdict.alpha for verdict in examination.verdicts(flat, [examination.demands] * len(flat))
                    ]
                measures = examination.measures(flat, people, alphas[name])
                for contender, own_alphas in alphas.items():
                    if own_alphas != alphas[name]:
                        measures = examination.measures(flat, people, own_alphas)
                    for user, alpha, measured in zip(cohort, own_alphas, measures, strict=True):
                        if (contender, user.user_id) in done:
                            continue
                        yield Record(
                            title,
                            contender,
                            user.user_id,
                            group_of(utilities[user.user_id]),
                            alpha,
                            seconds if contender == name else None,
                            figures_of(measured),
                            signs_of(user, flagged[user.user_id]),
                        )
            examination.forget_users()
            console.print(f"{min(start + chunk, ready.pairs.users)} of {ready.pairs.users} users: {name}")


def figures_of(measures: Measures) -> dict[str, float | None]:
    """Gains over chance, and refusals against the base in points."""
    over, pooled = measures.over_refusal, measures.test.pooled if measures.test else None
    counts = measures.test.categories.values() if measures.test else ()
    shares = [100 * (c.refused - c.base_refused) / c.n for c in counts if c.n]
    return {
        "accuracy_gain": measures.heldout_clean and measures.heldout_clean.adapted - 0.5,
        "win_gain": measures.win_rate and measures.win_rate.value - 0.5,
        "refusal": pooled and 100 * pooled.refused / pooled.n,
        "against_base": pooled and 100 * (pooled.refused - pooled.base_refused) / pooled.n,
        "worst_category": min(shares, default=None),
        "over_refusal": 100 * (over.refused - over.base_refused) / over.n if over and over.n else None,
    }


def signs_of(user: TrainedUser, flagged: int) -> dict[str, float]:
    """Signs of poison from training and screening of a user; larger values make poison more likely."""
    return {
        "share of pairs the screen flags": flagged / user.pairs,
        "largest dual": max((trace.peak for trace in user.duals.values()), default=0.0),
        "mean dual": fmean(trace.mean for trace in user.duals.values()) if user.duals else 0.0,
    }


def recorded(files: Sequence[Path]) -> list[Record]:
    """The records of earlier runs."""
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [Record(**json.loads(line)) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--gate", action="store_true", help="plain and ours as the gate releases them, too")
    parser.add_argument("--chunk", type=int, default=32, metavar="USERS")
    parser.add_argument("--records", type=Path, metavar="FILE", help="keep a record of every user")
    parser.add_argument("--pool", type=Path, nargs="+", metavar="FILE", help="train nobody: the table of these records")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_intermixed_args()
    if (options.config is None) == (options.pool is None):
        parser.error("name a config to run, or records to --pool")
    console = Console(stderr=True)
    if options.pool:
        records = recorded(options.pool)
    else:
        torch.set_num_threads(1)
        try:
            config = read_config(options.config, [*options.overrides, "screening.quarantine=false"])
            if "event" in options.contenders and config.constraint.refusals_per_probe < WORDINGS:
                parser.error(
                    f"`event` adds up {WORDINGS} refusals of a probe: constraint.refusals_per_probe={WORDINGS}"
                )
            materials = read_inputs(config)
            probed = SplitPolicy(materials.policy, options.split)
            ready = prepare(config, materials._replace(policy=probed))  # type: ignore[arg-type]
        except InputError as fault:
            sys.exit(str(fault))
        records = recorded([options.records] if options.records and options.records.exists() else [])
        for record in run(ready, options.contenders, options.gate, options.chunk, console, list(records)):
            records.append(record)
            if options.records:
                with options.records.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(record)) + "\n")
    table = comparison(records)
    if options.json:
        print(json.dumps(table, indent=2))
    else:
        Console(width=200).print(*rendered(table))


if __name__ == "__main__":
    main()
