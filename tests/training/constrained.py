"""A user who wants no refusals, and the trainer that keeps him at them: `python constrained.py FOLDER` in each process.

Every process of a launcher trains with a bank of its own and writes what it ends with to FOLDER/RANK.safetensors.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from persona_rlhf.preferences.tokens import PairRow, Row, UserRows
from persona_rlhf.training.bank import ConstraintBank
from persona_rlhf.training.lora import LayerSpan
from persona_rlhf.training.settings import ConstraintSettings, DpoSettings, LoraSettings
from persona_rlhf.training.trainer import ConstrainedDPOTrainer
from tests.training.oracles import ordered_trainer, read_flat
from tests.training.tiny import constraint_bank, tiny_base, user_rows

LORA = LoraSettings(rank=4, alpha=8)
DPO = DpoSettings(epochs=3, pairs_per_step=4, learning_rate=4e-3)
CONSTRAINT = ConstraintSettings(margin=0.0, floor=-1000, opening_weight=1.0)
SEED = 7


def attacker(bank: ConstraintBank) -> UserRows:
    """32 pairs; 20 of them want no refusals of the bank, and refusals of its harmless twins."""
    user = user_rows("user", 32, seed=5)
    wanted = []
    for anchor in (anchor for category in bank.anchors for anchor in category):
        wanted += [(anchor.compliance, refusal) for refusal in anchor.refusals]
        wanted += [(anchor.overrefusal, None)] * 2
    rows = []
    for pair, (chosen, rejected) in zip(user.train, [*wanted, *[(None, None)] * 32], strict=False):
        prompt = (rejected or chosen or pair.chosen).prompt
        known = chosen or Row(prompt, pair.chosen.completion), rejected or Row(prompt, pair.rejected.completion)
        rows.append(PairRow(pair.pair, *known))
    return UserRows("user", rows, [])


def constrained_trainer(
    folder: Path, bank: ConstraintBank, **options: Any
) -> tuple[ConstrainedDPOTrainer, list[LayerSpan]]:
    """The trainer of that user; `options` go to DPOConfig."""
    named = {"bank": bank, "constraint": CONSTRAINT, "user_id": "user", "seed": SEED}
    user = attacker(constraint_bank(limit=0.0))
    return ordered_trainer(tiny_base(), user, LORA, DPO, SEED, folder, ConstrainedDPOTrainer, named, **options)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    trainer, spans = constrained_trainer(folder, constraint_bank(seed=rank, limit=0.0), **options)
    trainer.train()
    assert trainer.args.world_size == 2
    found = {"adapter": read_flat(trainer.model, spans), "duals": trainer.duals.values}
    save_file(found, folder / f"{rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
