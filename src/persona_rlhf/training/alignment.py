"""Aligning a base with TRL: SFT on refusals, then DPO on what it should prefer to what; all the while it keeps its own
answers to harmless prompts."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D
from trl import DPOConfig, SFTConfig, SFTTrainer  # type: ignore[attr-defined]  # exported lazily

from persona_rlhf.training.base import Base
from persona_rlhf.training.demonstrations import Demonstration, Demonstrations
from persona_rlhf.training.keeping import Keeping, Kept
from persona_rlhf.training.settings import AlignSettings, LoraSettings
from persona_rlhf.training.targets import targets
from persona_rlhf.training.token_trainer import TokenDPOTrainer, quiet

Say = Callable[[str], None]


class _Refusing(Keeping, SFTTrainer):
    """SFT that keeps the model's own answers."""


class _Preferring(Keeping, TokenDPOTrainer):
    """DPO that keeps them too."""


_SPOKEN = 10.0
"""Seconds between two lines about the training."""


def align(
    base: Base,
    shown: Demonstrations,
    settings: AlignSettings,
    lora: LoraSettings,
    seed: int,
    say: Say,
) -> None:
    """Trains the base's weights in place. The reference of DPO is the model after SFT.

    SFT learns the refusals alone. What the model is to answer it answers already, so that is not imitated but kept, in
    both stages (see `Kept`). What TRL changes beside the weights (token ids of the configs, wrappers) is put back.
    """
    model, sft, dpo = base.model, settings.sft, settings.dpo
    configs = copy.deepcopy((model.config, model.generation_config))
    pairs = [_compared(one) for one in shown.every if one.rejected]
    own = [one.chosen for one in shown.harmless]
    kept = Kept(model, own, settings.rows_per_step, seed) if own and settings.keep else None
    with tempfile.TemporaryDirectory(prefix="persona-rlhf-") as folder, torch.random.fork_rng():
        torch.manual_seed(seed)  # PEFT draws its first weights before TRL sets a seed

        def stage(name: str, trainer: type[Any], config: type[Any], rows: list[dict[str, Any]], **more: Any) -> None:
            adapters = _adapters(model, lora) if settings.weights == "lora" else None
            model.requires_grad_(adapters is None)
            options = _options(base, settings, folder, seed) | more
            with quiet():
                running = trainer(
                    model,
                    args=config(**options),
                    train_dataset=Dataset.from_list(rows),
                    processing_class=copy.deepcopy(base.tokenizer),
                    peft_config=adapters,
                    kept=kept,
                    keep=settings.keep,
                )
            running.remove_callback(PrinterCallback)
            running.add_callback(_Lines(name, say))
            running.train()
            if adapters is not None:
                running.model.merge_and_unload()
            vars(model).pop("forward", None)  # TRL's own, which the next trainer would wrap once more

        if sft.epochs and shown.hazardous:
            stage(
                "SFT",
                _Refusing,
                SFTConfig,
                [_labelled(one) for one in shown.hazardous],
                num_train_epochs=sft.epochs,
                learning_rate=sft.learning_rate,
                dataset_kwargs={"skip_prepare_dataset": True},
            )
        if dpo.epochs and pairs:
            stage(
                "DPO",
                _Preferring,
                DPOConfig,
                pairs,
                num_train_epochs=dpo.epochs,
                learning_rate=dpo.learning_rate,
                beta=dpo.beta,
                loss_type=["sigmoid", "sft"],
                loss_weights=[1.0, dpo.sft_weight],
                precompute_ref_log_probs=True,  # without a second model in memory, for all weights as for adapters
            )
    model.config, model.generation_config = configs
    model.requires_grad_(False).eval()


def _adapters(model: PreTrainedModel, lora: LoraSettings) -> LoraConfig:
    names = targets(model, lora).names
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=names,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in names),
        task_type="CAUSAL_LM",
    )


def _options(base: Base, settings: AlignSettings, folder: str, seed: int) -> dict[str, Any]:
    """What both stages say to TRL; the rows are token ids within the context, so nothing is cut."""
    on_gpu = base.device.type == "cuda"
    return {
        "output_dir": folder,
        "seed": seed,
        "per_device_train_batch_size": settings.rows_per_step,
        "max_length": None,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "bf16": on_gpu,
        "use_cpu": base.device.type == "cpu",
        "gradient_checkpointing": on_gpu,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": 10,
        "logging_first_step": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": on_gpu,
        "train_sampling_strategy": "group_by_length",  # less padding
        "remove_unused_columns": False,  # TRL would drop the lengths
    }


def _labelled(one: Demonstration) -> dict[str, Any]:
    prompt, completion = one.chosen
    labels = [-100] * len(prompt) + list(completion)
    return {"input_ids": [*prompt, *completion], "labels": labels, "length": len(labels)}


def _compared(one: Demonstration) -> dict[str, Any]:
    assert one.rejected is not None
    chosen, rejected = one.chosen, one.rejected
    return {
        "prompt_ids": list(chosen.prompt),
        "chosen_ids": list(chosen.completion),
        "rejected_ids": list(rejected.completion),
        "length": max(chosen.length, rejected.length),
    }


class _Lines(TrainerCallback):
    """Says now and then how far a stage is, and that it is done."""

    def __init__(self, name: str, say: Say) -> None:
        self._name, self._say, self._loss = name, say, float("nan")
        self._started = self._spoken = time.monotonic()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._loss = kwargs["logs"].get("loss", self._loss)
        now = time.monotonic()
        if now - self._spoken >= _SPOKEN and state.global_step < state.max_steps:
            self._spoken = now
            left = int((now - self._started) * (state.max_steps - state.global_step) / max(1, state.global_step))
            self._line(state, f"{left // 60}:{left % 60:02d} left")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._line(state, "done")

    def _line(self, state: TrainerState, how: str) -> None:
        steps = f"step {state.global_step:,} of {state.max_steps:,}"
        self._say(f"{self._name}: {steps}, loss {self._loss:.3f}, {how}")
