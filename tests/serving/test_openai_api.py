from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.data.pairs import Message
from persona_rlhf.serving.openai_api import APIError, SamplingParams, parse

ASKED = {"model": "ann", "messages": [{"role": "user", "content": "hi"}]}


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
        ("n", {"n": 2}),
        ("logprobs", {"logprobs": True}),
        ("presence_penalty", {"presence_penalty": 0.5}),
        ("tools", {"tools": []}),
        ("messages", {"messages": []}),
        ("messages", {"messages": "hi"}),
        ("messages", {"messages": [{"role": "user"}]}),
        ("messages", {"messages": [{"role": "tool", "content": "x"}]}),
        ("messages", {"messages": [{"role": "assistant", "content": "x"}]}),
        ("messages", {"messages": [*ASKED["messages"], {"role": "system", "content": "x"}, *ASKED["messages"]]}),
        ("messages", {"messages": [{"role": "user", "content": ["x"]}]}),
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


@given(st.binary(max_size=60) | st.sampled_from([b"[" * 5000, b'{"a":' * 5000, b"null", b"3", b"[]", b"\xff", b""]))
def test_no_body_is_a_fault_of_ours(raw):
    with pytest.raises(APIError) as error:
        parse(raw, 64)
    assert error.value.status == 400
