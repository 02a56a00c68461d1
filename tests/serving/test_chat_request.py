from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.data.pairs import Message
from persona_rlhf.serving import chat_request
from persona_rlhf.serving.openai_api import APIError, SamplingParams

TEXT = {"type": "text", "text": "one"}
ASKED = {"model": "ann", "messages": [{"role": "user", "content": "hi"}]}


def parse(raw, most_tokens):
    return chat_request.parse(raw, most_tokens, most_choices=4)


def body(**changes) -> bytes:
    return json.dumps(ASKED | changes).encode()


def test_what_is_asked_is_taken():
    request = parse(body(max_tokens=7, temperature=0, top_p=0.5, stop="x", seed=3, stream=True, n=1, user="me"), 64)
    assert request.sampling == SamplingParams(7, 0.0, 0.5, 3, ("x",), True)
    assert request.messages == (Message("user", "hi"),)
    assert parse(body(), 64).sampling == SamplingParams(64, 1.0, 1.0, None, (), False)
    assert parse(body(max_completion_tokens=9, stop=["a", "b"]), 64).sampling.max_tokens == 9


@pytest.mark.parametrize(
    ("param", "changes"),
    [
        ("max_tokens", {"max_tokens": -1}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": 65}),
        ("max_tokens", {"max_tokens": 10**30}),
        ("max_tokens", {"max_tokens": "7"}),
        ("max_tokens", {"max_tokens": True}),
        ("max_completion_tokens", {"max_completion_tokens": -5}),
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": 2.1}),
        ("temperature", {"temperature": float("nan")}),
        ("temperature", {"temperature": float("inf")}),
        ("top_p", {"top_p": -1}),
        ("top_p", {"top_p": 0}),
        ("top_p", {"top_p": 1.5}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": 2**64}),
        ("stop", {"stop": ["a"] * 5}),
        ("stop", {"stop": ""}),
        ("stop", {"stop": ["x" * 101]}),
        ("max_completion_tokens", {"max_completion_tokens": 65}),
        ("n", {"n": 5}),
        ("n", {"n": 0}),
        ("n", {"n": 10**30}),
        ("logprobs", {"logprobs": 1}),
        ("top_logprobs", {"top_logprobs": 3}),
        ("top_logprobs", {"logprobs": False, "top_logprobs": 3}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("logit_bias", {"logit_bias": {"5": 1}}),
        ("response_format", {"response_format": {"type": "json_object"}}),
        ("response_format", {"response_format": {"type": "text", "more": 1}}),
        ("tool_choice", {"tool_choice": "required"}),
        ("modalities", {"modalities": ["text", "audio"]}),
        ("store", {"store": True}),
        ("nonsense", {"nonsense": 1}),
        ("presence_penalty", {"presence_penalty": 0.5}),
        ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("messages", {"messages": []}),
        ("messages", {"messages": "hi"}),
        ("messages[0]", {"messages": [3]}),
        ("messages[0]", {"messages": [{"role": "user"}]}),
        ("messages[0].role", {"messages": [{"role": "tool", "content": "x"}]}),
        ("messages", {"messages": [{"role": "assistant", "content": "x"}]}),
        (
            "messages[1].role",
            {"messages": [*ASKED["messages"], {"role": "system", "content": "x"}]},
        ),
        ("messages[1].role", {"messages": [*ASKED["messages"], {"role": "developer", "content": "x"}]}),
        ("messages[0].content[0]", {"messages": [{"role": "user", "content": ["x"]}]}),
        ("messages[0].content", {"messages": [{"role": "user", "content": []}]}),
        ("messages[0].content", {"messages": [{"role": "user", "content": None}]}),
        ("messages[0].content[1]", {"messages": [{"role": "user", "content": [TEXT, {"type": "image_url"}]}]}),
        ("messages[0].tool_calls", {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]}),
        ("model", {"model": None}),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_what_cannot_be_is_error_by_name(param, changes):
    with pytest.raises(APIError) as error:
        parse(body(**changes), 64)
    assert error.value.status == 400
    assert error.value.param == param
    assert error.value.to_json()["error"] == {
        "message": error.value.message,
        "type": "invalid_request_error",
        "param": param,
        "code": "invalid_value",
    }


def test_a_mistake_in_a_message_is_said_with_its_place():
    with pytest.raises(APIError) as error:
        parse(body(messages=[*ASKED["messages"], {"role": "assistant", "content": 3}, *ASKED["messages"]]), 64)
    assert error.value.message.startswith("messages[1].content must be a text")


@pytest.mark.parametrize(
    "harmless",
    [{"tools": []}, {"tools": None}, {"logit_bias": {}}, {"response_format": {"type": "text"}},
     {"service_tier": "auto"}, {"safety_identifier": "x"},
     {"user": "x"}, {"metadata": {"a": "b"}}, {"store": False}, {"presence_penalty": 0},
     {"tool_choice": "none"}, {"parallel_tool_calls": True}, {"modalities": ["text"]}, {"n": 1}, {"logprobs": False},
     {"prompt_cache_key": "x"}, {"verbosity": "medium"}, {"audio": None}, {"stream": False}],
    ids=json.dumps,
)  # fmt: skip
def test_a_default_is_taken_and_changes_nothing(harmless):
    assert parse(body(**harmless), 64) == parse(body(), 64)


def test_parts_of_text_and_the_developers_role_are_read():
    messages = [
        {"role": "developer", "content": [TEXT, {"type": "text", "text": "two"}]},
        {"role": "user", "content": [TEXT], "name": "ann"},
        {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": "y"},
    ]
    read = (Message("system", "one\ntwo"), Message("user", "one"), Message("assistant", "x"), Message("user", "y"))
    assert parse(body(messages=messages), 64).messages == read


def test_choices_have_seeds_of_their_own():
    request = parse(body(n=3, seed=2**63 - 1, logprobs=True, top_logprobs=2), 64)
    assert [one.seed for one in request.samplings()] == [2**63 - 1, 0, 1]
    assert {one.logprobs for one in request.samplings()} == {2}
    assert [one.seed for one in parse(body(n=2), 64).samplings()] == [None, None]
    assert parse(body(logprobs=True), 64).sampling.logprobs == 0


@given(st.binary(max_size=60) | st.sampled_from([b"[" * 5000, b'{"a":' * 5000, b"null", b"3", b"[]", b"\xff", b""]))
def test_no_body_is_a_fault_of_ours(raw):
    with pytest.raises(APIError) as error:
        parse(raw, 64)
    assert error.value.status == 400
