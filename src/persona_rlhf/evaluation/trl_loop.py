"""TRL's DPOTrainer with PEFT, one user after the other over one base: what the fleet is measured against."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, PrinterCallback
from trl import DPOConfig  # type: ignore[attr-defined]  # exported lazily

from persona_rlhf.training.base import Base
from persona_rlhf.training.lora import LayerSpan, fresh_adapter, matrices
from persona_rlhf.training.reference import Reference
from persona_rlhf.training.scheduler import UserSchedule, user_generator
from persona_rlhf.training.settings import DpoSettings, LoraSettings
from persona_rlhf.training.token_trainer import TokenDPOTrainer, quiet

TrlSetting = Literal["reference in every step", "precomputed reference", "shared reference columns"]
TRL_SETTINGS: tuple[TrlSetting, ...] = ("reference in every step", "precomputed reference", "shared reference columns")


class TrlRun(NamedTuple):
    """One user trained by TRL: the flat adapter in the fleet's layout, and what it cost (seconds of the clock)."""

    adapter: Float[Tensor, " params"]
    seconds: float


def _clock() -> float:
    return time.perf_counter()


class _Order(Sampler[int]):
    """Hands out the pairs in the order in which the fleet shows them, epoch by epoch."""

    def __init__(self, schedule: UserSchedule) -> None:
        rows = schedule.rows.train
        places = {id(row): n for n, row in enumerate(rows)}
        shown = [places[id(row)] for step in range(schedule.steps) for row in schedule.pairs(step)]
        self._epochs = iter([shown[n : n + len(rows)] for n in range(0, len(shown), len(rows))])
        self._length = len(rows)

    def __iter__(self) -> Iterator[int]:
        return iter(next(self._epochs))

    def __len__(self) -> int:
        return self._length


class _Trainer(TokenDPOTrainer):
    """DPOTrainer on rows in a given order."""

    order: _Order

    def _get_train_sampler(self, *_: object) -> _Order:
        return self.order


def train_user(
    base: Base,
    tokenizer: PreTrainedTokenizerBase,
    schedule: UserSchedule,
    spans: list[LayerSpan],
    lora: LoraSettings,
    dpo: DpoSettings,
    seed: int,
    setting: TrlSetting,
    reference: Reference | None,
    folder: Path,
    clock: Callable[[], float] = _clock,
) -> TrlRun:
    """Trains one user as a tuned loop over TRL would, from the fleet's first A and in the fleet's order.

    Charged: what every user needs (data set, trainer, PEFT's layers, training, taking the layers off again). Not
    charged: tokenization, logging, checkpoints, and setting the first A. Rows are token ids before the clock starts.
    `shared reference columns` is the fastest way that we know: reference log-probabilities come with the rows, from one
    pass over the base for all users, which neither hashes the model nor writes a cache (`reference` must know them).
    """
    shared = setting == "shared reference columns"
    started = clock()
    with quiet():
        trainer = _Trainer(
            base.model,
            args=_arguments(dpo, schedule, folder, base, precompute=setting == "precomputed reference"),
            train_dataset=_dataset(schedule, reference if shared else None),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.target_modules, task_type="CAUSAL_LM"
            ),
        )
    trainer.remove_callback(PrinterCallback)
    trainer.precompute_ref_logps = setting != "reference in every step"
    trainer.order = _Order(schedule)
    adapted = trainer.model
    assert isinstance(adapted, PeftModel)
    seconds = clock() - started
    with torch.no_grad():
        first = fresh_adapter(spans, user_generator(seed, schedule.rows.user_id, "init"))
        for span, (a, b) in zip(spans, matrices(first[None], spans), strict=True):
            own_a, own_b = _weights(adapted, span)
            own_a.copy_(a[0])
            own_b.copy_(b[0])
    started = clock()
    with quiet():
        trainer.train()
    seconds += clock() - started
    parts = [part.detach().flatten().cpu() for span in spans for part in _weights(adapted, span)]
    started = clock()
    adapted.unload()
    # TRL hangs a forward of its own on the base; the next user's would call it in turn, and so on.
    del base.model.forward
    base.model.eval()
    seconds += clock() - started
    return TrlRun(torch.cat(parts), seconds)


def _weights(model: PeftModel, span: LayerSpan) -> tuple[Tensor, Tensor]:
    layer: Any = model.get_submodule(f"base_model.model.{span.name}")
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def _dataset(schedule: UserSchedule, reference: Reference | None) -> datasets.Dataset:
    columns: dict[str, list[Any]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    rows = schedule.rows.train
    for row in rows:
        columns["prompt_ids"].append(list(row.chosen.prompt))
        columns["chosen_ids"].append(list(row.chosen.completion))
        columns["rejected_ids"].append(list(row.rejected.completion))
    if reference is not None:
        columns["ref_chosen_logps"] = [reference[row.chosen] for row in rows]
        columns["ref_rejected_logps"] = [reference[row.rejected] for row in rows]
    dataset = datasets.Dataset.from_dict(columns)
    # The cache of precomputed references is keyed by content: a second round must not find the first one's.
    dataset._fingerprint = secrets.token_hex(8)
    return dataset


def _arguments(dpo: DpoSettings, schedule: UserSchedule, folder: Path, base: Base, precompute: bool) -> DPOConfig:
    return DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=dpo.pairs_per_step,
        num_train_epochs=dpo.epochs,
        learning_rate=dpo.learning_rate,
        lr_scheduler_type="constant_with_warmup" if dpo.schedule == "constant" else dpo.schedule,
        warmup_steps=math.ceil(dpo.warmup * schedule.steps),
        max_grad_norm=dpo.max_grad_norm,
        weight_decay=dpo.weight_decay,
        beta=dpo.beta,
        loss_type=[dpo.loss],
        label_smoothing=dpo.label_smoothing,
        precompute_ref_log_probs=precompute,
        precompute_ref_batch_size=32,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=base.device.type == "cpu",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
