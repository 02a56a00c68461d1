"""The slow and plain versions that the fleet is held against: PEFT models with one user's adapter."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer

from persona_rlhf.config.training import DpoSettings, LoraSettings
from persona_rlhf.data.tokenize import Row, UserRows
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import Base
from persona_rlhf.models.multi_lora import LayerSpan, attach, detach, fresh_adapter
from persona_rlhf.models.target_layers import adaptable_layers
from persona_rlhf.training.user_state import UserSchedule, user_generator

OPTIONS: dict[str, Any] = {
    "optim": "adamw_torch",
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "logging_strategy": "steps",
    "logging_steps": 1,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
"""What a DPOConfig says in tests: fp32 on the CPU, each step logged, and nothing said on the way."""


def peft_config(lora: LoraSettings) -> LoraConfig:
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.target_modules,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def weights(model: PeftModel, span: LayerSpan) -> tuple[Tensor, Tensor]:
    """PEFT's own A and B of one layer."""
    layer = model.get_submodule(f"base_model.model.{span.name}")
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def load_flat(model: PeftModel, spans: list[LayerSpan], flat: Tensor) -> None:
    """Copies one user's flat vector into a PEFT model, piece by piece."""
    with torch.no_grad():
        for span in spans:
            a, b = weights(model, span)
            a.copy_(flat[span.start : span.b_start].view_as(a))
            b.copy_(flat[span.b_start : span.stop].view_as(b))


def read_flat(model: PeftModel, spans: list[LayerSpan], gradients: bool = False) -> Tensor:
    """A PEFT model's adapter, or its gradient, as a flat vector."""
    parts = [part for span in spans for part in weights(model, span)]
    return torch.cat([(part.grad if gradients else part.detach()).flatten() for part in parts])


def peft_model(adapted: AdaptedModel, lora: LoraSettings, flat: Tensor) -> PeftModel:
    """PEFT's model of one user over a copy of the base."""
    model = copy.deepcopy(adapted.base.model)
    detach(model, list(adapted.spans))
    config = peft_config(lora.model_copy(update={"target_modules": list(adapted.spans)}))
    config.fan_in_fan_out = any(adapted.layer(span).transposed for span in adapted.spans.values())
    wrapped = get_peft_model(model, config).eval()
    load_flat(wrapped, list(adapted.spans.values()), flat)
    return wrapped


def plain_logp(model: torch.nn.Module, row: Row) -> Tensor:
    """log P(completion | prompt) in nats: one row, no padding, the whole softmax."""
    ids = torch.tensor([[*row.prompt, *row.completion]])
    logps = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
    start = len(row.prompt) - 1
    targets = torch.tensor(row.completion)
    return logps[start : start + len(targets)].gather(1, targets[:, None]).sum()


def ordered_trainer(
    base: Base,
    user: UserRows,
    lora: LoraSettings,
    dpo: DpoSettings,
    seed: int,
    folder: Path,
    kind: type[DPOTrainer] = DPOTrainer,
    named: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[DPOTrainer, list[LayerSpan]]:
    """A TRL trainer over PEFT that is about to train one user from our first A and in our order, and where A lies.

    Only the sampler is replaced: TRL tokenizes, collates, runs the reference, clips and steps as it always does.
    `named` go to the trainer, `options` to DPOConfig.
    """
    spans = attach(base.model, adaptable_layers(base.model, lora.target_modules), lora.rank)
    detach(base.model, list(spans))
    words = base.tokenizer

    def text(ids: tuple[int, ...]) -> str:
        return " " + " ".join(words.convert_ids_to_tokens(list(ids)))

    pairs = [(pair.chosen.prompt, pair.chosen.completion, pair.rejected.completion) for pair in user.train]
    data = [
        {"prompt": text(prompt), "chosen": text(chosen), "rejected": text(rejected)}
        for prompt, chosen, rejected in pairs
    ]
    schedule = UserSchedule(user, dpo, seed)

    class Trainer(kind):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, *_: object) -> Sampler[int]:
            trainer = self

            class Ours(Sampler[int]):
                def __iter__(self) -> Iterator[int]:
                    return iter(schedule._orders[int(trainer.state.epoch or 0)])

                def __len__(self) -> int:
                    return len(user.train)

            return Ours()

    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": dpo.pairs_per_step,
        "num_train_epochs": dpo.epochs,
        "learning_rate": dpo.learning_rate,
        "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(dpo.schedule, dpo.schedule),
        "warmup_steps": math.ceil(dpo.warmup * schedule.steps),
        "max_grad_norm": dpo.max_grad_norm,
        "weight_decay": dpo.weight_decay,
        "beta": dpo.beta,
        "loss_type": [dpo.loss, "sft"] if dpo.anchor else [dpo.loss],
        "loss_weights": [1.0, dpo.anchor] if dpo.anchor else None,
        "save_strategy": "no",
    }
    trainer = Trainer(
        base.model,
        args=DPOConfig(**arguments | OPTIONS | options),
        train_dataset=Dataset.from_list(data),
        processing_class=words,
        peft_config=peft_config(lora),
        **named or {},
    )
    trainer.remove_callback(PrinterCallback)
    rows = trainer.train_dataset
    assert [(tuple(r["prompt_ids"]), tuple(r["chosen_ids"]), tuple(r["rejected_ids"])) for r in rows] == pairs
    first = fresh_adapter(list(spans.values()), user_generator(seed, user.user_id, "init"))
    load_flat(trainer.model, list(spans.values()), first)
    return trainer, list(spans.values())


def trl_run(
    base: Base, user: UserRows, lora: LoraSettings, dpo: DpoSettings, seed: int, folder: Path
) -> tuple[Tensor, list[float]]:
    """Trains one user with TRL's DPOTrainer and PEFT, see `ordered_trainer`; the flat adapter and losses."""
    trainer, spans = ordered_trainer(base, user, lora, dpo, seed, folder)
    trainer.train()
    return read_flat(trainer.model, spans), [line["loss"] for line in trainer.state.log_history if "loss" in line]
