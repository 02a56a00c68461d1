"""Fleet_train and the shared warm start, as library calls."""

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
from persona_rlhf.models.base import Base
from persona_rlhf.policy.policy import Policy
from persona_rlhf.training import constraint_data
from persona_rlhf.training.cache import Reference, rows_ahead
from persona_rlhf.training.constraint import ConstraintBank, RequirementExamples
from persona_rlhf.training.engine import Engine, TrainedUser, WarmStart

# ----------------------------------------------------------------------------------------------------
# The provider as the first user: what every answer must have is learnt once, and every user's adapter begins there.
#
# A user has a few dozen steps, which a property that the base never shows (a notice, say) would eat up: tried, it was
# not
# learnt and the taste was lost (docs/LOG.md). So the engine first trains one adapter on the base's own answers as the
# requirements want them, under the same constraint: of all models that meet them, this is the one nearest to the base.
# Users start from it, and their dual variables of the requirements from its own, for some have too few steps for
# these to
# rise; their reference stays the base, and the gate judges what they end with.
# ----------------------------------------------------------------------------------------------------

_PROVIDER = ""  # nobody's id: a user_id has a character at least
_ROWS = 3  # answers a step, and turns of each requirement
_PASSES = 3  # over the answers


def train_warm_start(
    adapted: AdaptedModel, bank: ConstraintBank | None, dpo: DpoSettings, constraint: ConstraintSettings, seed: int
) -> WarmStart | None:
    """What every user begins with; None where there is nothing to teach.

    With y drawn from the base and repaired to y', the loss is `E[-log pi(y')]`: the KL divergence of the repaired base
    from the adapted model, and a constant. To the engine it is a lesson; the pairs by which it counts steps prefer
    nothing (both answers are one), so they teach nothing. Raises InputError where training fails.
    """
    if bank is None or not bank.lessons or not constraint.lesson_rows_per_step:
        return None
    reference = Reference(adapted)
    nothing = Row(bank.answers[0].prompt[:1], bank.answers[0].prompt[:1])
    reference.add([*bank.rows(), nothing])
    whole = RequirementExamples("every requirement", 0.0, bank.answers, ())
    rules = ConstraintBank(bank.categories, bank.limits, bank.anchors, [whole, *bank.lessons])
    idle = PreferencePair(_PROVIDER, (Message("user", ""),), "", "", "", None, None, 1.0, "train", None, "", 0)
    steps = _PASSES * len(bank.answers) // _ROWS
    provider = UserRows(_PROVIDER, [PairRow(idle, nothing, nothing)] * steps, [])
    once = dpo.model_copy(update={"epochs": 1, "pairs_per_step": 1, "early_stop": None})
    more = constraint.model_copy(update={"lesson_rows_per_step": _ROWS * len(rules.lessons)})
    engine = Engine(adapted, [provider], reference, rules, once, more, FleetSettings(slots=1), seed)
    [trained] = engine.run()
    if trained.adapter is None:
        sentence = f"the requirements could not be taught: {trained.reason}; lower the learning rate"
        raise InputError([Problem(adapted.base.name, None, "dpo.learning_rate", sentence)])
    risen = [trained.duals[own.requirement].final for own in bank.lessons]
    return WarmStart(trained.adapter, torch.tensor([0.0] * len(bank.categories) + risen))


# ----------------------------------------------------------------------------------------------------
# The fleet as library calls: any transformers causal LM, no config and no files.
# ----------------------------------------------------------------------------------------------------


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
            start=train_warm_start(adapted, bank, dpo or DpoSettings(), constraint or ConstraintSettings(), seed),
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
        return constraint_data.policy_bank(adapted, policy, constraint or ConstraintSettings(), seed, max_new_tokens)


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
