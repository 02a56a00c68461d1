"""ConstrainedDPOTrainer."""

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
from persona_rlhf.training.constraint import ConstraintBank, ConstraintLogps, penalty
from persona_rlhf.training.constraint_data import bank_to_json
from persona_rlhf.training.user_state import DUAL_CEILING, DUAL_SMOOTHING, Duals

# ----------------------------------------------------------------------------------------------------
# TRL on rows that are token ids already, and without a word.
# ----------------------------------------------------------------------------------------------------


class TokenDPOTrainer(DPOTrainer):
    """DPOTrainer whose data set holds `prompt_ids`, `chosen_ids` and `rejected_ids`, as the base's own template gives
    them (SFTTrainer takes token ids as it is)."""

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        return dataset


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Progress bars and closing lines of TRL, transformers and datasets go nowhere."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# ----------------------------------------------------------------------------------------------------
# TRL's DPOTrainer with tier one as a constraint: for one user, or for a base that users will share.
# ----------------------------------------------------------------------------------------------------

_FILE = "constraint.safetensors"


class ConstrainedDPOTrainer(DPOTrainer):
    """`L = L_DPO + penalty`, see `constraint.penalty`: the fleet's loss of one user, over TRL's own DPO loss.

    The penalty is counted once an optimizer step, with its last micro-batch, on the same rows in every process: what
    is trained depends neither on gradient accumulation nor on the number of processes. A held-out loss is DPO's alone.
    Only these rows of the `bank` are compared with the reference: what TRL takes for one (the model without its PEFT
    adapters, `ref_model`, or the model before its first step). What comes out has passed no gate.
    """

    args: DPOConfig

    def __init__(
        self,
        *args: Any,
        bank: ConstraintBank,
        constraint: ConstraintSettings | None = None,
        user_id: str = "base",
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        """All else is DPOTrainer's; `user_id` and `seed` (else `args.seed`) say in which order the bank's rows come."""
        self.constraint = constraint or ConstraintSettings()
        if not self.constraint.enabled:
            raise ValueError("the constraint is switched off (enabled=False); without it, use TRL's DPOTrainer")
        super().__init__(*args, **kwargs)
        self._demand_one_gradient()
        [self.bank] = broadcast_object_list([bank])  # its answers were sampled, perhaps on unlike devices
        self._walk = self.bank.walk(self.constraint, self.args.seed if seed is None else seed, user_id)
        gain, categories = self.constraint.gain, len(self.bank.names)
        self.duals = Duals(1, categories, gain, DUAL_SMOOTHING, DUAL_CEILING, self.args.device)
        self._reference: dict[Row, float] = {}
        self._measured: tuple[Tensor, Tensor] | None = None
        self.add_callback(_AfterSteps(self))

    def _demand_one_gradient(self) -> None:
        """TRL checkpoints PEFT under ZeRO-3 re-entrantly: a backward pass for each of our two forward passes. DeepSpeed
        takes a parameter's gradient once."""
        zero = self.args.deepspeed_plugin
        if zero and zero.zero_stage == 3 and self.args.gradient_checkpointing and isinstance(self.model, PeftModel):
            raise ValueError(
                "with an adapter, ZeRO-3 and gradient checkpointing, DeepSpeed cannot take the penalty's gradient; set "
                "gradient_checkpointing=False, or use ZeRO-2 or FSDP"
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """TRL's loss of a micro-batch, and with the last one of a step the penalty."""
        found: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
        if not (model.training and self.accelerator.sync_gradients):
            return found
        loss, outputs = found if return_outputs else (found, None)
        # the trainer divides what it gets by the number of micro-batches
        added = self._penalty(model, inputs["input_ids"].device) * self.current_gradient_accumulation_steps
        loss = loss + added.to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def _penalty(self, model: nn.Module, device: torch.device) -> Float[Tensor, ""]:
        if not self._reference:
            self._reference = self._reference_logps(model, device)
        draw = self._walk.at(self.state.global_step)
        watched = row_logps(model, draw.rows, device)[None].split([len(column) for column in draw.columns], dim=1)
        duals = self.duals.values
        found = penalty(self.bank, [draw], ConstraintLogps(*watched), self._reference, duals, self.constraint)
        self._measured = found.violations, found.seen
        return found.total[0]

    def _reference_logps(self, model: nn.Module, device: torch.device) -> dict[Row, float]:
        """Of all rows of the bank, once: before the first step, when the model is wrapped as it will be trained."""
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
            found = torch.cat([row_logps(model, rows[n : n + each], device) for n in range(0, len(rows), each)])
        model.train(was_training)
        return dict(zip(rows, found.tolist(), strict=True))

    def end_step(self) -> None:
        """Moves the duals by what was measured in the step just taken, alike in all processes."""
        assert self._measured is not None
        violations, seen = self._measured
        violations = self.accelerator.reduce(violations, reduction="mean")
        moved = torch.tensor([not self.accelerator.optimizer_step_was_skipped], device=violations.device)
        self.duals.update(violations, seen, moved)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's figures, and while it trains the largest smoothed violation (nats over the limit) and dual variable."""
        assert self.model is not None
        if self.model.training:
            logs["constraint/violation"] = self.duals.violations.max().item()
            logs["constraint/dual"] = self.duals.values.max().item()
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """TRL's, from a checkpoint of this trainer where one is given. Raises InputError for any other."""
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
        known = torch.tensor([self._reference[row] for row in self.bank.rows()], dtype=torch.float64)
        checkpoint.save(folder / _FILE, tensors | {"reference": known}, {"bank": self._bank_hash()})

    def _restore(self, file: Path) -> None:
        if not file.exists():
            sentence = "no such file: the checkpoint was written without the constraint; start anew, or with DPOTrainer"
            raise InputError([Problem(str(file), None, None, sentence)])
        tensors, notes = checkpoint.load(file, self.args.device)
        if notes.get("bank") != self._bank_hash():
            sentence = (
                "the checkpoint was written with another constraint bank; give the trainer that one or start anew"
            )
            raise InputError([Problem(str(file), None, "bank", sentence)])
        self._reference = dict(zip(self.bank.rows(), tensors.pop("reference").tolist(), strict=True))
        for name, value in tensors.items():
            setattr(self.duals, name.removeprefix("duals."), value)

    def _bank_hash(self) -> str:
        return hashlib.sha256(bank_to_json(self.bank).encode()).hexdigest()


class _AfterSteps(TrainerCallback):
    """Tells a trainer when a step is done and when a checkpoint is written."""

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
