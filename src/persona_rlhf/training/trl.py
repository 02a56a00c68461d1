"""TRL's DPOTrainer on token rows, and with the tier-one constraint: for one user, or for a base that users share."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import use_adapter

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.config.training import ConstraintSettings
from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.model_split import token_logps
from persona_rlhf.models.packing import collate
from persona_rlhf.training import checkpoint
from persona_rlhf.training.constraint import ConstraintData, constraint_of
from persona_rlhf.training.constraint_data import constraint_data_to_json
from persona_rlhf.training.user_state import DUAL_CEILING, DUAL_SMOOTHING, Duals


class TokenDPOTrainer(DPOTrainer):
    """DPOTrainer on a data set of token ids (`prompt_ids`, `chosen_ids`, `rejected_ids`), from the base's own template.
    SFTTrainer accepts token ids unchanged."""

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        return dataset


class AddedLossMixin:
    """Adds a term to the loss of the TRL trainer that follows in a class's bases."""

    def added_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Float[Tensor, ""] | None:
        """The term for a micro-batch, or None."""
        raise NotImplementedError

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """TRL's loss of a micro-batch, and the term if there is one."""
        trl: Any = super()
        result = trl.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        added = self.added_loss(model, inputs)
        if added is None:
            return result
        loss, outputs = result if return_outputs else (result, None)
        loss = loss + added.to(loss.device)
        return (loss, outputs) if return_outputs else loss


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the progress bars and closing lines of TRL, transformers and datasets."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


_FILE = "constraint.safetensors"


class ConstrainedDPOTrainer(AddedLossMixin, DPOTrainer):
    """TRL's DPO loss plus the penalty of `LagrangianConstraint`: the fleet's loss of one user.

    The penalty is added once per optimizer step, with its last micro-batch, on the same rows in every process. So the
    result depends neither on gradient accumulation nor on the number of processes. A held-out loss is DPO's alone. The
    reference is TRL's: the model without its PEFT adapters, `ref_model`, or the model before its first step. No gate
    judges the result.
    """

    args: DPOConfig

    def __init__(
        self,
        *args: Any,
        bank: ConstraintData,
        constraint: ConstraintSettings | None = None,
        user_id: str = "base",
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        """`bank` is the constraint data (see `policy_bank`). `user_id` and `seed` (else `args.seed`) set the order of
        its rows. All other arguments are DPOTrainer's."""
        settings = constraint or ConstraintSettings()
        if not settings.enabled:
            raise ValueError("the constraint is switched off (enabled=False); without it, use TRL's DPOTrainer")
        super().__init__(*args, **kwargs)
        self._demand_one_gradient()
        [self.bank] = broadcast_object_list([bank])  # sampled answers may differ between devices
        self.constraint = constraint_of(self.bank, settings, self.args.seed if seed is None else seed)
        self._user_id = user_id
        names, gain = len(self.bank.names), settings.gain
        self.duals = Duals(1, names, gain, DUAL_SMOOTHING, DUAL_CEILING, self.args.device)
        self._reference: dict[Row, float] = {}
        self._measured: tuple[Tensor, Tensor] | None = None
        self.add_callback(_AfterSteps(self))

    def _demand_one_gradient(self) -> None:
        """Rejects PEFT with gradient checkpointing under ZeRO-3. TRL checkpoints it re-entrantly, so each of our two
        forward passes has a backward pass of its own, and DeepSpeed takes a parameter's gradient once."""
        zero = self.args.deepspeed_plugin
        if zero and zero.zero_stage == 3 and self.args.gradient_checkpointing and isinstance(self.model, PeftModel):
            raise ValueError(
                "with an adapter, ZeRO-3 and gradient checkpointing, DeepSpeed cannot take the penalty's gradient; set "
                "gradient_checkpointing=False, or use ZeRO-2 or FSDP"
            )

    def added_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Float[Tensor, ""] | None:
        """The penalty, with the last micro-batch of a step of training."""
        if not (model.training and self.accelerator.sync_gradients):
            return None
        # the trainer divides what it gets by the number of micro-batches
        return self._penalty(model, inputs["input_ids"].device) * self.current_gradient_accumulation_steps

    def _penalty(self, model: nn.Module, device: torch.device) -> Float[Tensor, ""]:
        if not self._reference:
            self._reference = self._reference_logps(model, device)
        sample = self.constraint.sample(self._user_id, self.state.global_step)
        logps = row_logps(model, sample.rows, device)[None]
        base = logps.new_tensor([[self._reference[row] for row in sample.rows]])
        penalty = self.constraint.penalty([sample], logps, base, self.duals.values)
        self._measured = penalty.violations, penalty.seen
        return penalty.total[0]

    def _reference_logps(self, model: nn.Module, device: torch.device) -> dict[Row, float]:
        """The reference of all constraint rows: once, before the first step, when the model is wrapped for training."""
        rows = sorted(dict.fromkeys(self.bank.rows()), key=lambda row: len(row.prompt) + len(row.completion))
        each = 2 * (self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size)
        adapter: Any = nullcontext()
        peft = self.accelerator.unwrap_model(self.model)
        if self.ref_model is not None:
            model = self.ref_model
        elif isinstance(peft, PeftModel):
            adapter = use_adapter(peft, "ref" if "ref" in peft.peft_config else None)  # as TRL does
        was_training = model.training
        model.eval()
        with torch.no_grad(), adapter:
            logps = torch.cat([row_logps(model, rows[n : n + each], device) for n in range(0, len(rows), each)])
        model.train(was_training)
        return dict(zip(rows, logps.tolist(), strict=True))

    def end_step(self) -> None:
        """Moves the duals by the violations of the step just taken, equally in all processes."""
        assert self._measured is not None
        violations, seen = self._measured
        violations = self.accelerator.reduce(violations, reduction="mean")
        moved = torch.tensor([not self.accelerator.optimizer_step_was_skipped], device=violations.device)
        self.duals.update(violations, seen, moved)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the largest smoothed violation (nats over the limit) and dual variable to TRL's logs of training."""
        assert self.model is not None
        if self.model.training:
            logs["constraint/violation"] = self.duals.violations.max().item()
            logs["constraint/dual"] = self.duals.values.max().item()
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """TRL's training, from a checkpoint of this trainer if one is given. Raises InputError for any other."""
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if folder:
            self._restore(Path(folder) / _FILE)
        else:
            self.duals.reset(0)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_constraint(self, folder: Path) -> None:
        """Writes duals and reference log-probabilities into a checkpoint's folder."""
        tensors = {f"duals.{name}": value for name, value in vars(self.duals).items() if isinstance(value, Tensor)}
        reference = torch.tensor([self._reference[row] for row in self.bank.rows()], dtype=torch.float64)
        checkpoint.save(folder / _FILE, tensors | {"reference": reference}, {"bank": self._bank_hash()})

    def _restore(self, file: Path) -> None:
        if not file.exists():
            sentence = "no such file: the checkpoint was written without the constraint; start anew, or with DPOTrainer"
            raise InputError([Problem(str(file), None, None, sentence)])
        tensors, notes = checkpoint.load(file, self.args.device)
        if notes.get("bank") != self._bank_hash():
            sentence = (
                "the checkpoint was written with other constraint data; give the trainer that data, or start anew"
            )
            raise InputError([Problem(str(file), None, "bank", sentence)])
        self._reference = dict(zip(self.bank.rows(), tensors.pop("reference").tolist(), strict=True))
        for name, value in tensors.items():
            setattr(self.duals, name.removeprefix("duals."), value)

    def _bank_hash(self) -> str:
        return hashlib.sha256(constraint_data_to_json(self.bank).encode()).hexdigest()


class _AfterSteps(TrainerCallback):
    """Callback that moves the duals after each step, and writes them into each checkpoint."""

    def __init__(self, trainer: ConstrainedDPOTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._trainer.end_step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.should_save:
            assert args.output_dir is not None
            self._trainer.save_constraint(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def row_logps(model: nn.Module, rows: Sequence[Row], device: torch.device) -> Float[Tensor, " rows"]:
    """Log-probability of every completion (nats, summed to its end token) under any causal LM, wrapped or not."""
    batch = collate(rows, 0, device)
    logits: Tensor = model(input_ids=batch.input_ids, use_cache=False).logits
    return batch.to_grid(token_logps(batch.predictors(logits.flatten(0, 1)), batch.targets)).sum(1)
