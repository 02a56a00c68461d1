from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.models.generation import nucleus
from persona_rlhf.serving.local_engine import BatchingEngine, sample_tokens, token_logprob
from persona_rlhf.serving.openai_api import SamplingParams
from persona_rlhf.serving.policy_filter import join_chunks


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


@pytest.mark.parametrize("user", [None, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_log_probabilities_are_those_of_a_whole_forward_pass(fleet, user, temperature):
    """Whatever else is in the batch, and at temperature 1 however the tokens were drawn."""
    engine, prompt, base = BatchingEngine(fleet.adapted), (5, 6, 7), fleet.adapted.base
    flat = None if user is None else fleet.flat[user]
    plain = engine.generate(fleet.flat[1], (8, 9, 10, 11, 12), SamplingParams(9))
    answer = join_chunks(engine.generate(flat, prompt, SamplingParams(6, temperature, seed=1, stream=True, logprobs=2)))
    assert join_chunks(plain).logprobs == ()
    engine.close()
    ids = [*prompt, *base.tokenizer.convert_tokens_to_ids([one.token for one in answer.logprobs])]
    with torch.inference_mode(), fleet.adapted.using(None if flat is None else flat[None]):
        logits = base.model(input_ids=torch.tensor([ids])).logits[0].float()
    logprobs = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    assert len(answer.logprobs) >= 4
    for one, row, token in zip(answer.logprobs, logprobs, ids[len(prompt) :], strict=True):
        assert one.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [value for _, value in one.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)


def test_an_impossible_token_has_a_number_that_json_can_hold(base):
    logits = torch.full((len(base.tokenizer),), -torch.inf)
    logits[3] = 0.0
    assert token_logprob(logits, 4, 0, base.tokenizer).logprob == -9999.0
