"""What a question teaches, ties as evidence, and choosers that ask no prompt twice."""

import math
from random import Random

import pytest
import torch

from persona_rlhf.training.reward_basis import Posterior, Prior, approximate
from tests.scripts.loading import SCRIPTS, load_script


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield load_script("measure_active_choice")


def test_information_is_that_of_one_choice(script):
    """By hand: the covariance after one choice of Fisher information p (1 - p) shrinks by 1 + p (1 - p) v."""
    posterior = Posterior(torch.tensor([0.4, 0.0]).double(), torch.diag(torch.tensor([0.5, 2.0])).double())
    difference = torch.tensor([1.0, -1.0]).double()
    chance = 1 / (1 + math.exp(-0.4))
    after = posterior.covariance.inverse() + chance * (1 - chance) * torch.outer(difference, difference)
    nats = (posterior.covariance.logdet() + after.logdet()) / 2
    assert float(script.information(posterior, difference[None])) == pytest.approx(float(nats))


def test_a_tie_tells_that_the_difference_does_not_matter(script):
    prior, difference = Prior(torch.zeros(2).double(), 0.5), torch.tensor([3.0, 0.0]).double()
    assert script.evidence(difference, 0.5, ties=False) == []
    tied = torch.stack(script.evidence(difference, 0.5, ties=True))
    posterior = approximate(tied[None], prior)
    nobody = approximate(tied[None, :0], prior)
    assert float(posterior.mean.abs().max()) < 1e-9
    assert float(posterior.covariance[0, 0, 0]) < 0.5 * float(nobody.covariance[0, 0, 0])
    [first], [second] = (script.evidence(difference, answer, ties=True) for answer in (1.0, 0.0))
    assert torch.equal(first, difference)
    assert torch.equal(second, -difference)


def test_the_chosen_question_is_the_most_informative_of_new_prompts(script):
    differences = torch.tensor([[0.1], [0.5], [2.0], [1.0]]).double()
    questions = script.Questions([("a", "b")] * 4, torch.tensor([0, 0, 1, 2]), differences)
    posterior, asked = Posterior(torch.zeros(1).double(), torch.ones(1, 1).double()), {1}
    choosers = script.choosers(questions, asked)
    assert choosers["prompt and pair"](posterior, torch.tensor([0, 1]), Random(0)) == 3
    assert choosers["pair"](posterior, torch.tensor([0, 1]), Random(0)) == 1
    assert choosers["unlike"](posterior, torch.tensor([0, 1]), Random(0)) == 1
    assert {choosers["random"](posterior, torch.tensor([0, 1]), Random(n)) for n in range(20)} == {0, 1}
    asked.add(2)
    assert choosers["prompt and pair"](posterior, torch.tensor([0, 1]), Random(0)) == 1
