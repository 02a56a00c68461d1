"""An answer that begins as a score says is generated from there on, and is the answer that decoding writes."""

from itertools import product

import pytest
import torch

from persona_rlhf.config.training import LoraSettings
from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import Row, prompt_ids
from persona_rlhf.evaluation.refusals import (
    BaseAnswers,
    answer_text,
    continue_answers,
    greedy_opening,
    refusal_outcomes,
)
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import Base
from persona_rlhf.models.scores import GreedyScore

TOKENS = 8


@pytest.fixture
def terse(base):
    """The tiny model where a good part of its tokens ends an answer: its answers are short and repeat each other."""
    ends = tuple(range(5, 27))

    class Terse(Base):
        @property
        def eos_ids(self):
            return (base.tokenizer.eos_token_id, *ends)

    model = AdaptedModel(
        Terse(base.model, base.tokenizer, base.name, base.weights_hash, base.context), LoraSettings(rank=2, alpha=4)
    )
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


@pytest.fixture
def written(terse, adapters, prompts):
    """The oracle: every user alone, every answer decoded from its first token on."""
    alphas, answers = torch.tensor([1.0, 1.0, 0.5, 1.0, 0.75]), []
    for user in range(len(adapters)):
        with terse.using(adapters[user : user + 1], alphas[user : user + 1]):
            answers += terse.generate([prompts], TOKENS)
    return alphas, answers


@pytest.mark.parametrize("padded", [False, True])
def test_outcomes_are_those_of_decoding(terse, adapters, prompts, written, monkeypatch, padded):
    monkeypatch.setattr(terse, "_steps_are_exact", not padded)
    alphas, answers = written
    found = refusal_outcomes(
        terse, adapters, alphas, prompts, BaseAnswers(terse, lambda text: len(text) % 2 == 0, TOKENS, harmless=True)
    )
    assert found.texts == [[answer_text(terse, answer) for answer in user] for user in answers]
    assert found.refused == [[len(text) % 2 == 0 for text in texts] for texts in found.texts]


@pytest.mark.parametrize("known", [1, 3, TOKENS])
def test_they_are_what_decoding_writes(terse, adapters, prompts, written, known):
    alphas, answers = written
    whole = [[answer.ids + terse.base.eos_ids[:1] * answer.finished for answer in user] for user in answers]
    openings = [[ids[: 1 + n % known] for n, ids in enumerate(user)] for user in whole]
    with terse.using(adapters, alphas):
        assert continue_answers(terse, [prompts] * len(adapters), openings, TOKENS) == answers
    assert any(answer.finished for user in answers for answer in user)
    assert any(not answer.finished for user in answers for answer in user)


def test_wrong_openings_are_what_goes_wrong(terse, adapters, prompts, written):
    """An opening is believed: one that decoding would not write gives another answer."""
    alphas, answers = written
    end = terse.base.eos_ids[0]
    with terse.using(adapters, alphas):
        ended = continue_answers(terse, [prompts] * len(adapters), [[(end,)] * len(prompts)] * len(adapters), TOKENS)
    assert all(answer.ids == () and answer.finished for user in ended for answer in user)
    assert ended != answers


def test_what_a_score_tells_by_hand():
    row = Row((1, 2), (3, 4, 5))
    assert greedy_opening(row, GreedyScore(-1.0, 3, 3)) == (3, 4, 5)
    assert greedy_opening(row, GreedyScore(-1.0, 3, 0, 9)) == (9,)
    assert greedy_opening(row, GreedyScore(-1.0, 3, 2, 9)) == (3, 4, 9)


def test_scores_name_the_likeliest_token_after_those_that_agree(terse, adapters, prompts):
    with terse.using(adapters[3:4]):
        [answers] = terse.generate([prompts], TOKENS)
        whole = [Row(p, a.ids) for p, a in zip(prompts, answers, strict=True) if len(a.ids) > 1]
        [right] = terse.score_greedy([whole])
        changed = [row._replace(completion=(row.completion[0], 6, *row.completion[2:])) for row in whole]
        [wrong] = terse.score_greedy([changed])
    assert whole
    for row, good, bad in zip(whole, right, wrong, strict=True):
        assert (good.matched, good.next_token, good.greedy) == (len(row.completion), None, True)
        assert (bad.matched, bad.next_token, bad.greedy) == (1, row.completion[1], False)
