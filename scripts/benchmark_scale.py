#!/usr/bin/env python3
"""Does one more user cost the same, whatever the number of users? And what do they cost before they train?

python scripts/benchmark_scale.py                          # 1, 8, 32, 128 and 512 users, and TRL's best setting
python scripts/benchmark_scale.py --users 8 2000 --json
python scripts/benchmark_scale.py --parts                  # tokens, reference, slot and export of one user, in ms

Users have eight made-up pairs and one epoch on the bundled tiny base, all layers adapted, no constraint: little work
each, so that what does not depend on the work would show. Each number of users trains in a process of its own, whose
peak memory is measured; seconds are CPU seconds on one thread. `--parts` takes users of 20 bundled pairs whose
reference is known already, and writes their adapters as `train` does.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from persona_rlhf.benchmarks.fleet_vs_trl import bench
from persona_rlhf.benchmarks.trl_baseline import SEED, made_users, make_workload
from persona_rlhf.common.files import find
from persona_rlhf.config.experiment import read_config
from persona_rlhf.config.training import FleetSettings
from persona_rlhf.data.pairs import read_pairs
from persona_rlhf.data.tokenize import tokenize
from persona_rlhf.evaluation.gate import demands_of, release_unjudged
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.heap import keep_large_blocks
from persona_rlhf.models.multi_lora import fresh_adapter
from persona_rlhf.pipeline.release import manifest_settings
from persona_rlhf.pipeline.shared_values import with_reference
from persona_rlhf.policy.policy import Policy
from persona_rlhf.release.adapter import AdapterFiles, Exporter
from persona_rlhf.release.manifest import BaseInfo, DataInfo, Provenance
from persona_rlhf.training.engine import Engine
from persona_rlhf.training.user_state import Slots, user_generator

PAIRS = 8
CHUNK = 256


def one_run(users: int) -> dict[str, float]:
    """Trains this many users, a chunk at a time as `train` does; CPU seconds a user and peak memory in MiB."""
    torch.set_num_threads(1)
    keep_large_blocks()
    work = make_workload("bundled", 1, PAIRS, 1, torch.device("cpu"))
    adapted = AdaptedModel(work.base, work.lora)
    started = time.process_time()
    norm = 0.0
    for start in range(0, users, CHUNK):
        people = made_users(range(start, min(start + CHUNK, users)), PAIRS, len(work.base.tokenizer))
        reference = with_reference(adapted, people, None)
        for user in Engine(adapted, people, reference, None, work.dpo, FleetSettings(slots=8), SEED).run():
            assert user.adapter is not None, user.reason
            norm += float(user.adapter.norm())
    seconds = (time.process_time() - started) / users
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"users": users, "seconds_per_user": seconds, "peak_mib": peak, "mean_norm": norm / users}


def parts(count: int = 24) -> dict[str, float]:
    """Median milliseconds of what one more user costs beside their training."""
    torch.set_num_threads(1)
    config = read_config("configs/quickstart.yaml")
    work = make_workload("bundled", 1, 20, 1, torch.device("cpu"))
    adapted = AdaptedModel(work.base, config.lora)
    pairs = read_pairs(find("data/users"), 0.25)
    people = list(dict.fromkeys(pair.user_id for pair in pairs))[:count]
    own = {user: [p for p in pairs if p.user_id == user and p.split == "train"][:20] for user in people}
    rows = {user: tokenize(some, work.base.tokenizer, work.base.context)[0] for user, some in own.items()}
    reference = with_reference(adapted, list(rows.values()), None)
    slots = Slots(1, adapted.params_per_user, 4, config.dpo, config.constraint.gain, torch.device("cpu"))
    spans = list(adapted.spans.values())
    flat = fresh_adapter(spans, user_generator(0, "a", "init"))
    policy = Policy.read([find(document) for document in config.policy.documents])
    demands = demands_of(policy, config.gate)
    outcomes = {category: [True] * 160 for category in demands.categories}
    verdict = release_unjudged(demands, outcomes, 1.0, outcomes)
    info = BaseInfo.of(work.base.name, work.base.weights_hash)
    papers = Provenance.of(info, policy, demands, manifest_settings(config))
    found: dict[str, list[float]] = {"tokens": [], "reference, known": [], "slot": [], "export": []}

    def timed(name: str, work: Callable[[], Any]) -> None:
        started = time.perf_counter()
        work()
        found[name].append(1000 * (time.perf_counter() - started))

    with tempfile.TemporaryDirectory() as folder:
        exporter = Exporter(Path(folder), AdapterFiles(adapted, config.lora, papers.base), papers)

        def slot(user: str) -> None:
            slots.take(0, user, fresh_adapter(spans, user_generator(0, user, "init")))
            slots.users[0] = None

        for user in people:
            timed("tokens", lambda user=user: tokenize(own[user], work.base.tokenizer, work.base.context))  # type: ignore[misc]
            timed("reference, known", lambda user=user: with_reference(adapted, [rows[user]], None, None, reference))  # type: ignore[misc]
            timed("slot", lambda user=user: slot(user))  # type: ignore[misc]
            data = DataInfo.of([row.pair for row in rows[user].train], 0)
            timed("export", lambda user=user, data=data: exporter.write(user, flat, verdict, None, data))  # type: ignore[misc]
    result = {name: median(values) for name, values in found.items()}
    return result | {"together": sum(result.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8, 32, 128, 512])
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(one_run(asked.one)))
        return
    if asked.parts:
        found = parts()
        print(json.dumps(found, indent=2) if asked.json else "\n".join(f"{n}: {ms:.2f} ms" for n, ms in found.items()))
        return
    rows = []
    for users in asked.users:
        done = subprocess.run(
            [sys.executable, __file__, "--one", str(users)], capture_output=True, text=True, check=True
        )
        rows.append(json.loads(done.stdout))
    trl = bench("bundled", users=2, pairs=PAIRS, epochs=1, rounds=3)
    best = min(row["seconds_per_user"] for row in trl["rows"] if row["contender"].startswith("TRL"))
    if asked.json:
        print(json.dumps({"rows": rows, "trl_seconds_per_user": best}, indent=2))
        return
    table = Table("users", "CPU seconds a user", "TRL's best over it", "peak memory, MiB", title=f"TRL: {best:.3f} s")
    for row in rows:
        seconds = row["seconds_per_user"]
        table.add_row(f"{row['users']:,.0f}", f"{seconds:.3f}", f"{best / seconds:.2f}", f"{row['peak_mib']:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
