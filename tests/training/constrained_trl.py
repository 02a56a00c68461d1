"""A user that wants no refusals, and the trainer that preserves them: `accelerate launch constrained_trl.py FOLDER`.

Every process trains an adapter and then all weights, with a bank of its own, and writes the duals that it ends with to
FOLDER/RANK.safetensors; the models are saved as TRL saves them, to FOLDER/adapter and FOLDER/weights.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM
from trl import DPOConfig

sys.path.insert(0, str(Path(__file__).parents[2]))

from persona_rlhf.config.training import ConstraintSettings, DpoSettings, LoraSettings
from persona_rlhf.data.tokenize import PairRow, Row, UserRows
from persona_rlhf.models.multi_lora import LayerSpan
from persona_rlhf.training.constraint import ConstraintData
from persona_rlhf.training.trl import ConstrainedDPOTrainer
from tests.models.tiny import constraint_bank, tiny_base, tiny_tokenizer, user_rows
from tests.training.oracles import OPTIONS, ordered_trainer

LORA = LoraSettings(rank=4, alpha=8)
DPO = DpoSettings(epochs=3, pairs_per_step=4, learning_rate=4e-3)
CONSTRAINT = ConstraintSettings(margin=0.05, floor=-1000, opening_weight=1.0)  # 0 would leave steps to rounding
SEED = 7
STEPS = {"max_steps": 6}
"""For a run that is launched."""


def attacker(bank: ConstraintData) -> UserRows:
    """32 pairs; 20 of them want no refusals of the bank, and refusals of its harmless twins."""
    user = user_rows("user", 32, seed=5)
    wanted = []
    for example in (example for category in bank.examples for example in category):
        wanted += [(example.compliance, refusal) for refusal in example.refusals]
        wanted += [(example.overrefusal, None)] * 2
    rows = []
    for pair, (chosen, rejected) in zip(user.train, [*wanted, *[(None, None)] * 32], strict=False):
        prompt = (rejected or chosen or pair.chosen).prompt
        known = chosen or Row(prompt, pair.chosen.completion), rejected or Row(prompt, pair.rejected.completion)
        rows.append(PairRow(pair.pair, *known))
    return UserRows("user", rows, [])


def constrained_trainer(
    folder: Path, bank: ConstraintData, **options: Any
) -> tuple[ConstrainedDPOTrainer, list[LayerSpan]]:
    """The trainer of that user; `options` go to DPOConfig."""
    named = {"bank": bank, "constraint": CONSTRAINT, "user_id": "user", "seed": SEED}
    user = attacker(constraint_bank(limit=0.0))
    return ordered_trainer(tiny_base(), user, LORA, DPO, SEED, folder, ConstrainedDPOTrainer, named, **options)


def trainer_of_all_weights(
    model: nn.Module, folder: Path, bank: ConstraintData, ref_model: nn.Module | None = None, **options: Any
) -> ConstrainedDPOTrainer:
    """The trainer without PEFT, on pairs of no interest in their order; `options` go to DPOConfig."""
    data = [{"prompt": f"w{n} w3", "chosen": f" w{n + 1} w5", "rejected": f" w{n + 2}"} for n in range(4, 28)]
    arguments = {"learning_rate": 1e-3, "per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"}
    return ConstrainedDPOTrainer(
        model,
        ref_model,
        args=DPOConfig(str(folder), **arguments | OPTIONS | {"save_strategy": "no"} | options),
        train_dataset=Dataset.from_list(data),
        processing_class=tiny_tokenizer(),
        bank=bank,
        constraint=CONSTRAINT.model_copy(update={"margin": 0.05}),  # at 0 the hinges' first gradient hangs on rounding
    )


def train_both(folder: Path, bank: ConstraintData, **options: Any) -> dict[str, torch.Tensor]:
    """Trains an adapter and all weights of FOLDER/base, saves both, and says where the duals ended."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    trainers = {
        "adapter": constrained_trainer(folder, bank, **options)[0],
        "weights": trainer_of_all_weights(model, folder, bank, **options),
    }
    for name, trainer in trainers.items():
        trainer.train()
        trainer.save_model(str(folder / name))
    return {name: trainer.duals.values for name, trainer in trainers.items()}


def shard_on_cpu() -> None:
    """Accelerate shards over GPUs alone. It is told that gloo's processes are some; all that follows is its own way."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    sharded = {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & os.environ.keys()
    if sharded:
        shard_on_cpu()
    options = STEPS | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "use_cpu": not sharded}
    rank = int(os.environ["RANK"])
    bank = constraint_bank(seed=rank, limit=0.0)
    checkpointed = True
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        with pytest.raises(ValueError, match="use ZeRO-2 or FSDP"):
            constrained_trainer(folder, bank, gradient_checkpointing=True, **options)
        checkpointed = False
    duals = train_both(folder, bank, gradient_checkpointing=checkpointed, **options)
    save_file(duals, folder / f"{rank}.safetensors")
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
