#!/usr/bin/env python3
"""What judging costs beside training: CPU-seconds a clean user, and how often the exact shortcut spares an answer.

python scripts/benchmark_gate.py configs/quickstart.yaml [a.b=c ...] [--users 24] [--rounds 5]

The clean users of a config (those whose written-down taste is not poisoned) are trained once, constraint and all, and
judged `--rounds` times by the gate on all certify probes. The shortcut: where an adapter leaves every token of the
base's answer the likeliest, greedy decoding would write just that answer, so one forward pass gives the verdict; and
what users share (the base's answers, the frozen layers below their adapters) is computed by those judged first.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import fmean

import torch
from rich.console import Console
from rich.table import Table

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.experiment import read_config
from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import prompt_ids
from persona_rlhf.evaluation.refusals import BaseAnswers, refusal_outcomes
from persona_rlhf.models.heap import keep_large_blocks
from persona_rlhf.pipeline.prepare import prepare, prepare_users
from persona_rlhf.pipeline.release import cohorts
from persona_rlhf.pipeline.shared_values import constraint_bank, with_reference
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.training.constraint import constraint_of
from persona_rlhf.training.engine import Engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--users", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    keep_large_blocks()
    try:
        ready = prepare(read_config(asked.config, asked.overrides))
        config, examination = ready.config, ready.examination
        clean = {user for user, taste in examination.utilities.items() if not getattr(taste, "poisoned", False)}
        pairs = [pair for pair in ready.pairs.of(range(ready.pairs.users)) if pair.user_id in clean]
        names = list(dict.fromkeys(pair.user_id for pair in pairs))[: asked.users]
        users = [user for user in prepare_users(ready, pairs).rows if user.train and user.user_id in names]
        bank = constraint_bank(config, ready.policy, ready.adapted)
        reference = with_reference(ready.adapted, users, bank)
    except InputError as fault:
        sys.exit(str(fault))
    certify = ready.policy.probes("certify")
    begun = time.process_time()
    constraint = None if bank is None else constraint_of(bank, config.constraint, config.seed)
    engine = Engine(ready.adapted, users, reference, constraint, config.dpo, config.fleet, config.seed)
    groups = [torch.stack([user.adapter for user in group]) for group in cohorts(engine.run(), engine.count)]
    training = time.process_time() - begun
    rounds, tests = [], 0
    for _ in range(asked.rounds):
        spent, verdicts = [], []
        examination.forget_users()
        for flat in groups:
            begun = time.process_time()
            verdicts += examination.verdicts(flat, [examination.demands] * len(flat))
            spent.append((time.process_time() - begun) / len(flat))
        rounds.append(spent)
        tests = sum(len(verdict.looks) for verdict in verdicts)
    asks = [prompt_ids((Message("user", probe.prompt),), ready.adapted.base.tokenizer) for probe in certify]
    answers = BaseAnswers(ready.adapted, is_refusal, config.gate.max_new_tokens)
    spared = [
        share
        for flat in groups
        for share in refusal_outcomes(ready.adapted, flat, torch.ones(len(flat)), asks, answers).unchanged
    ]
    table = Table("", "CPU-seconds a user", "lowest to highest")
    many = len(users)
    table.add_row(f"training, {many} users", f"{training / many:.2f}", "")
    judged = f"the gate, {len(certify)} certify probes, {tests} tests"
    half = len(groups) // 2
    rows = [(judged, [cost for spent in rounds for cost in spent])]
    if half:  # what users share is computed by those judged first
        rows.append(("first time, first half of the users", rounds[0][:half]))
    rows.append(("first time, second half" if half else "first time", rounds[0][half:]))
    for name, costs in rows:
        table.add_row(name, f"{fmean(costs):.2f}", f"{min(costs):.2f} to {max(costs):.2f}")
        table.add_row("  over training", f"{fmean(costs) * many / training:.2f}", "")
    shares = f"{min(spared):.1%} to {max(spared):.1%}"
    table.add_row("answers that the shortcut spares", f"{sum(spared) / len(spared):.1%}", shares)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
