"""Values that all users of a run share: constraint data, warm start and reference log-probabilities."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.config.experiment import Config
from persona_rlhf.config.training import FleetSettings
from persona_rlhf.data.tokenize import UserRows
from persona_rlhf.evaluation.metrics import REQUIREMENT_PROMPTS
from persona_rlhf.evaluation.warm_start import WarmStartInterpolation
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.pipeline.base_answers import shared_answers
from persona_rlhf.pipeline.prepare import Prepared
from persona_rlhf.pipeline.run_dir import RunDir
from persona_rlhf.policy.policy import Policy
from persona_rlhf.release.report import SCREENS
from persona_rlhf.training import checkpoint
from persona_rlhf.training.api import train_warm_start
from persona_rlhf.training.cache import Reference, rows_ahead, shared_reference
from persona_rlhf.training.constraint import OPENING_LENGTH, ConstraintData, constraint_of
from persona_rlhf.training.constraint_data import (
    cached_constraint_data,
    constraint_data_from_json,
    constraint_data_to_json,
    policy_constraint_data,
)
from persona_rlhf.training.engine import Engine, WarmStart
from persona_rlhf.training.labelled_pairs import AnswerPool, prior_rows


class SharedValues(NamedTuple):
    """Values that all chunks of a run share: constraint rows, warm start, reference log-probabilities.

    `cache` keeps the log-probabilities for other runs (`fleet.reference_cache`). `pool` are the pairs of the base's
    answers that users' rewards label, where the config names a basis, and `prior` is the population's adapter there.
    """

    bank: ConstraintData | None
    start: WarmStart | None
    reference: Reference
    cache: Reference | None
    pool: AnswerPool | None = None
    prior: Float[Tensor, " params"] | None = None


def shared_values(ready: Prepared, run_dir: RunDir, bank: ConstraintData | None, chunks: int) -> SharedValues:
    """The shared values, read from the run folder or computed and written to it."""
    if run_dir.share.rank == 0:
        screens = [screen.to_json() for screen in ready.screens]
        run_dir.write(run_dir.path / SCREENS, json.dumps(screens, indent=2) + "\n")
    if bank is not None:
        run_dir.write(run_dir.bank, constraint_data_to_json(bank))
    start = shared_start(ready, bank, run_dir)
    folder = ready.config.fleet.reference_cache
    cache = None if folder is None else shared_reference(ready.adapted, Path(folder))
    reference = Reference(ready.adapted, run_dir.reference, cache)
    if bank is not None and chunks > 1:  # a single chunk scores them in the same passes as its own rows
        reference.add(bank.rows())
    pool = prior = None
    if ready.basis is not None and ready.config.basis is not None:
        pool = shared_answers(ready, run_dir, ready.basis, ready.config.basis)
        prior = shared_prior(ready, run_dir, prior_rows(ready.basis, pool), bank, start)
    return SharedValues(bank, start, reference, cache, pool, prior)


def shared_bank(ready: Prepared, run_dir: RunDir) -> ConstraintData | None:
    """The constraint bank of the run, read from its folder, or made where no earlier process has written it."""
    if run_dir.bank.exists():
        try:
            return constraint_data_from_json(run_dir.bank.read_text())
        except ValueError:
            pass  # a damaged file is written anew
    return constraint_bank(ready.config, ready.policy, ready.adapted)


def shared_start(ready: Prepared, bank: ConstraintData | None, run_dir: RunDir) -> WarmStart | None:
    """The warm start of all users, read from the run folder or trained; None without requirements to train."""
    if run_dir.start.exists():
        return WarmStart(**checkpoint.load(run_dir.start, ready.adapted.base.device)[0])
    config = ready.config
    start = train_warm_start(ready.adapted, bank, config.dpo, config.constraint, config.seed)
    if start is not None:
        checkpoint.save(run_dir.start, start._asdict(), {})
    return start


def shared_prior(
    ready: Prepared, run_dir: RunDir, rows: UserRows, bank: ConstraintData | None, start: WarmStart | None
) -> Float[Tensor, " params"]:
    """The population's adapter, read from the run folder, or trained as a fleet of one under the same constraint.

    Labelled pairs are seen once, as a user sees them. It stands on no pair of the run's users, so nobody's deletion
    changes it. Raises InputError if training fails.
    """
    adapted, config = ready.adapted, ready.config
    if run_dir.prior.exists():
        return checkpoint.load(run_dir.prior, adapted.base.device)[0]["adapter"]
    once = config.dpo.model_copy(update={"epochs": 1, "early_stop": None})
    constraint = None if bank is None else constraint_of(bank, config.constraint, config.seed)
    reference = with_reference(adapted, [rows], bank)
    [trained] = Engine(
        adapted, [rows], reference, constraint, once, FleetSettings(slots=1), config.seed, start=start
    ).run()
    if trained.adapter is None:
        sentence = f"the population's adapter could not be trained: {trained.reason}; lower the learning rate"
        raise InputError([Problem(adapted.base.name, None, "dpo.learning_rate", sentence)])
    adapter = trained.adapter
    if start is not None:
        [adapter], _ = interpolation_of(ready, start)(adapter[None].to(adapted.base.device))
    checkpoint.save(run_dir.prior, {"adapter": adapter}, {})
    return adapter


def constraint_bank(config: Config, policy: Policy, adapted: AdaptedModel) -> ConstraintData | None:
    """The constraint data of a policy, from the base's own refusals; None if the constraint is switched off.

    Raises InputError where the base refuses no train probe of a category.
    """
    if not config.constraint.enabled:
        return None
    constraint, seed, tokens = config.constraint, config.seed, config.gate.max_new_tokens

    def made() -> ConstraintData:
        return policy_constraint_data(adapted, policy, constraint, seed, tokens)

    if config.fleet.reference_cache is None:
        return made()
    key = (policy.hash, constraint.refusals_per_probe, constraint.most_probes, OPENING_LENGTH, seed, tokens)
    return cached_constraint_data(adapted, Path(config.fleet.reference_cache), key, made)


def with_reference(
    adapted: AdaptedModel,
    users: Iterable[UserRows],
    bank: ConstraintData | None,
    file: Path | None = None,
    shared: Reference | None = None,
) -> Reference:
    """Log-probabilities of the rows under the base (see `rows_ahead`), computed once for all users and kept in `file`.

    Values that `shared` holds are taken from it.
    """
    reference = Reference(adapted, file, shared)
    reference.add(rows_ahead(adapted, users, bank.rows() if bank else ()))
    return reference


def interpolation_of(ready: Prepared, start: WarmStart) -> WarmStartInterpolation:
    """Interpolation toward the warm start, for adapters that miss a requirement of the policy."""
    tokens, rules = ready.config.gate.max_new_tokens, ready.policy.requirements
    return WarmStartInterpolation(ready.adapted, start.adapter, rules, REQUIREMENT_PROMPTS, tokens, ready.config.seed)
