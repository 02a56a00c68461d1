"""The provider as the first user: what every answer must have is learnt once, and every user's adapter begins there.

A user has a few dozen steps, which a property that the base never shows (a notice, say) would eat up: tried, it was not
learnt and the taste was lost (docs/LOG.md). So the engine first trains one adapter on the base's own answers as the
requirements want them, under the same constraint: of all models that meet them, this is the one nearest to the base.
Users start from it, and their dual variables of the requirements from its own, for some have too few steps for these to
rise; their reference stays the base, and the gate judges what they end with.
"""

from __future__ import annotations

import torch

from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.preferences.messages import Message
from persona_rlhf.preferences.pairs import PreferencePair
from persona_rlhf.preferences.tokens import PairRow, Row, UserRows
from persona_rlhf.training.bank import ConstraintBank, Lessons
from persona_rlhf.training.engine import Engine, Start
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.reference import Reference
from persona_rlhf.training.settings import ConstraintSettings, DpoSettings, FleetSettings

_PROVIDER = ""  # nobody's id: a user_id has a character at least
_ROWS = 3  # answers a step, and turns of each requirement
_PASSES = 3  # over the answers


def provider_start(
    adapted: AdaptedModel, bank: ConstraintBank | None, dpo: DpoSettings, constraint: ConstraintSettings, seed: int
) -> Start | None:
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
    whole = Lessons("every requirement", 0.0, bank.answers, ())
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
    return Start(trained.adapter, torch.tensor([0.0] * len(bank.categories) + risen))
