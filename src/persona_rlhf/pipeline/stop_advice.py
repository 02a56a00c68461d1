"""Advice to a user of the feedback page to stop, since more answers would change little."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.config.experiment import Config
from persona_rlhf.data.choice_ledger import Choice
from persona_rlhf.pipeline.run_dir import RunDir
from persona_rlhf.release.data_curve_file import data_curve_of
from persona_rlhf.training.labelled_pairs import text_differences
from persona_rlhf.training.reward_basis import RewardBasis, load_basis
from persona_rlhf.training.stopping import LEAST_GAIN, expected_gain

_POOL = 200  # pairs of the base's answers, at most, by which the gain is told
_FEWEST = 10  # choices with a preferred answer before any advice


def stop_advice(run: Path, config: Config) -> Callable[[Sequence[Choice]], bool] | None:
    """The advice that a run can give: by the posterior of its basis, else by its data-need curve; None without both.

    Raises InputError for a basis or curves that cannot be read.
    """
    answers = RunDir(run).answers
    if config.basis is not None and answers.exists():
        rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
        return PosteriorAdvice(load_basis(config.basis.file), [(first, second) for _, first, second in rows])
    curve = data_curve_of(run)
    need = None if curve is None else curve.need
    if need is None or need.pairs is None:
        return None
    pairs = need.pairs
    return lambda choices: sum(choice.preferred is not None for choice in choices) >= pairs


class PosteriorAdvice:
    """Advice by the gain in accuracy that more choices are expected to bring on pairs of the base's answers."""

    def __init__(self, basis: RewardBasis, pairs: Sequence[tuple[str, str]]) -> None:
        step = -(-len(pairs) // _POOL)
        first, second = zip(*pairs[::step], strict=True)
        self._basis, self._pool = basis, text_differences(basis, first, second)
        self._answers: dict[str, tuple[tuple[str, ...], bool]] = {}  # by user, with the choices behind it

    def __call__(self, choices: Sequence[Choice]) -> bool:
        if sum(choice.preferred is not None for choice in choices) < _FEWEST:
            return False
        pairs = [pair for choice in choices if (pair := choice.pair) is not None]
        user, ids = choices[0].user_id, tuple(pair["id"] for pair in pairs)
        if user not in self._answers or self._answers[user][0] != ids:
            self._answers[user] = ids, self.gain(self._evidence(pairs)) < LEAST_GAIN
        return self._answers[user][1]

    def _evidence(self, pairs: Sequence[dict[str, Any]]) -> Float[Tensor, "pairs rank"]:
        """Coordinates of chosen less rejected answers; a tie is one preference each way, as in training."""
        turned = [(pair["rejected"], pair["chosen"]) for pair in pairs if pair.get("tie")]
        ordered = [(pair["chosen"], pair["rejected"]) for pair in pairs]
        chosen, rejected = zip(*ordered, *turned, strict=True)
        return text_differences(self._basis, chosen, rejected)

    @torch.inference_mode()
    def gain(self, differences: Float[Tensor, "pairs rank"]) -> float:
        """The expected gain of more choices, after these."""
        return expected_gain(self._basis.posterior(differences), self._pool)
