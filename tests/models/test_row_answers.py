"""Answers decoded without padding: those of decoding each prompt alone, however few rows a step has."""

import pytest
import torch

from persona_rlhf.config.training import LoraSettings
from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.generation import generate_answers
from persona_rlhf.models.row_answers import greedy_answers, stepped_logits
from persona_rlhf.models.row_decoding import RowCache
from tests.models.tiny import VOCABULARY, random_flat, random_row, tiny_base

USERS, LIMIT = 3, 9


@pytest.fixture(scope="module", params=["all layers", "upper half"])
def adapted(request):
    layers = {"layers": "all"} if request.param == "all layers" else {"layers": {"top": 0.5}}
    model = AdaptedModel(tiny_base(), LoraSettings.model_validate({"rank": 4, "alpha": 8, **layers}))
    assert model.has_frozen_prefix == (request.param == "upper half")
    yield model
    model.close()


@pytest.fixture(scope="module")
def flat(adapted):
    return random_flat(adapted, USERS)


@pytest.fixture(scope="module")
def prompts():
    draw = torch.Generator().manual_seed(4)
    return [random_row(draw, length, 1, VOCABULARY).prompt for length in (3, 17, 9, 9, 30, 5, 12, 4)]


@pytest.fixture(scope="module")
def oracle(adapted, flat, prompts):
    """Every prompt of every user alone, by the padded loop over the cache of `transformers`."""

    def written(temperature):
        answers = []
        for user in range(USERS):
            with torch.no_grad(), adapted.using(flat[user : user + 1]):
                seeds = [7 * 1_000_003 + n for n in range(len(prompts))]
                answers.append(
                    [
                        generate_answers(adapted.base, 1, [prompt], [seed], LIMIT, temperature)[0]
                        for prompt, seed in zip(prompts, seeds, strict=True)
                    ]
                )
        return answers

    return written


@pytest.mark.parametrize("tokens", [1, 130, 100_000])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_of_prompts_alone(adapted, flat, prompts, oracle, monkeypatch, tokens, temperature):
    """With one row a step, with few whose slots others take over, and with all."""
    monkeypatch.setattr(adapted, "tokens_per_generation", tokens)
    monkeypatch.setattr(adapted, "tokens_per_pass", max(40, tokens // 2))
    with adapted.using(flat):
        assert adapted.generate([prompts] * USERS, LIMIT, temperature, seed=7) == oracle(temperature)


@pytest.mark.parametrize("tokens", [1, 130, 100_000])
def test_a_row_is_answered_from_where_it_stops_being_greedy(adapted, flat, prompts, oracle, monkeypatch, tokens):
    """The rows are the first user's answers, so only other users' answers are decoded."""
    monkeypatch.setattr(adapted, "tokens_per_generation", tokens)
    expected = oracle(0.0)
    ends = [answer.ids + (1,) * answer.finished for answer in expected[0]]
    rows = [[Row(prompt, ids) for prompt, ids in zip(prompts, ends, strict=True)]] * USERS
    for states in ([adapted.prefix_states(rows[0])] * USERS, []):
        with adapted.using(flat):
            scores, written = greedy_answers(adapted, rows, states, LIMIT)
            assert [[score[1:] for score in user] for user in scores] == [
                [score[1:] for score in user] for user in adapted.score_greedy(rows)
            ]
        assert written[0] == [None] * len(prompts)
        for user in range(1, USERS):
            for answer, score, alone in zip(written[user], scores[user], expected[user], strict=True):
                assert answer == (None if score.greedy else alone)
        assert any(answer is not None for user in written[1:] for answer in user)


def test_users_may_have_any_number_of_prompts(adapted, flat, prompts, oracle):
    counts = (8, 0, 3)
    with adapted.using(flat):
        answers = adapted.generate([prompts[:count] for count in counts], LIMIT)
    assert answers == [user[:count] for user, count in zip(oracle(0.0), counts, strict=True)]


def test_a_base_whose_steps_differ_is_decoded_with_padding(adapted, flat, prompts, oracle, monkeypatch):
    """A cache that loses a token gives other logits: the check at the start sees it."""
    rows = adapted._check.rows
    assert adapted.decodes_rows([rows], LIMIT)
    assert adapted._check.passes(lambda some: stepped_logits(adapted, some))
    attend = RowCache.attend

    def forgetful(self, query, key, value, scaling):
        return attend(self, query, 0 * key, value, scaling)

    monkeypatch.setattr(RowCache, "attend", forgetful)
    assert not adapted._check.passes(lambda some: stepped_logits(adapted, some))
    monkeypatch.setattr(adapted, "_steps_are_exact", False)
    with adapted.using(flat):
        assert adapted.generate([prompts] * USERS, LIMIT) == oracle(0.0)


def test_a_kept_pass_computes_the_last_layer_only_where_it_is_read(adapted, flat, prompts):
    """Its logits are those of whole layers, and so are the keys and values of every token."""
    rows = [Row(prompt, prompt[:2]) for prompt in prompts] * USERS
    batch, seen = adapted.batch(rows, USERS), []
    kept, whole = [], []
    assert adapted._pruning is not None
    with torch.no_grad(), adapted.using(flat):
        hook = adapted._pruning._projection.register_forward_hook(lambda _, __, y: seen.append(y.shape[:-1].numel()))
        pruned = adapted.logits(batch, (), kept)
        expected = adapted.logits(batch)
        hook.remove()
        before, adapted._pruning = adapted._pruning, None
        adapted.logits(batch, (), whole)
        adapted._pruning = before
    assert seen == [len(batch.targets), batch.input_ids.numel()]
    assert torch.allclose(pruned, expected, rtol=0, atol=1e-5)
    for one, other in zip(kept, whole, strict=True):
        assert len(one.keys) == batch.input_ids.numel()
        assert all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(one, other, strict=True))


def test_slots_are_taken_over_and_given_up():
    """By hand: rows of two tokens; a free slot is filled first, and a smaller cache keeps its rows' order."""
    cache = RowCache(4, torch.device("cpu"))
    assert cache.admit([], [2, 2, 2], []) == [0, 1, 2]
    assert cache.begin_step([2, 0]).tolist() == [[2, 2]]
    cache.end_step()
    assert cache.lengths.tolist() == [3, 2, 3]
    assert cache.admit([], [1, 1], [0, 2]) == [1, 3]
    assert cache.lengths.tolist() == [3, 1, 3, 1]
    cache.shrink([3, 0])
    assert cache.lengths.tolist() == [1, 3]
