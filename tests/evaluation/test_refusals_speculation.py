"""Answers that are guessed are those that decoding writes, whatever was guessed."""

from itertools import product

import pytest
import torch

from persona_rlhf.config.training import LoraSettings
from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import Row, prompt_ids
from persona_rlhf.evaluation import refusals
from persona_rlhf.evaluation.refusals import StartedAnswer, greedy_answers, opening_of
from persona_rlhf.models.adapted_model import AdaptedModel, GreedyScore
from persona_rlhf.models.base import Base

TOKENS = 8


@pytest.fixture
def terse(base):
    """The tiny model where a good part of its tokens ends an answer: its answers are short and repeat each other."""
    ends = tuple(range(5, 27))

    class Terse(Base):
        @property
        def eos_ids(self):
            return (base.tokenizer.eos_token_id, *ends)

    known = Terse(base.model, base.tokenizer, base.name, base.weights_hash, base.context)
    model = AdaptedModel(known, LoraSettings(rank=2, alpha=4))
    yield model
    model.close()


@pytest.fixture
def adapters(terse):
    noise = torch.randn(5, terse.params_per_user, generator=torch.Generator().manual_seed(1))
    return noise * torch.tensor([0.0, 0.03, 0.06, 0.12, 0.3])[:, None]


@pytest.fixture
def prompts(base):
    texts = ["".join(letters) for letters in product("abcdefgh", repeat=2)]
    return [prompt_ids((Message("user", text),), base.tokenizer) for text in texts]


@pytest.mark.parametrize("written", [4, 16])
def test_they_are_what_decoding_writes(terse, adapters, prompts, monkeypatch, written):
    monkeypatch.setattr(refusals, "_WRITTEN", written)
    alphas = torch.tensor([1.0, 1.0, 0.5, 1.0, 0.75])
    expected = []
    for user in range(len(adapters)):
        with terse.using(adapters[user : user + 1], alphas[user : user + 1]):
            expected += terse.generate([prompts], TOKENS)
    asked = []
    write = terse.generate
    monkeypatch.setattr(terse, "generate", lambda p, *rest: asked.extend(map(len, p)) or write(p, *rest))
    begun = [[StartedAnswer(prompt, ()) for prompt in prompts]] * len(adapters)
    assert greedy_answers(terse, adapters, alphas, begun, TOKENS, terse.prefix_states) == expected
    assert sum(asked) < 0.8 * len(adapters) * len(prompts), "many must be guessed, or the test shows nothing"
    known = [
        [StartedAnswer(p, a.ids[: n % 3]) for n, (p, a) in enumerate(zip(prompts, own, strict=True))]
        for own in expected
    ]
    assert greedy_answers(terse, adapters, alphas, known, TOKENS, terse.prefix_states) == expected


def test_wrong_openings_are_what_goes_wrong(terse, adapters, prompts):
    """What is known is believed: an opening that decoding would not write gives another answer."""
    ones = torch.ones(len(adapters))
    plain = greedy_answers(
        terse, adapters, ones, [[StartedAnswer(p, ()) for p in prompts]] * len(adapters), TOKENS, terse.prefix_states
    )
    end = terse.base.eos_ids[0]
    ended = greedy_answers(
        terse,
        adapters,
        ones,
        [[StartedAnswer(p, (end,)) for p in prompts]] * len(adapters),
        TOKENS,
        terse.prefix_states,
    )
    assert all(answer.ids == () and answer.finished for own in ended for answer in own)
    assert ended != plain


def test_what_a_score_tells_by_hand():
    row = Row((1, 2), (3, 4, 5))
    assert opening_of(row, GreedyScore(-1.0, 3, 3)) == (3, 4, 5)
    assert opening_of(row, GreedyScore(-1.0, 3, 0, 9)) == (9,)
    assert opening_of(row, GreedyScore(-1.0, 3, 2, 9)) == (3, 4, 9)


def test_scores_name_the_likeliest_token_after_those_that_agree(terse, adapters, prompts):
    with terse.using(adapters[3:4]):
        [answers] = terse.generate([prompts], TOKENS)
        whole = [Row(p, a.ids) for p, a in zip(prompts, answers, strict=True) if len(a.ids) > 1]
        [right] = terse.score_greedy([whole])
        [wrong] = terse.score_greedy(
            [[row._replace(completion=(row.completion[0], 6, *row.completion[2:])) for row in whole]]
        )
    assert whole
    for row, good, bad in zip(whole, right, wrong, strict=True):
        assert (good.matched, good.next_token, good.greedy) == (len(row.completion), None, True)
        assert (bad.matched, bad.next_token, bad.greedy) == (1, row.completion[1], False)
