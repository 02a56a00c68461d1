#!/usr/bin/env python
"""Refusals of a base on public probe sets that nothing was trained on, by set and hazard category, with counts.

    persona-rlhf data import xstest xstest_prompts.csv banks/
    persona-rlhf data import strongreject strongreject.csv banks/
    python scripts/measure_shift.py models/smollm2-aligned banks/

The answers are greedy, and judged as the gate judges them. Intervals are Wilson's, 95%. Read a set once, when nothing
will change any more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.table import Table

from persona_rlhf.config.evaluation import GateSettings
from persona_rlhf.config.training import BaseSettings, LoraSettings
from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import prompt_ids
from persona_rlhf.evaluation.answer_judge import judges_of
from persona_rlhf.evaluation.prompt_sets import read_ordinary
from persona_rlhf.evaluation.refusals import BaseAnswers
from persona_rlhf.evaluation.statistics import wilson
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import load_base
from persona_rlhf.policy.hazards import read_probes


def prompts_of(bank: Path) -> list[str]:
    """The prompts of a bank that `data import` wrote."""
    category = bank.name.partition(".")[0]
    if category == "over_refusal":
        return read_ordinary(bank)
    return [probe.prompt for probe in read_probes(bank, category)]


def refusals(adapted: AdaptedModel, prompts: Sequence[str], gate: GateSettings, *, harmless: bool) -> tuple[int, int]:
    """How many prompts are refused, and of how many: those of the same tokens count once.

    A doubt counts against the base in both directions.
    """
    judges = judges_of(gate, adapted.base.device)
    rows = {prompt_ids((Message("user", prompt),), adapted.base.tokenizer): prompt for prompt in prompts}
    answers = BaseAnswers(adapted, judges.first, gate.max_new_tokens, judges.second, rows, harmless=harmless)
    return sum(answers.refused(list(rows))), len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("banks", type=Path)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    arguments = parser.parse_args()
    banks = sorted(arguments.banks.glob("*.jsonl"))
    if not banks:
        parser.error(f"{arguments.banks} holds no *.jsonl; make them by `persona-rlhf data import`")
    gate = GateSettings(max_new_tokens=arguments.max_new_tokens)
    table = Table("bank", "refused", "share", "95% interval")
    with closing(AdaptedModel(load_base(BaseSettings(model=arguments.base)), LoraSettings())) as adapted:
        for bank in banks:
            harmless = bank.name.startswith("over_refusal.")
            refused, n = refusals(adapted, prompts_of(bank), gate, harmless=harmless)
            low, high = wilson(refused, n)
            table.add_row(bank.name, f"{refused} of {n}", f"{refused / n:.1%}", f"{low:.1%} to {high:.1%}")
            print(f"{bank.name}: {refused} of {n}", file=sys.stderr, flush=True)
    Console().print(table)


if __name__ == "__main__":
    main()
