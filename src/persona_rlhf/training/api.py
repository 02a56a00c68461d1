"""Library calls for any transformers causal LM: fleet training, constraint data of a policy, and the warm start.

The warm start teaches requirements once, for all users. A user has a few dozen steps; a property that the base never
shows (a notice, say) takes more than that, and learning it costs the user's preferences. So the engine first trains one
adapter on the base's own answers, repaired to meet the requirements, under the same constraint. Of all models that meet
them, this is the nearest to the base. Users start from it, and their dual variables of requirements from its own,
because some users have too few steps for these to rise. Their reference stays the base.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.config.training import ConstraintSettings, DpoSettings, FleetSettings, LoraSettings
from persona_rlhf.data.pairs import Message, PreferencePair
from persona_rlhf.data.tokenize import PairRow, Row, UserRows, halved
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import Base, set_product_precision
from persona_rlhf.policy.policy import Policy
from persona_rlhf.training import constraint_data
from persona_rlhf.training.cache import Reference, rows_ahead
from persona_rlhf.training.constraint import ConstraintData, RequirementExamples, constraint_of
from persona_rlhf.training.engine import Engine, TrainedUser, WarmStart

_WARM_START = ""  # no user's id: a user_id has at least one character
_ROWS = 3  # answers per step, and rows of each requirement
_PASSES = 3  # over the answers


def train_warm_start(
    adapted: AdaptedModel, data: ConstraintData | None, dpo: DpoSettings, settings: ConstraintSettings, seed: int
) -> WarmStart | None:
    """The adapter and dual variables that every user begins with; None if there is no requirement to teach.

    With y drawn from the base and repaired to y', the loss is `E[-log pi(y')]`: the KL divergence of the repaired base
    from the adapted model, and a constant. For the engine the repaired answers are one more requirement. Its pairs only
    count steps: both answers are the same, so they teach nothing. Raises InputError if training fails.
    """
    if data is None or not data.requirements or not settings.lesson_rows_per_step:
        return None
    reference = Reference(adapted)
    idle_row = Row(data.answers[0].prompt[:1], data.answers[0].prompt[:1])
    reference.add([*data.rows(), idle_row])
    reference.add(data.answers)
    whole = RequirementExamples("every requirement", 0.0, data.answers, ())
    every = ConstraintData(data.categories, data.limits, data.examples, [whole, *data.requirements])
    idle_pair = PreferencePair(_WARM_START, (Message("user", ""),), "", "", "", None, None, 1.0, "train", None, "", 0)
    steps = _PASSES * len(data.answers) // _ROWS
    steps_only = UserRows(_WARM_START, [PairRow(idle_pair, idle_row, idle_row)] * steps, [])
    once = dpo.model_copy(update={"epochs": 1, "pairs_per_step": 1, "early_stop": None, "anchor": 0.0})
    more = settings.model_copy(update={"lesson_rows_per_step": _ROWS * len(every.requirements)})
    constraint = constraint_of(every, more, seed)
    engine = Engine(adapted, [steps_only], reference, constraint, once, FleetSettings(slots=1), seed)
    [trained] = engine.run()
    if trained.adapter is None:
        sentence = f"the requirements could not be taught: {trained.reason}; lower the learning rate"
        raise InputError([Problem(adapted.base.name, None, "dpo.learning_rate", sentence)])
    duals = [trained.duals[examples.requirement].final for examples in data.requirements]
    return WarmStart(trained.adapter, torch.tensor([0.0] * len(data.categories) + duals))


def fleet_train(
    model: PreTrainedModel,
    rows: Sequence[UserRows],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    bank: ConstraintData | None = None,
    lora: LoraSettings | None = None,
    dpo: DpoSettings | None = None,
    constraint: ConstraintSettings | None = None,
    fleet: FleetSettings | None = None,
    seed: int = 0,
) -> dict[str, TrainedUser]:
    """Trains one adapter per user of `rows` (see `tokenize`) over the frozen `model`, and leaves the model unchanged.

    Each adapter is a flat vector; `AdaptedModel(base, lora).spans` gives the place of each layer. `bank` is the
    constraint data (see `policy_bank`); without it there is no constraint. No gate judges the adapters here: do so
    before they are used.
    """
    dpo, settings = dpo or DpoSettings(), constraint or ConstraintSettings()
    functional = None if bank is None else constraint_of(bank, settings, seed)
    with _adapted(model, tokenizer, lora or LoraSettings()) as adapted:
        reference = Reference(adapted)
        if dpo.early_stop is not None:
            rows = [halved(user) for user in rows]
        reference.add(rows_ahead(adapted, rows, bank.rows() if bank else ()))
        engine = Engine(
            adapted,
            rows,
            reference,
            functional,
            dpo,
            fleet or FleetSettings(),
            seed,
            start=train_warm_start(adapted, bank, dpo, settings, seed),
        )
        return {user.user_id: user for user in engine.run()}


def policy_bank(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    policy: Policy,
    *,
    constraint: ConstraintSettings | None = None,
    seed: int = 0,
    max_new_tokens: int = 96,
) -> ConstraintData:
    """The constraint data of a policy over `model`, which answers the train probes on its own device.

    Raises InputError if the model refuses no probe of a category: then there is nothing to preserve.
    """
    with _adapted(model, tokenizer, LoraSettings()) as adapted:
        return constraint_data.policy_constraint_data(
            adapted, policy, constraint or ConstraintSettings(), seed, max_new_tokens
        )


@contextmanager
def _adapted(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, lora: LoraSettings
) -> Iterator[AdaptedModel]:
    """The model, frozen and with room for adapters; unchanged at the end.

    Raises InputError for a model on another kind of device than a CPU or CUDA.
    """
    if model.device.type not in ("cpu", "cuda"):
        sentence = f"the model is on {model.device.type}; move it to a CPU or a CUDA device"
        raise InputError([Problem(model.name_or_path or "model", None, None, sentence)])
    precision = torch.get_float32_matmul_precision()
    set_product_precision(model.dtype, model.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    model.requires_grad_(False).eval()
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    base = Base(model, cast(PreTrainedTokenizerBase, tokenizer), model.name_or_path or "", "", context)
    adapted = AdaptedModel(base, lora)
    try:
        yield adapted
    finally:
        adapted.close()
        torch.set_float32_matmul_precision(precision)
        model.train(was_training)
        for parameter in trained:
            parameter.requires_grad_(True)
