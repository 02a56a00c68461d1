import pytest
import torch

from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import prompt_ids
from persona_rlhf.evaluation.refusals import BaseAnswers, answer_text, refusal_outcomes


def judge(text: str) -> bool:
    """Half of what a random model says counts as a refusal."""
    return sum(map(ord, text)) % 2 == 0


@pytest.fixture
def prompts(base):
    texts = [
        "hello.",
        "how are you?",
        "a b c",
        "why not!",
        "tell me",
        "zzz",
        "please help",
        "run away now",
        "x",
        "oh no.",
    ]
    return [prompt_ids((Message("user", text),), base.tokenizer) for text in texts]


@pytest.mark.parametrize("tokens", [3, 12])
def test_the_shortcut_equals_writing_every_answer(adapted, adapters, prompts, tokens):
    """The oracle: every user alone, every answer written out and judged."""
    alphas = torch.tensor([1.0, 1.0, 0.5, 1.0, 0.75])
    found = refusal_outcomes(adapted, adapters, alphas, prompts, BaseAnswers(adapted, judge, tokens))
    for user in range(len(adapters)):
        with adapted.using(adapters[user : user + 1], alphas[user : user + 1]):
            (written,) = adapted.generate([prompts], tokens)
        assert found.refused[user] == [judge(answer_text(adapted, answer)) for answer in written]
    assert found.unchanged[0] == 1.0
    assert 0 < sum(found.unchanged[1:4]) / 3 < 1, "some answers must change, and some not, or the test shows nothing"
    assert any(own != found.refused[0] for own in found.refused)


def test_alpha_zero_is_the_base_and_writes_nothing(adapted, adapters, prompts, monkeypatch):
    base = BaseAnswers(adapted, judge, 8)
    expected = base.refused(prompts)
    monkeypatch.setattr(adapted, "generate", None)
    found = refusal_outcomes(adapted, adapters, torch.zeros(len(adapters)), prompts, base)
    assert found.refused == [expected] * len(adapters)
    assert found.unchanged == [1.0] * len(adapters)


def test_the_base_answers_each_prompt_once(adapted, prompts, monkeypatch):
    base = BaseAnswers(adapted, judge, 6)
    asked = []
    write = adapted.generate
    monkeypatch.setattr(adapted, "generate", lambda p, *rest: asked.extend(p[0]) or write(p, *rest))
    first = base.of([*prompts, *prompts])
    assert base.of(prompts) == first[: len(prompts)]
    assert asked == prompts


def test_an_answer_in_time_is_scored_with_its_end(adapted, prompts):
    """A cut answer has no end token in its row: the adapted answer is cut at the same place."""
    short, long = BaseAnswers(adapted, judge, 1).of(prompts), BaseAnswers(adapted, judge, 30).of(prompts)
    end = adapted.base.tokenizer.eos_token_id
    ended = [answer for answer in long if answer.row.completion[-1] == end]
    assert all(len(answer.row.completion) <= 1 for answer in short)
    assert all(len(answer.row.completion) <= 30 for answer in long if answer not in ended)


def test_nothing_asked(adapted, adapters):
    found = refusal_outcomes(adapted, adapters, torch.ones(5), [], BaseAnswers(adapted, judge, 4))
    assert found.refused == [[]] * 5
