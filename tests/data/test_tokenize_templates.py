"""Rows of every family of chat templates, held against what the template itself makes of the whole conversation."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from persona_rlhf.common.errors import InputError
from persona_rlhf.data.pairs import Message, PreferencePair, parse_row
from persona_rlhf.data.tokenize import prompt_ids, tokenize, turn_end
from tests.data.families import FAMILIES, TEMPLATES, tokenizer_for
from tests.data.tokenizers_by_hand import ENDLESS, GEMMA, tokenizer_of

SYSTEM = {"role": "system", "content": "be brief"}
ONE = [{"role": "user", "content": "the question"}]
THREE = [*ONE, {"role": "assistant", "content": "an answer"}, {"role": "user", "content": "and then?"}]
SETTINGS = {"enable_thinking": False, "date_string": "26 Jul 2024"}


def _pair(prompt: list[dict[str, str]]) -> PreferencePair:
    parsed = parse_row({"user_id": "u", "prompt": prompt, "chosen": "the answer is", "rejected": "No."}, "p.jsonl", 7)
    assert isinstance(parsed, PreferencePair)
    return parsed


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_template_belongs_to_a_family() -> None:
    assert {file.stem for file in TEMPLATES.iterdir()} == set(FAMILIES)


@pytest.mark.parametrize("turns", [ONE, THREE, [SYSTEM, *ONE], [SYSTEM, *THREE]])
def test_a_row_is_what_the_template_makes_of_the_conversation_to_the_end_of_its_turn(
    name: str, turns: list[dict[str, str]]
) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_for(name)
    if turns[0] == SYSTEM and family.system == "refused":
        with pytest.raises(InputError, match=r"p\.jsonl:7: prompt: .*System role not supported.*change it or the base"):
            tokenize([_pair(turns)], tokenizer, 512)
        return
    pair = _pair(turns)
    [[row]] = [user.train for user in tokenize([pair], tokenizer, 512)]
    turn = tokenizer.convert_tokens_to_ids(family.turn)
    assert turn == turn_end(tokenizer)
    for answer, text in ((row.chosen, pair.chosen), (row.rejected, pair.rejected)):
        conversation = [*turns, {"role": "assistant", "content": text}]
        whole = _theirs(tokenizer, conversation)
        ours, start = [*answer.prompt, *answer.completion], len(answer.prompt)
        assert ours == whole[: start + whole[start:].index(turn) + 1]
        assert answer.completion[-1] == turn
        assert tokenizer.decode(answer.completion[:-1]).strip() == text
        begin = tokenizer.bos_token_id
        assert ours[1] != begin
        assert ours.count(begin) == whole.count(begin) <= (1 if family.begin != family.turn else len(turns) + 2)
    expected = _theirs(tokenizer, turns, add_generation_prompt=True)
    assert list(row.chosen.prompt) == expected == list(prompt_ids(pair.prompt, tokenizer))


def _theirs(tokenizer: PreTrainedTokenizerFast, turns: list[dict[str, str]], **more: Any) -> list[int]:
    """What `transformers` makes of a conversation, on the 26th of July 2024."""
    template = tokenizer.chat_template.replace("strftime_now('%d %B %Y')", "'26 July 2024'")
    ids: list[int] = tokenizer.apply_chat_template(turns, chat_template=template, return_dict=False, **SETTINGS, **more)
    return ids


def test_a_system_turn_reaches_the_model(name: str) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_for(name)
    if family.system == "refused":
        return
    messages = (Message("system", "be brief"), Message("user", "the question"))
    text = tokenizer.decode(prompt_ids(messages, tokenizer))
    _, _, after = text.partition("be brief")
    assert after
    own_turn = any(mark in after.split("the question")[0] for mark in (family.turn, *family.roles, "<|user|>"))
    assert own_turn == (family.system == "kept")


@pytest.mark.parametrize("name", ["qwen3", "smollm3"])
def test_thinking_is_off_where_a_template_knows_it(name: str) -> None:
    tokenizer = tokenizer_for(name)
    text = tokenizer.decode(prompt_ids((Message("user", "the question"),), tokenizer))
    assert text.rstrip("\n").endswith("<|im_start|>assistant\n<think>\n\n</think>")
    assert "/think\n" not in text


@pytest.mark.parametrize(("name", "day"), [("llama3", "26 Jul 2024"), ("smollm3", "26 July 2024")])
def test_no_clock_reaches_the_tokens(name: str, day: str) -> None:
    """The same prompt has the same tokens tomorrow, so that caches and resumed runs stay exact."""
    tokenizer = tokenizer_for(name)
    assert f"Today Date: {day}\n" in tokenizer.decode(prompt_ids((Message("user", "the question"),), tokenizer))


def test_the_start_of_text_stands_once_though_the_tokenizer_would_add_another() -> None:
    for name in ("llama3", "gemma2", "gemma3", "mistral"):
        tokenizer = tokenizer_for(name)
        text = tokenizer.apply_chat_template(ONE, tokenize=False, **SETTINGS)
        assert tokenizer(text)["input_ids"].count(tokenizer.bos_token_id) == 2  # else this test shows nothing
        assert prompt_ids((Message("user", "the question"),), tokenizer).count(tokenizer.bos_token_id) == 1


def test_a_template_without_an_end_of_turn_is_told() -> None:
    with pytest.raises(InputError, match="no special token"):
        turn_end(tokenizer_of(ENDLESS))
    with pytest.raises(InputError, match="a single question"):
        turn_end(tokenizer_of("{{ raise_exception('never') }}" + GEMMA))
