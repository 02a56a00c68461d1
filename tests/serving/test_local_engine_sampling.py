from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.models.generation import nucleus
from persona_rlhf.serving.local_engine import sample_tokens
from persona_rlhf.serving.openai_api import SamplingParams


def streams(count):
    return [torch.Generator().manual_seed(n) for n in range(count)]


def kept(logits: list[float], top_p: float) -> set[int]:
    """The nucleus token by token: the most likely ones, until they hold `top_p`."""
    shares = torch.softmax(torch.tensor(logits), 0).tolist()
    chosen, held = set(), 0.0
    for place in sorted(range(len(logits)), key=lambda n: -shares[n]):
        if held >= top_p and chosen:
            break
        chosen.add(place)
        held += shares[place]
    return chosen


@given(
    st.lists(st.integers(-6, 6), min_size=2, max_size=12, unique=True),
    st.sampled_from([1e-6, 0.1, 0.31, 0.5, 0.77, 0.9, 0.99]),
)
def test_the_nucleus_is_the_fewest_tokens_that_hold_the_share(logits, top_p):
    logits = [float(n) for n in logits]
    cut = nucleus(torch.tensor([logits]), torch.tensor([top_p]))[0]
    assert {n for n in range(len(logits)) if cut[n] > -torch.inf} == kept(logits, top_p)
    assert all(cut[n] == logits[n] for n in kept(logits, top_p))


def test_a_share_of_one_keeps_everything():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 30
    assert torch.equal(nucleus(logits, torch.ones(3)), logits)


def test_temperature_zero_takes_the_most_likely_token_beside_rows_that_draw():
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    sampling = [SamplingParams(1, temperature=float(n % 2)) for n in range(6)]
    assert sample_tokens(logits, sampling, streams(6))[::2].tolist() == logits.argmax(-1)[::2].tolist()


def test_tokens_come_as_often_as_the_cut_distribution_says():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(4000, -1)
    sampling = SamplingParams(1, temperature=0.5, top_p=0.95)
    tokens = sample_tokens(logits, [sampling] * 4000, streams(4000))
    shares = torch.bincount(tokens, minlength=4) / 4000
    expected = torch.softmax(nucleus(logits[:1] / 0.5, torch.tensor([0.95])), -1)[0]
    assert expected[2] == 0
    assert shares[2:].sum() == 0
    assert shares[0].item() == pytest.approx(expected[0].item(), abs=0.03)
