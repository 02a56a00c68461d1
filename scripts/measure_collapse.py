#!/usr/bin/env python3
"""Text that collapses in training, and `dpo.anchor`: accuracy, win rate, perplexity of answers and facts kept.

python scripts/measure_collapse.py configs/quickstart.yaml users.path=data/users/surface.jsonl --anchors 0 0.3
python scripts/measure_collapse.py ... --layers 0.25 --epochs 9 --pairs 400 --json

Trains every user in each cell of layers, epochs and anchors, without constraint, screen and gate, and measures the
adapters at full strength. Intervals are 95% bootstraps over users, from eight users on. `collapsed` are
the users whose answers have more than 1.5 times the perplexity of the base's, or who lose more than 5% of the base's
right facts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch

from persona_rlhf.config.experiment import Config, read_config
from persona_rlhf.config.training import FleetSettings
from persona_rlhf.data.tokenize import tokenize
from persona_rlhf.evaluation.statistics import interval_over_users
from persona_rlhf.pipeline.inputs import read_inputs
from persona_rlhf.pipeline.prepare import prepare
from persona_rlhf.training.cache import Reference, rows_ahead
from persona_rlhf.training.engine import Engine

OFF = ("constraint.enabled=false", "screening.quarantine=false", "evaluation.test_probes=0")


class UserText(NamedTuple):
    """One user in one cell: shares of held-out pairs and of won prompts, and ratios to the base."""

    user_id: str
    accuracy: float
    win_rate: float
    perplexity: float
    facts_kept: float

    @property
    def collapsed(self) -> bool:
        """Whether the text is no longer the base's."""
        return self.perplexity > 1.5 or self.facts_kept < 0.95


def measure(config: Config, anchors: Sequence[float], pairs: int) -> dict[float, list[UserText]]:
    """The users of a config by anchor, each trained on the first `pairs` pairs."""
    ready = prepare(config, read_inputs(config), check=False)
    adapted = ready.adapted
    rows = tokenize(ready.pairs.of(range(ready.pairs.users)), adapted.base.tokenizer, adapted.base.context)
    users = {user.user_id: user._replace(train=user.train[:pairs]) for user in rows}
    reference = Reference(adapted)
    reference.add(rows_ahead(adapted, users.values(), ()))
    cells = {}
    for anchor in anchors:
        dpo = config.dpo.model_copy(update={"anchor": anchor})
        engine = Engine(adapted, list(users.values()), reference, None, dpo, FleetSettings(slots=4), config.seed)
        adapters = {user.user_id: user.adapter for user in engine.run() if user.adapter is not None}
        flat, people = torch.stack(list(adapters.values())), [users[name] for name in adapters]
        cells[anchor] = []
        for name, measured in zip(adapters, ready.examination.measures(flat, people, [1.0] * len(flat)), strict=True):
            accuracy, won, text, tax = (
                measured.heldout_clean,
                measured.win_rate,
                measured.answer_perplexity,
                measured.tax,
            )
            assert accuracy and won and text and tax and tax.facts, "the config names no utilities or facts"  # noqa: PT018
            kept = (tax.facts.kept or 0) / tax.facts.base_right
            cells[anchor].append(UserText(name, accuracy.adapted, won.value, text.adapted / text.base, kept))
    adapted.close()
    return cells


def line(texts: Sequence[UserText]) -> str:
    """The cell of these users as a row: means with intervals, the worst text, and the users who collapsed."""
    columns = []
    for values in ([text.accuracy for text in texts], [text.win_rate for text in texts]):
        between = interval_over_users(values)
        ends = "" if between is None else f" ({between.low:.3f} to {between.high:.3f})"
        columns.append(f"{sum(values) / len(values):.3f}{ends}")
    worst, kept = max(text.perplexity for text in texts), min(text.facts_kept for text in texts)
    collapsed = sum(text.collapsed for text in texts)
    return " | ".join([*columns, f"{worst:.2f}", f"{1 - kept:.0%}", f"{collapsed} of {len(texts)}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--layers", nargs="+", default=["0.25", "all"], help="shares of upper layers, or all")
    parser.add_argument("--epochs", nargs="+", type=int, default=[3, 9])
    parser.add_argument("--anchors", nargs="+", type=float, default=[0.0, 0.3])
    parser.add_argument("--pairs", type=int, default=80)
    parser.add_argument("--json", action="store_true", help="a line per user in place of the table")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    if not options.json:
        print("| layers | epochs | anchor | accuracy | win rate | worst perplexity | most facts lost | collapsed |")
        print("|---|---|---|---|---|---|---|---|")
    for layers, epochs in product(options.layers, options.epochs):
        share = "all" if layers == "all" else f"{{top: {layers}}}"
        cell = [f"lora.layers={share}", f"dpo.epochs={epochs}"]
        config = read_config(options.config, [*options.overrides, *OFF, *cell])
        for anchor, texts in measure(config, options.anchors, options.pairs).items():
            if options.json:
                for text in texts:
                    print(json.dumps({"layers": layers, "epochs": epochs, "anchor": anchor} | text._asdict()))
            else:
                print(f"| {layers} | {epochs} | {anchor:g} | {line(texts)} |", flush=True)


if __name__ == "__main__":
    main()
