"""The fleet as library calls: any transformers causal LM, no config and no files."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_rlhf.policy.tiers import Policy
from persona_rlhf.preferences.tokens import UserRows, halved
from persona_rlhf.training import anchors
from persona_rlhf.training.bank import ConstraintBank
from persona_rlhf.training.base import Base
from persona_rlhf.training.engine import Engine, TrainedUser
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.ground import rows_ahead
from persona_rlhf.training.provider import provider_start
from persona_rlhf.training.reference import Reference
from persona_rlhf.training.settings import ConstraintSettings, DpoSettings, FleetSettings, LoraSettings


def fleet_train(
    model: PreTrainedModel,
    rows: Sequence[UserRows],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    bank: ConstraintBank | None = None,
    lora: LoraSettings | None = None,
    dpo: DpoSettings | None = None,
    constraint: ConstraintSettings | None = None,
    fleet: FleetSettings | None = None,
    seed: int = 0,
) -> dict[str, TrainedUser]:
    """Trains one adapter per user of `rows` (see `tokenize`) over the frozen `model`, and leaves the model as it was.

    Each adapter is a flat vector; `AdaptedModel(base, lora).spans` says where its layers lie. Without a `bank` there
    is no constraint, and nothing here is a gate: judge what comes out before anyone uses it.
    """
    with _adapted(model, tokenizer, lora or LoraSettings()) as adapted:
        reference = Reference(adapted)
        if dpo is not None and dpo.early_stop is not None:
            rows = [halved(user) for user in rows]
        reference.add(rows_ahead(adapted, rows, bank))
        engine = Engine(
            adapted,
            rows,
            reference,
            bank,
            dpo or DpoSettings(),
            constraint or ConstraintSettings(enabled=bank is not None),
            fleet or FleetSettings(),
            seed,
            start=provider_start(adapted, bank, dpo or DpoSettings(), constraint or ConstraintSettings(), seed),
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
) -> ConstraintBank:
    """The constraint bank of a policy over `model`: it answers the train probes where it lies, a GPU if that is one.

    Raises InputError where it refuses no probe of a category: then there is nothing to keep.
    """
    with _adapted(model, tokenizer, LoraSettings()) as adapted:
        return anchors.policy_bank(adapted, policy, constraint or ConstraintSettings(), seed, max_new_tokens)


@contextmanager
def _adapted(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, lora: LoraSettings
) -> Iterator[AdaptedModel]:
    """The model frozen and with room for adapters; after it, the model is as it was."""
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
        model.train(was_training)
        for parameter in trained:
            parameter.requires_grad_(True)
