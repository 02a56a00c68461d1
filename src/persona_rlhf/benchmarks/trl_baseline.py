"""The baseline of `bench`: TRL's DPOTrainer with PEFT, one user after the other; and the workloads that both train."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.utils.data import Sampler
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
)
from trl import DPOConfig

from persona_rlhf.common.files import find
from persona_rlhf.config.training import BaseSettings, DpoSettings, LoraSettings
from persona_rlhf.data.pairs import Message, PreferencePair, read_pairs
from persona_rlhf.data.tokenize import PairRow, Row, UserRows, tokenize
from persona_rlhf.models.base import Base, load_base, multiplies_bfloat16, set_product_precision
from persona_rlhf.models.multi_lora import LayerSpan, attach, detach, fresh_adapter, lora_matrices
from persona_rlhf.models.target_layers import adaptable_layers
from persona_rlhf.training.cache import Reference
from persona_rlhf.training.constraint import ConstraintData, ConstraintExample
from persona_rlhf.training.trl import TokenDPOTrainer, quiet
from persona_rlhf.training.user_state import UserSchedule, user_generator

TrlSetting = Literal["reference in every step", "precomputed reference", "shared reference columns"]
TRL_SETTINGS: tuple[TrlSetting, ...] = ("reference in every step", "precomputed reference", "shared reference columns")


class TrlRun(NamedTuple):
    """One user trained by TRL: the flat adapter in the fleet's layout, and the seconds of the clock."""

    adapter: Float[Tensor, " params"]
    seconds: float


def _wall_clock() -> float:
    return time.perf_counter()


class _Order(Sampler[int]):
    """Samples the pairs in the order in which the fleet trains on them, epoch by epoch."""

    def __init__(self, schedule: UserSchedule) -> None:
        rows = schedule.rows.train
        places = {id(row): n for n, row in enumerate(rows)}
        order = [places[id(row)] for step in range(schedule.steps) for row in schedule.pairs(step)]
        self._epochs = iter([order[n : n + len(rows)] for n in range(0, len(order), len(rows))])
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
    clock: Callable[[], float] = _wall_clock,
) -> TrlRun:
    """Trains one user as a tuned loop over TRL would, from the fleet's first A and in the fleet's order.

    The clock counts what every user needs: data set, trainer, PEFT's layers, training, and removing the layers. It does
    not count tokenization, logging, checkpoints, and setting the first A. Rows are token ids before the clock starts.
    `shared reference columns` is the fastest setting: reference log-probabilities come with the rows, from one pass
    over the base for all users, which neither hashes the model nor writes a cache (`reference` must hold them).
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
        for span, (a, b) in zip(spans, lora_matrices(first[None], spans), strict=True):
            weight_a, weight_b = _weights(adapted, span)
            weight_a.copy_(a[0])
            weight_b.copy_(b[0])
    started = clock()
    with quiet():
        trainer.train()
    seconds += clock() - started
    parts = [part.detach().flatten().cpu() for span in spans for part in _weights(adapted, span)]
    started = clock()
    adapted.unload()
    # TRL replaces the base's forward; the next user's trainer would wrap that again, and so on.
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
    # The cache of precomputed references is keyed by content: a second round must not reuse the first one's.
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
        loss_type=[dpo.loss, "sft"] if dpo.anchor else [dpo.loss],
        loss_weights=[1.0, dpo.anchor] if dpo.anchor else None,
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


Shape = Literal["bundled", "192x4", "256x6", "512x8"]
VOCABULARY = 1536
SEED = 0
LENGTHS = (12, 30)
"""Least and most tokens of a random prompt or answer."""
PAIRS_AND_EPOCHS = {"bundled": (80, 3), "192x4": (80, 3), "256x6": (32, 2), "512x8": (16, 2)}
"""A user's work: less for larger shapes, so that each takes minutes on a CPU."""


class Workload(NamedTuple):
    """The users and the base that every contender trains.

    `spans` is the layout of a flat adapter; `bank` is random, for the contender with the constraint on.
    """

    base: Base
    users: Sequence[UserRows]
    spans: list[LayerSpan]
    lora: LoraSettings
    dpo: DpoSettings
    bank: ConstraintData
    clock: Callable[[], float]


def make_workload(shape: str, users: int, pairs: int, epochs: int, device: torch.device) -> Workload:
    """The workload of a `Shape`; a fixed one is the same on every machine."""
    if shape == "bundled":
        return real_workload(BaseSettings(model="data/base"), find("data/users"), users, pairs, epochs)
    base = random_base(_llama(*map(int, shape.split("x"))), device, f"random {shape}")
    return workload_on(base, made_users(range(users), pairs), epochs)


def real_workload(settings: BaseSettings, preferences: Path, users: int, pairs: int, epochs: int) -> Workload:
    """The workload of the first users in a file or folder of preferences, on any base."""
    base = load_base(settings)
    rows = tokenize(read_pairs(preferences, 0.25), base.tokenizer, base.context)
    return workload_on(base, [UserRows(user.user_id, user.train[:pairs], []) for user in rows[:users]], epochs)


def workload_on(base: Base, people: Sequence[UserRows], epochs: int) -> Workload:
    """The workload of these users on a loaded base."""
    lora, dpo = LoraSettings(), DpoSettings(epochs=epochs)
    bank, device = _made_bank(len(base.tokenizer)), base.device
    spans = attach(base.model, adaptable_layers(base.model, lora.target_modules), lora.rank)
    detach(base.model, list(spans))
    return Workload(base, people, list(spans.values()), lora, dpo, bank, _clock(device))


def _llama(hidden: int, layers: int) -> LlamaConfig:
    """Heads of 32, half as many key-value heads, three times as wide inside, tied head."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )


def random_base(config: PreTrainedConfig, device: torch.device, name: str) -> Base:
    """A model of random weights, drawn on its device, with one word for every token."""
    torch.manual_seed(SEED)
    dtype = torch.bfloat16 if multiplies_bfloat16(device) else torch.float32  # as a run chooses it
    set_product_precision(dtype, device)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.requires_grad_(False).eval()
    words = {"<pad>": 0, "<end>": 1} | {f"w{n}": n for n in range(2, config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<end>"
    )
    return Base(model, tokenizer, name, f"seed {SEED}", config.max_position_embeddings)


def made_users(
    numbers: Iterable[int],
    pairs: int,
    vocabulary: int = VOCABULARY,
    prompt: tuple[int, int] = LENGTHS,
    answer: tuple[int, int] = LENGTHS,
) -> list[UserRows]:
    """Users who differ by their number alone: pairs of random tokens.

    `prompt` and `answer` are the least and most tokens of a prompt and, before the end token, of each answer.
    """
    return [_made_user(f"user {n}", pairs, n, vocabulary, prompt, answer) for n in numbers]


def _made_user(
    user_id: str, pairs: int, seed: int, vocabulary: int, prompt: tuple[int, int], answer: tuple[int, int]
) -> UserRows:
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for n in range(pairs):
        prompt_ids = _ids(draw, vocabulary, prompt)
        message = (Message("user", "made up"),)
        pair = PreferencePair(user_id, message, "a", "b", f"{user_id} {n}", None, None, 1.0, "train", None, "made", n)
        chosen, rejected = (Row(prompt_ids, (*_ids(draw, vocabulary, answer), 1)) for _ in range(2))
        rows.append(PairRow(pair, chosen, rejected))
    return UserRows(user_id, rows, [])


def _made_bank(vocabulary: int) -> ConstraintData:
    """Random constraint data with rows of a real bank's size: four categories of sixteen probes."""
    draw = torch.Generator().manual_seed(SEED)
    examples = []
    for _ in range(4):
        prompts = [_ids(draw, vocabulary) for _ in range(16)]
        openings = [_ids(draw, vocabulary)[:8] for _ in range(16)]
        refusals = [(Row(prompt, (*_ids(draw, vocabulary), 1)),) for prompt in prompts]
        examples.append(
            [
                ConstraintExample(refused, Row(prompt, opening), Row(_ids(draw, vocabulary), refused[0].completion[:8]))
                for prompt, opening, refused in zip(prompts, openings, refusals, strict=True)
            ]
        )
    return ConstraintData([f"category {n}" for n in range(4)], [0.3] * 4, examples)


def _ids(draw: torch.Generator, vocabulary: int = VOCABULARY, lengths: tuple[int, int] = LENGTHS) -> tuple[int, ...]:
    length = int(torch.randint(lengths[0], lengths[1] + 1, (1,), generator=draw))
    return tuple(torch.randint(2, vocabulary, (length,), generator=draw).tolist())


def _clock(device: torch.device) -> Callable[[], float]:
    """Seconds of this process's CPU time; on a GPU, wall seconds after all queued work is done."""
    if device.type == "cpu":
        return time.process_time

    def drained() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return drained
