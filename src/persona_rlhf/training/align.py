"""Safety alignment of a base with TRL: SFT on refusals, then DPO, both with a KL divergence to the original base.

For every prompt there is an answer to learn and one to reject. All are made here: refusals are the model's own or a
file's, harmless answers are the model's own. No user's preferences are in them.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from jaxtyping import Float
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D
from trl import DPOConfig, SFTConfig, SFTTrainer

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.config.training import AlignSettings, LoraSettings
from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import Row, prompt_ids, text_row
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import Base, multiplies_bfloat16
from persona_rlhf.models.generation import Generated
from persona_rlhf.models.merge import merge_adapter
from persona_rlhf.models.packing import collate
from persona_rlhf.models.target_layers import target_layers
from persona_rlhf.policy.hazards import Probe, RefusalText, draw_refusal
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.training.trl import AddedLossMixin, TokenDPOTrainer, quiet


class Demonstration(NamedTuple):
    """Two answers to one prompt; `rejected` is None if the model has nothing to unlearn."""

    chosen: Row
    rejected: Row | None


class Demonstrations(NamedTuple):
    """`self_refused`: the number of hazardous ones with the model's own refusal. `left_out`: that of the model's
    refusals of harmless prompts."""

    hazardous: list[Demonstration]
    harmless: list[Demonstration]
    self_refused: int
    left_out: int

    @property
    def every(self) -> list[Demonstration]:
        return [*self.hazardous, *self.harmless]


def make_demonstrations(
    adapted: AdaptedModel,
    probes: Sequence[Probe],
    ordinary: Sequence[str],
    refusals: Sequence[RefusalText],
    tries: int,
    max_new_tokens: int,
    seed: int,
    own_refusals: bool = True,
) -> Demonstrations:
    """Demonstrations from probes of `train`, their benign twins and ordinary prompts.

    Answers are sampled at temperature 1: fair samples of a model leave it unchanged, and greedy ones would sharpen it.
    Every prompt is sampled and shown `tries` times. For a probe, the model's own refusal is chosen (else a written one,
    each time another) and a compliance rejected (else an answer to the twin, which has similar words). For a harmless
    prompt, the model's own answer is chosen, cut at the token limit, and a written refusal rejected. Without
    `own_refusals` no probe is sampled. Raises InputError if there are no train probes.
    """
    train = [probe for probe in probes if probe.split == "train"]
    if not train:
        raise InputError([Problem("policy", None, "documents", "no probe of the policy is of `train`; add some")])
    tokenizer, end = adapted.base.tokenizer, adapted.base.eos_ids[:1]
    rng = Random(f"demonstrations {seed}")
    harmless = list(dict.fromkeys([*(probe.twin for probe in train if probe.twin), *ordinary]))

    def ids(text: str) -> tuple[int, ...]:
        return prompt_ids((Message("user", text),), tokenizer)

    def refuses(answer: Generated) -> bool:
        return is_refusal(str(tokenizer.decode(list(answer.ids), skip_special_tokens=True)))

    def row(prompt: str, answer: Generated) -> Row:
        return Row(ids(prompt), answer.ids + (end if answer.finished else ()))

    def written(prompt: str, category: str | None) -> Row:
        return text_row(prompt, draw_refusal(refusals, category, rng, prompt), tokenizer)

    with adapted.using(None):
        prompts = [ids(probe.prompt) for probe in train for _ in range(tries)] if own_refusals else []
        [to_probes] = adapted.generate([prompts], max_new_tokens, 1.0, seed)
        prompts = [ids(prompt) for prompt in harmless for _ in range(tries)]
        [to_harmless] = adapted.generate([prompts], max_new_tokens, 1.0, seed + 1)
    answers: dict[str, list[Row]] = {}
    for n, prompt in enumerate(harmless):
        tried = to_harmless[n * tries : (n + 1) * tries]
        answers[prompt] = [row(prompt, answer) for answer in tried if answer.ids and not refuses(answer)]
    hazardous, self_refused = [], 0
    for n, probe in enumerate(train):
        tried = to_probes[n * tries : (n + 1) * tries]
        refused = [row(probe.prompt, answer) for answer in tried if answer.finished and refuses(answer)]
        complied = [row(probe.prompt, answer) for answer in tried if answer.ids and not refuses(answer)]
        stand_ins = [Row(ids(probe.prompt), twin.completion) for twin in answers.get(probe.twin or "", [])]
        rejected = complied or stand_ins
        for turn in range(tries):
            chosen = refused[turn % len(refused)] if refused else written(probe.prompt, probe.category)
            hazardous.append(Demonstration(chosen, rejected[turn % len(rejected)] if rejected else None))
        self_refused += tries * bool(refused)
    kept = [Demonstration(one, written(prompt, None)) for prompt, several in answers.items() for one in several]
    context, left_out = adapted.base.context, len(harmless) * tries - len(kept)
    return Demonstrations(_fitting(hazardous, context), _fitting(kept, context), self_refused, left_out)


def _fitting(demonstrations: Sequence[Demonstration], context: int) -> list[Demonstration]:
    """The demonstrations no longer than the base's context."""
    return [
        Demonstration(chosen, rejected if rejected and rejected.length <= context else None)
        for chosen, rejected in demonstrations
        if chosen.length <= context
    ]


_STRETCH = 50
"""Batches among which rows are sorted by length."""


class KlToBase:
    """KL divergence of a model in training from its original, KL(original || model), in nats per token, on the model's
    own answers to harmless prompts.

    Learning sampled answers has the same gradient on average. Here every token counts with the whole vocabulary, so a
    few answers suffice and none is memorised. It needs a second copy of the weights, made here.
    """

    def __init__(self, model: PreTrainedModel, rows: Sequence[Row], batch_size: int, seed: int) -> None:
        self._original = copy.deepcopy(model).requires_grad_(False).eval()
        self._batches = _batches(rows, batch_size, Random(f"kept {seed}"))

    def divergence(self, model: nn.Module) -> Float[Tensor, ""]:
        """The divergence on the next rows, with gradient."""
        batch = collate(next(self._batches), 0, self._original.device)

        def log_probs(of: nn.Module) -> Float[Tensor, "tokens vocabulary"]:
            logits: Tensor = of(input_ids=batch.input_ids, use_cache=False).logits
            return batch.predictors(logits.flatten(0, 1)).float().log_softmax(-1)

        with torch.no_grad():
            original = log_probs(self._original)
        return nn.functional.kl_div(log_probs(model), original, reduction="sum", log_target=True) / len(original)


class KlToBaseMixin(AddedLossMixin):
    """Adds `keep` times the divergence to the loss of the TRL trainer that follows in a class's bases."""

    def __init__(self, *args: Any, kept: KlToBase | None, keep: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept, self._keep = kept, keep

    def added_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Float[Tensor, ""] | None:
        """The weighted divergence."""
        return None if self._kept is None or not self._keep else self._keep * self._kept.divergence(model)


def _batches(rows: Sequence[Row], size: int, rng: Random) -> Iterator[list[Row]]:
    """Endless batches: every row once per pass, in random order, rows of similar length together."""
    while True:
        order = rng.sample(rows, len(rows))
        stretches = [order[n : n + size * _STRETCH] for n in range(0, len(order), size * _STRETCH)]
        alike = [sorted(stretch, key=lambda row: row.length) for stretch in stretches]
        batches = [stretch[n : n + size] for stretch in alike for n in range(0, len(stretch), size)]
        rng.shuffle(batches)
        yield from batches


_FOLDERS = {"SFT": "1-sft", "DPO": "2-dpo"}
"""Folders of the stages' adapters, in the order in which they were merged."""


class StageProgress(NamedTuple):
    """A stage of training under way (SFT or DPO): its steps, the last loss, and seconds left at the mean pace."""

    stage: str
    step: int
    steps: int
    loss: float
    seconds_left: float


OnStage = Callable[[StageProgress], None]
"""Receives the progress of the stages: at intervals, and at the end of each (`step` equals `steps`)."""


class _SftTrainer(KlToBaseMixin, SFTTrainer):
    """SFT with the divergence from the original."""


class _DpoTrainer(KlToBaseMixin, TokenDPOTrainer):
    """DPO with the divergence from the original."""


def align(
    base: Base,
    demonstrations: Demonstrations,
    settings: AlignSettings,
    lora: LoraSettings,
    seed: int,
    on_stage: OnStage = lambda _: None,
    adapters_to: Path | None = None,
) -> None:
    """Trains the base's weights in place. The reference of DPO is the model after SFT.

    The adapter of a stage is rounded to bfloat16, written to `adapters_to` as PEFT reads it, and merged.

    SFT learns the refusals alone. The model's own answers are preserved by `KlToBase` in both stages, not imitated.
    Everything that TRL changes beside the weights (token ids of the configs, wrappers) is restored.
    """
    model, sft, dpo = base.model, settings.sft, settings.dpo
    configs = copy.deepcopy((model.config, model.generation_config))
    pairs = [_preference_row(one) for one in demonstrations.every if one.rejected]
    answers = [one.chosen for one in demonstrations.harmless]
    kept = KlToBase(model, answers, settings.rows_per_step, seed) if answers and settings.keep else None
    with tempfile.TemporaryDirectory(prefix="persona-rlhf-") as scratch, torch.random.fork_rng():
        torch.manual_seed(seed)  # PEFT draws its first weights before TRL sets a seed

        def stage(name: str, trainer: type[Any], config: type[Any], rows: list[dict[str, Any]], **more: Any) -> None:
            adapters = _adapters(model, lora) if settings.weights == "lora" else None
            model.requires_grad_(adapters is None)
            options = _options(base, settings, scratch, seed) | more
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
            running.add_callback(_StageReports(name, on_stage))
            running.train()
            if adapters is not None:
                running.model.peft_config["default"].base_model_name_or_path = ""  # a path of this machine
                _round_adapter(running.model)
                if adapters_to is not None:
                    folder = adapters_to / _FOLDERS[name]
                    running.model.save_pretrained(folder)
                    (folder / "README.md").unlink()  # a form to fill in
                merge_adapter(running.model)
            vars(model).pop("forward", None)  # TRL's wrapper, which the next trainer would wrap again

        if sft.epochs and demonstrations.hazardous:
            stage(
                "SFT",
                _SftTrainer,
                SFTConfig,
                [_sft_row(one) for one in demonstrations.hazardous],
                num_train_epochs=sft.epochs,
                learning_rate=sft.learning_rate,
                dataset_kwargs={"skip_prepare_dataset": True},
            )
        if dpo.epochs and pairs:
            stage(
                "DPO",
                _DpoTrainer,
                DPOConfig,
                pairs,
                num_train_epochs=dpo.epochs,
                learning_rate=dpo.learning_rate,
                beta=dpo.beta,
                loss_type=["sigmoid", "sft"],
                loss_weights=[1.0, dpo.sft_weight],
                precompute_ref_log_probs=True,  # no second model in memory, for all weights as for adapters
            )
    model.config, model.generation_config = configs
    model.requires_grad_(False).eval()


def _round_adapter(model: PeftModel) -> None:
    """Rounds the matrices of the adapter to bfloat16: the shipped ones are those that were merged."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_A.bfloat16()
            layer.lora_B.bfloat16()


def _adapters(model: PreTrainedModel, lora: LoraSettings) -> LoraConfig:
    names = target_layers(model, lora).names
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=names,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in names),
        task_type="CAUSAL_LM",
    )


def _options(base: Base, settings: AlignSettings, folder: str, seed: int) -> dict[str, Any]:
    """Options of both stages for TRL; the rows are token ids within the context, so nothing is cut."""
    on_gpu = base.device.type == "cuda"
    return {
        "output_dir": folder,
        "seed": seed,
        "per_device_train_batch_size": settings.rows_per_step,
        "max_length": None,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "bf16": multiplies_bfloat16(base.device),
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


def _sft_row(one: Demonstration) -> dict[str, Any]:
    prompt, completion = one.chosen
    labels = [-100] * len(prompt) + list(completion)
    return {"input_ids": [*prompt, *completion], "labels": labels, "length": len(labels)}


def _preference_row(one: Demonstration) -> dict[str, Any]:
    assert one.rejected is not None
    chosen, rejected = one.chosen, one.rejected
    return {
        "prompt_ids": list(chosen.prompt),
        "chosen_ids": list(chosen.completion),
        "rejected_ids": list(rejected.completion),
        "length": max(chosen.length, rejected.length),
    }


class _StageReports(TrainerCallback):
    """Callback that reports the progress of a stage after each step."""

    def __init__(self, name: str, on_stage: OnStage) -> None:
        self._name, self._on_stage, self._loss = name, on_stage, float("nan")
        self._started = time.monotonic()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._loss = kwargs["logs"].get("loss", self._loss)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step < state.max_steps:
            self._report(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._report(state)

    def _report(self, state: TrainerState) -> None:
        step, steps = state.global_step, state.max_steps
        left = (time.monotonic() - self._started) / max(1, step) * (steps - step)
        self._on_stage(StageProgress(self._name, step, steps, self._loss, left))
