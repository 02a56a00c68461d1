"""The mode of the posterior against choix: Bradley and Terry's model, where every answer is a direction."""

from __future__ import annotations

import choix
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_rlhf.training.reward_basis import laplace

ANSWERS = 6
CHOICES = st.lists(st.permutations(range(ANSWERS)).map(lambda order: tuple(order[:2])), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(choices=CHOICES, variance=st.floats(0.05, 20))
def test_the_mode_is_choixs(choices: list[tuple[int, int]], variance: float) -> None:
    """choix penalises by alpha times the sum of squares: a normal prior of variance 1 / (2 alpha)."""
    identity = torch.eye(ANSWERS, dtype=torch.float64)
    differences = torch.stack([identity[winner] - identity[loser] for winner, loser in choices])
    centre, spread = torch.zeros(ANSWERS, dtype=torch.float64), torch.full((1, ANSWERS), variance, dtype=torch.float64)
    [mode] = laplace(differences[None], centre, spread).mean
    wanted = choix.opt_pairwise(ANSWERS, choices, alpha=1 / (2 * variance), tol=1e-10)
    np.testing.assert_allclose(mode.numpy(), wanted, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(choices=CHOICES, tie=st.permutations(range(ANSWERS)).map(lambda order: tuple(order[:2])))
def test_a_tie_as_one_choice_each_way_draws_both_answers_together(
    choices: list[tuple[int, int]], tie: tuple[int, int]
) -> None:
    identity = torch.eye(ANSWERS, dtype=torch.float64)

    def mode_of(decided: list[tuple[int, int]]) -> torch.Tensor:
        differences = torch.stack([identity[winner] - identity[loser] for winner, loser in decided])
        [mode] = laplace(differences[None], torch.zeros(ANSWERS).double(), torch.ones(1, ANSWERS).double()).mean
        return mode

    both = [*choices, tie, tie[::-1]]
    np.testing.assert_allclose(
        mode_of(both).numpy(), choix.opt_pairwise(ANSWERS, both, alpha=0.5, tol=1e-10), atol=1e-5
    )
    before, after = ((mode[tie[0]] - mode[tie[1]]).abs() for mode in (mode_of(choices), mode_of(both)))
    assert after <= before + 1e-9
