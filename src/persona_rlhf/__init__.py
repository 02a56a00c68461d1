"""Personalised RLHF within bounds: one DPO adapter per user, tier-one refusals kept.

The names below are the line from pairs to released adapters. They are loaded when first used, so that importing the
package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from persona_rlhf.config import Config, read_config
    from persona_rlhf.evaluation.examination import Examination
    from persona_rlhf.inputs.problems import InputError, Problem
    from persona_rlhf.line import constraint_bank, evaluate, train, with_reference
    from persona_rlhf.policy.tiers import Policy
    from persona_rlhf.preferences.pairs import PreferencePair, read_pairs
    from persona_rlhf.preferences.screening import fit, screen
    from persona_rlhf.preferences.tokens import tokenize
    from persona_rlhf.preparation import prepare, prepare_users
    from persona_rlhf.release.results import Result, read_results
    from persona_rlhf.release.verify import verify
    from persona_rlhf.releasing import release
    from persona_rlhf.training.base import Base, load_base
    from persona_rlhf.training.engine import Engine, TrainedUser
    from persona_rlhf.training.fleet import AdaptedModel
    from persona_rlhf.training.library import fleet_train, policy_bank
    from persona_rlhf.training.settings import ConstraintSettings
    from persona_rlhf.training.trainer import ConstrainedDPOTrainer

_HOMES = {
    "AdaptedModel": "training.fleet",
    "Base": "training.base",
    "Config": "config",
    "ConstrainedDPOTrainer": "training.trainer",
    "ConstraintSettings": "training.settings",
    "Engine": "training.engine",
    "Examination": "evaluation.examination",
    "InputError": "inputs.problems",
    "Policy": "policy.tiers",
    "PreferencePair": "preferences.pairs",
    "Problem": "inputs.problems",
    "Result": "release.results",
    "TrainedUser": "training.engine",
    "constraint_bank": "line",
    "evaluate": "line",
    "fit": "preferences.screening",
    "fleet_train": "training.library",
    "load_base": "training.base",
    "policy_bank": "training.library",
    "prepare": "preparation",
    "prepare_users": "preparation",
    "read_config": "config",
    "read_pairs": "preferences.pairs",
    "read_results": "release.results",
    "release": "releasing",
    "screen": "preferences.screening",
    "tokenize": "preferences.tokens",
    "train": "line",
    "verify": "release.verify",
    "with_reference": "line",
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
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
