"""The protocol of the personalisation benchmark: disjoint prompts, noise-free scores, an exact ridge, resumed cells."""

from random import Random

import pytest
import torch

from persona_rlhf.simulation.users import Utility
from persona_rlhf.training.reward_basis import laplace
from tests.scripts.loading import SCRIPTS, load_script


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield load_script("benchmark_personalisation")


@pytest.fixture(scope="module")
def world(benchmark):
    prompt = load_script("generate_users").SampledPrompt
    pool = [prompt(f"prompt {n}", "story", tuple(f"{n} {'so ' * k}on." for k in range(1, 5))) for n in range(40)]
    return benchmark.World(pool, 0)


def test_the_three_sets_of_prompts_share_none(world):
    sets = [{prompt.prompt for prompt in part} for part in (world.shared, world.fresh, world.test)]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 40


def test_choices_follow_the_taste_and_say_where_they_do_not(benchmark, world):
    """A noisy user's labels err, `clean` says so, and a reward that is the taste itself scores 1 whatever the label."""
    taste = Utility("short", "", 0.1, {"words": -1.0})
    choices = benchmark.draw_choices(taste, world.fresh, 40, Random(0))
    pairs = list(zip(choices.chosen, choices.rejected, choices.clean, strict=True))
    assert len({frozenset(pair[:2]) for pair in pairs}) == 40
    assert all((len(chosen) < len(rejected)) == clean for chosen, rejected, clean in pairs)
    assert 0 < sum(choices.clean) < 40
    lengths = torch.tensor([[-float(len(text))] for text in world.texts])
    assert benchmark.accuracy(world.differences(lengths, choices)[:, 0], choices.clean) == 1
    assert benchmark.accuracy(torch.zeros(40), choices.clean) == 0.5


def test_the_ridge_in_the_span_of_the_pairs_is_the_ridge_in_all_features(benchmark):
    generator = torch.Generator().manual_seed(0)
    learnt, test = (torch.randn(n, 12, generator=generator, dtype=torch.float64) for n in (5, 7))
    zeros, variance = torch.zeros(12).double(), torch.full((1, 12), 0.3).double()
    weights = laplace(learnt[None], zeros, variance).mean[0]
    assert benchmark.ridge_margins(learnt, test, 0.3) == pytest.approx(test @ weights, abs=1e-6)


def test_a_cell_in_the_file_is_not_missing(benchmark, tmp_path):
    file = tmp_path / "cells.jsonl"
    cell = {"part": "rewards", "seed": 0, "population": 60, "method": "bag of words", "pairs": 5}
    benchmark.Cells(file).add(**cell, accuracy=[0.5, 0.7])
    again = benchmark.Cells(file)
    assert not again.missing(**cell)
    assert again.missing(**cell | {"population": 1400})
    assert "| rewards | 60 | bag of words | 5 | accuracy | 0.600" in list(benchmark.table(again))[2]
