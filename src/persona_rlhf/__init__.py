"""Personalised RLHF within bounds: one DPO adapter per user, tier-one refusals kept.

The names below are the line from pairs to released adapters. They are loaded when first used, so that importing the
package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from persona_rlhf.common.version import __version__ as __version__

if TYPE_CHECKING:
    from persona_rlhf.common.errors import InputError, Problem
    from persona_rlhf.config.experiment import Config, read_config
    from persona_rlhf.config.training import ConstraintSettings
    from persona_rlhf.data.pairs import PreferencePair, read_pairs
    from persona_rlhf.data.screening import fit, screen
    from persona_rlhf.data.tokenize import tokenize
    from persona_rlhf.evaluation.evaluator import Evaluator as Examination
    from persona_rlhf.models.adapted_model import AdaptedModel
    from persona_rlhf.models.base import Base, load_base
    from persona_rlhf.pipeline.prepare import prepare, prepare_users
    from persona_rlhf.pipeline.reevaluate import evaluate
    from persona_rlhf.pipeline.release import release
    from persona_rlhf.pipeline.shared_values import constraint_bank, with_reference
    from persona_rlhf.pipeline.train import train
    from persona_rlhf.policy.policy import Policy
    from persona_rlhf.release.results import Result, read_results
    from persona_rlhf.release.verify import verify
    from persona_rlhf.training.api import fleet_train, policy_bank
    from persona_rlhf.training.constraint import LagrangianConstraint
    from persona_rlhf.training.engine import Engine, TrainedUser
    from persona_rlhf.training.trl import ConstrainedDPOTrainer

_HOMES = {
    "AdaptedModel": "models.adapted_model.AdaptedModel",
    "Base": "models.base.Base",
    "Config": "config.experiment.Config",
    "ConstrainedDPOTrainer": "training.trl.ConstrainedDPOTrainer",
    "ConstraintSettings": "config.training.ConstraintSettings",
    "Engine": "training.engine.Engine",
    "Examination": "evaluation.evaluator.Evaluator",
    "InputError": "common.errors.InputError",
    "LagrangianConstraint": "training.constraint.LagrangianConstraint",
    "Policy": "policy.policy.Policy",
    "PreferencePair": "data.pairs.PreferencePair",
    "Problem": "common.errors.Problem",
    "Result": "release.results.Result",
    "TrainedUser": "training.engine.TrainedUser",
    "constraint_bank": "pipeline.shared_values.constraint_bank",
    "evaluate": "pipeline.reevaluate.evaluate",
    "fit": "data.screening.fit",
    "fleet_train": "training.api.fleet_train",
    "load_base": "models.base.load_base",
    "policy_bank": "training.api.policy_bank",
    "prepare": "pipeline.prepare.prepare",
    "prepare_users": "pipeline.prepare.prepare_users",
    "read_config": "config.experiment.read_config",
    "read_pairs": "data.pairs.read_pairs",
    "read_results": "release.results.read_results",
    "release": "pipeline.release.release",
    "screen": "data.screening.screen",
    "tokenize": "data.tokenize.tokenize",
    "train": "pipeline.train.train",
    "verify": "release.verify.verify",
    "with_reference": "pipeline.shared_values.with_reference",
}

__all__ = [
    "AdaptedModel",
    "Base",
    "Config",
    "ConstrainedDPOTrainer",
    "ConstraintSettings",
    "Engine",
    "Examination",
    "InputError",
    "LagrangianConstraint",
    "Policy",
    "PreferencePair",
    "Problem",
    "Result",
    "TrainedUser",
    "constraint_bank",
    "evaluate",
    "fit",
    "fleet_train",
    "load_base",
    "policy_bank",
    "prepare",
    "prepare_users",
    "read_config",
    "read_pairs",
    "read_results",
    "release",
    "screen",
    "tokenize",
    "train",
    "verify",
    "with_reference",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].rpartition(".")
    return getattr(import_module(f"{__name__}.{module}"), attribute)
