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
    from persona_rlhf.pipeline.release import release
    from persona_rlhf.pipeline.train import constraint_bank, evaluate, train, with_reference
    from persona_rlhf.policy.policy import Policy
    from persona_rlhf.release.results import Result, read_results
    from persona_rlhf.release.verify import verify
    from persona_rlhf.training.api import fleet_train, policy_bank
    from persona_rlhf.training.engine import Engine, TrainedUser
    from persona_rlhf.training.trl import ConstrainedDPOTrainer

_HOMES = {
    "AdaptedModel": "models.adapted_model",
    "Base": "models.base",
    "Config": "config.experiment",
    "ConstrainedDPOTrainer": "training.trl",
    "ConstraintSettings": "config.training",
    "Engine": "training.engine",
    "Examination": "evaluation.evaluator",
    "InputError": "common.errors",
    "Policy": "policy.policy",
    "PreferencePair": "data.pairs",
    "Problem": "common.errors",
    "Result": "release.results",
    "TrainedUser": "training.engine",
    "constraint_bank": "pipeline.train",
    "evaluate": "pipeline.train",
    "fit": "data.screening",
    "fleet_train": "training.api",
    "load_base": "models.base",
    "policy_bank": "training.api",
    "prepare": "pipeline.prepare",
    "prepare_users": "pipeline.prepare",
    "read_config": "config.experiment",
    "read_pairs": "data.pairs",
    "read_results": "release.results",
    "release": "pipeline.release",
    "screen": "data.screening",
    "tokenize": "data.tokenize",
    "train": "pipeline.train",
    "verify": "release.verify",
    "with_reference": "pipeline.train",
}

_NAMES_THERE = {"Examination": "Evaluator"}  # public names that differ from the class they stand for

__all__ = [
    "AdaptedModel",
    "Base",
    "Config",
    "ConstrainedDPOTrainer",
    "ConstraintSettings",
    "Engine",
    "Examination",
    "InputError",
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
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), _NAMES_THERE.get(name, name))
