import json

import pytest
import torch

from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import prompt_ids
from persona_rlhf.evaluation.refusals import BaseAnswers, refusal_outcomes
from tests.evaluation.conftest import written_out


def judge(text: str) -> bool:
    """Half of what a random model says counts as a refusal."""
    return sum(map(ord, text)) % 2 == 0


@pytest.fixture
def base(ending_base):
    return ending_base


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
    """Every user alone, every answer written out and judged."""
    alphas = torch.tensor([1.0, 1.0, 0.5, 1.0, 0.75])
    found = refusal_outcomes(adapted, adapters, alphas, prompts, BaseAnswers(adapted, judge, tokens))
    for user in range(len(adapters)):
        with adapted.using(adapters[user : user + 1], alphas[user : user + 1]):
            written = [written_out(adapted, prompt, tokens, judge) for prompt in prompts]
        assert found.texts[user] == [text for text, _, _ in written]
        assert found.refused[user] == [refused for _, refused, _ in written]
    assert found.unchanged[0] == 1.0
    assert 0 < sum(found.unchanged[1:4]) / 3 < 1, "some answers must change, and some not, or the test shows nothing"
    assert any(own != found.refused[0] for own in found.refused)


@pytest.mark.parametrize("harmless", [False, True])
@pytest.mark.parametrize("tokens", [3, 12])
def test_kept_answers_have_the_same_verdicts_and_are_not_written_again(adapted, prompts, monkeypatch, tokens, harmless):
    first, second = (BaseAnswers(adapted, judge, tokens, harmless=harmless) for _ in range(2))
    answers = first.of(prompts)
    second.keep(json.loads(json.dumps(first.to_json())))
    monkeypatch.setattr(adapted, "generate", None)
    assert second.of(prompts) == answers
    assert second.to_json() == first.to_json()
    assert second.states.keys() == first.states.keys()
    assert {answer.refused for answer in answers} == {True, False}, "both verdicts, or the test shows little"


def test_the_second_judge_reads_prompts_that_are_filled_in_later(adapted, prompts):
    texts, read = {}, []

    def second(answered):
        read.extend(one.prompt for one in answered)
        return [True] * len(answered)

    answers = BaseAnswers(adapted, lambda text: True, 3, second, texts)
    texts |= {prompt: f"prompt {n}" for n, prompt in enumerate(prompts)}
    answers.of(prompts)
    assert set(read) == set(texts.values())


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
    begun = len(asked)
    assert base.of(prompts) == first[: len(prompts)]
    assert asked[: len(prompts)] == prompts
    assert len(asked) == begun


def test_an_answer_that_ended_is_scored_with_its_end(adapted, prompts):
    """A cut answer has no end token in its row: the adapted answer is cut at the same place."""
    end = adapted.base.tokenizer.eos_token_id
    for tokens in (1, 30):
        for prompt, answer in zip(prompts, BaseAnswers(adapted, judge, tokens).of(prompts), strict=True):
            with adapted.using(None):
                text, refused, length = written_out(adapted, prompt, tokens, judge)
            assert answer.text == text
            assert answer.refused == refused
            ended = answer.row.completion[-1] == end
            assert len(answer.row.completion) == length + ended
            assert ended or not answer.refused


CUT = "a refusal that the limit cuts is"


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_refusal_that_is_cut_is_continued_and_one_that_never_ends_is_none(adapted, prompts, tokens):
    answers = BaseAnswers(adapted, lambda text: True, tokens).of(prompts)
    lengths = [(len(answer.row.completion), answer.refused) for answer in answers]
    assert all(length <= 4 * tokens for length, _ in lengths)
    assert any(length > tokens + 1 and refused for length, refused in lengths), f"{CUT} continued"
    assert any(length == 4 * tokens and not refused for length, refused in lengths), f"{CUT} none, if it has no end"


def test_an_answer_that_is_no_refusal_yet_is_not_continued(adapted, prompts):
    answers = BaseAnswers(adapted, lambda text: False, 2).of(prompts)
    assert max(len(answer.row.completion) for answer in answers) <= 3


def test_no_answer_is_continued_beyond_the_context(adapted, monkeypatch):
    prompt = prompt_ids((Message("user", "hello " * 40),), adapted.base.tokenizer)
    prompts = [prompt[:1] + prompt[-n:] for n in range(len(prompt) - 5, len(prompt))]
    object.__setattr__(adapted.base, "context", len(prompt) + 6)
    answers = BaseAnswers(adapted, lambda text: True, 4).of(prompts)
    assert max(len(answer.row.prompt) + len(answer.row.completion) for answer in answers) <= len(prompt) + 7


def test_to_harmless_prompts_one_judge_and_a_cut_text_are_enough(adapted, adapters, prompts):
    """The count against the adapter is the larger one: for over-refusal a doubt is a refusal."""

    def second(answered):
        return [len(one.answer) % 3 == 0 for one in answered]

    base = BaseAnswers(adapted, judge, 3, second, harmless=True)
    found = refusal_outcomes(adapted, adapters, torch.ones(len(adapters)), prompts, base)
    assert found.refused == [[judge(text) or len(text) % 3 == 0 for text in user] for user in found.texts]
    strict = refusal_outcomes(
        adapted, adapters, torch.ones(len(adapters)), prompts, BaseAnswers(adapted, judge, 3, second)
    )
    for counted, refused in zip(found.refused, strict.refused, strict=True):
        assert all(one or not other for one, other in zip(counted, refused, strict=True))
    assert found.refused != strict.refused


def test_judges_of_openings_say_the_same_of_whole_answers(adapted, adapters, prompts):
    """Over-refusal is measured on whole answers and gated on openings: both must count the same refusals."""
    alphas, opening = torch.ones(len(adapters)), 3
    short, whole = (
        refusal_outcomes(adapted, adapters, alphas, prompts, answers)
        for answers in (
            BaseAnswers(adapted, judge, opening, harmless=True),
            BaseAnswers(adapted, judge, 12, harmless=True, opening=opening),
        )
    )
    assert whole.refused == short.refused
    assert whole.texts != short.texts
    assert whole.refused != [[judge(text) for text in user] for user in whole.texts]


def test_nothing_asked(adapted, adapters):
    found = refusal_outcomes(adapted, adapters, torch.ones(5), [], BaseAnswers(adapted, judge, 4))
    assert found.refused == [[]] * 5
