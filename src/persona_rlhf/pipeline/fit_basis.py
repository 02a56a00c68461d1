"""`basis fit`: the reward that consenting users share, fitted from their pairs over one base."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from persona_rlhf.common.errors import InputError, Problem, collecting, did_you_mean
from persona_rlhf.config.training import BaseSettings, LoraSettings
from persona_rlhf.data.pairs import PreferencePair, read_pairs
from persona_rlhf.data.screening import unfit_to_teach
from persona_rlhf.evaluation.prompt_sets import read_ordinary
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import load_base
from persona_rlhf.pipeline.base_answers import sampled_answers
from persona_rlhf.pipeline.monitoring import OnProgress, ProgressEvent, silent, watched
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.training.answer_features import AnswerFeatures, scaled_features
from persona_rlhf.training.reward_basis import Population, fit_basis

_TOKENS = 128  # of a sampled answer


class FittedBasis(NamedTuple):
    """The basis that was written: its users and pairs, pairs left out, directions, and the scale of its prior."""

    out: Path
    users: int
    pairs: int
    left_out: int
    directions: int
    scale: float

    def to_json(self) -> dict[str, Any]:
        return self._asdict() | {"out": str(self.out)}


class BasisInputs(NamedTuple):
    """Inputs of `basis fit`: training pairs of users who consent, and prompts for the base."""

    pairs: Sequence[PreferencePair]
    left_out: int
    prompts: Sequence[str]
    out: Path


def read_basis_inputs(
    path: Path | str, out: Path, prompts: Path, without: Collection[str] = (), heldout: float = 0.25
) -> BasisInputs:
    """Reads pairs and prompts. Held-out pairs, pairs unfit to teach, and pairs with a refusal are left out.

    `heldout` is the share of a user's prompts that are held out where rows state no split, as in `users.heldout`: so a
    run over the same pairs holds out the same ones. A user in `without` is left out as if the user had never been
    there. Raises InputError with the problems of all.
    """
    problems, pairs, questions = list[Problem](), list[PreferencePair](), list[str]()
    if out.exists():
        problems.append(Problem(str(out), None, "OUT", "there is a file here already, and nothing is overwritten"))
    with collecting(problems):
        pairs = read_pairs(path, heldout)
    with collecting(problems):
        questions = read_ordinary(prompts)
    users = {pair.user_id for pair in pairs}
    for user_id in sorted(set(without) - users) if users else ():
        sentence = f"no pair there is of the user {user_id!r}{did_you_mean(user_id, users)}"
        problems.append(Problem(str(path), None, "--without", sentence))
    training = [pair for pair in pairs if pair.split == "train" and pair.user_id not in without]
    usable = [pair for pair in unfit_to_teach(training)[0] if not is_refusal(pair.chosen) | is_refusal(pair.rejected)]
    if not problems and not usable:
        problems.append(Problem(str(path), None, None, "no pair is left to fit a basis on; name more users"))
    if problems:
        raise InputError(problems)
    return BasisInputs(usable, len(training) - len(usable), questions, out)


def basis_fit(inputs: BasisInputs, model: str, seed: int = 0, on_progress: OnProgress = silent) -> FittedBasis:
    """Fits and writes the basis. The same pairs, prompts, base and seed give the same bytes.

    Raises InputError where the pairs are too few, or the base gives too few answers.
    """
    adapted = AdaptedModel(load_base(BaseSettings(model=model)), LoraSettings())
    with watched([adapted], ProgressEvent("asking the base"), on_progress):
        answered = sampled_answers(adapted, inputs.prompts, _TOKENS, seed)
    answers = [text for row in answered for text in row.answers if not is_refusal(text)]
    if len(answers) < 2:
        raise InputError([Problem(model, None, "--base", "the base gives no two answers to these prompts")])
    on_progress(ProgressEvent("fitting"))
    features = scaled_features(answers)
    try:
        basis = fit_basis(features, population_of(features, inputs.pairs), seed=seed)
    except ValueError as fault:
        raise InputError([Problem(inputs.pairs[0].file, None, None, str(fault))]) from fault
    basis = replace(basis, base=adapted.base.weights_hash)
    basis.save(inputs.out)
    users = len({pair.user_id for pair in inputs.pairs})
    directions = basis.directions.shape[1]
    return FittedBasis(inputs.out, users, len(inputs.pairs), inputs.left_out, directions, basis.prior.scale)


def population_of(features: AnswerFeatures, pairs: Sequence[PreferencePair]) -> Population:
    """The pairs as a population; every different answer is one row of features. A tie is one preference each way."""
    places: dict[str, int] = {}
    orders = [(pair.user_id, *order) for pair in pairs for order in pair.orders]
    chosen, rejected = (
        torch.tensor([places.setdefault(text, len(places)) for text in texts])
        for texts in ([text for _, text, _ in orders], [text for _, _, text in orders])
    )
    numbers: dict[str, int] = {}
    users = torch.tensor([numbers.setdefault(user_id, len(numbers)) for user_id, _, _ in orders])
    return Population(features(list(places)), chosen, rejected, users, tuple(numbers))
