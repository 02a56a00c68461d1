from __future__ import annotations

import asyncio
import json
import threading
import time

import httpx
import pytest

from persona_rlhf.common.files import slug
from persona_rlhf.release.results import PairCounts, skipped
from persona_rlhf.serving.access import AdapterAccess, Limits, make_tokens, read_tokens
from persona_rlhf.serving.openai_api import APIError, TextChunk, Usage
from persona_rlhf.serving.policy_filter import INSTEAD, PolicyFilter
from persona_rlhf.serving.server import Gateway
from tests.serving.conftest import RELEASED, slugs

ADA, ADA2 = slug("Ada"), slug("ada")


class Echo:
    """A writer that says who was asked what, word by word."""

    def __init__(self):
        self.asked = []
        self.fault = None
        self.hold = threading.Event()
        self.hold.set()

    def write(self, model, messages, wish):
        self.asked.append((model, messages))
        if isinstance(self.fault, APIError):
            raise self.fault
        return self.pieces(model, messages)

    def pieces(self, model, messages):
        self.hold.wait(10)
        if self.fault is not None:
            raise self.fault
        for word in (f"{model or 'the base'}", " says", f" {messages[-1].content}"):
            yield TextChunk(word)
        yield TextChunk("", "stop", Usage(5, 3))


class Known(AdapterAccess):
    """Who is served, without a run on a disk."""

    def __init__(self, user_ids):
        self.results = {slug(one): skipped(one, "", PairCounts(0, 0, 0)) for one in user_ids}

    def check(self, slug, again=False):
        if slug not in self.results:
            raise APIError(403, "not served", "adapter_not_served")
        return self.results[slug]


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def served() -> Known:
    return Known(RELEASED)


@pytest.fixture
def tokens(tmp_path):
    made = make_tokens(tmp_path / "tokens", slugs())
    return read_tokens(tmp_path / "tokens"), made


@pytest.fixture
def ask(echo, served, tokens, told):
    """Asks the app: `ask(slug, **changes of the body)`; or another path, method or headers."""
    known, made = tokens
    apps = {}

    def ask(user=ADA, *, path="/v1/chat/completions", guard=None, limits=None, headers=None, content=None, **changes):
        key = (guard, limits)
        if key not in apps:
            apps[key] = Gateway(echo, served, known, told.append, guard, limits).app()
        body = {"model": user, "messages": [{"role": "user", "content": "hi"}]} | changes
        sent = {"Authorization": f"Bearer {made[user]}"} if headers is None else headers

        async def go():
            transport = httpx.ASGITransport(apps[key])
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                if path == "/v1/chat/completions":
                    return await client.post(path, headers=sent, content=content or json.dumps(body))
                return await client.get(path, headers=sent)

        return asyncio.run(go())

    return ask


def test_an_answer_in_openais_form(ask):
    found = ask().json()
    assert found["object"] == "chat.completion"
    assert found["model"] == ADA
    assert found["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": f"{ADA} says hi"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert found["usage"] == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}


def events(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def test_a_stream_in_openais_form(ask):
    response = ask(stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *found, done = events(response)
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in found]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == f"{ADA} says hi"
    assert [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]][-1] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 8


def test_everyone_sees_his_own_model_only(ask, served):
    assert [model["id"] for model in ask(ADA, path="/v1/models").json()["data"]] == [ADA]
    assert [model["id"] for model in ask(ADA2, path="/v1/models").json()["data"]] == [ADA2]
    del served.results[slug("../../etc")]
    assert ask(slug("../../etc"), path="/v1/models").json()["data"] == []


@pytest.mark.parametrize(
    "model", [ADA2, slug("nan"), "nobody", "", "base", ".", "..", f"../{ADA2}", f"{ADA}/../{ADA2}", f"./{ADA}",
              f"{ADA}/", f"{ADA} ", ADA.upper(), f"{ADA}\0", "../../../etc/passwd", "%2e%2e%2f" + ADA2, "ä\U0001f480"],
)  # fmt: skip
def test_a_foreign_model_an_unknown_one_and_a_path_get_the_same_answer(ask, echo, model):
    found = ask(ADA, model=model)
    assert found.status_code == 404
    assert found.content == ask(ADA, model="no-such-model").content
    assert echo.asked == []


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer"}, {"Authorization": "Bearer nonsense"}, {"Authorization": "Basic abc"},
                {"Authorization": f"Bearer {ADA}"}, {"Authorization": "Bearer prlhf__"}],
)  # fmt: skip
def test_without_a_token_nobody_comes_in(ask, echo, headers):
    for path in ("/v1/chat/completions", "/v1/models"):
        found = ask(path=path, headers=headers, content=b"x" * 100)
        assert found.status_code == 401
        assert found.headers["www-authenticate"] == "Bearer"
        assert found.json()["error"]["code"] == "invalid_api_key"
    assert echo.asked == []


def test_the_body_is_limited_whether_it_says_its_length_or_not(ask, tokens, echo):
    small = Limits(body=1_000)
    assert ask(limits=small).status_code == 200
    found = ask(limits=small, content=b"x" * 1_001)
    assert found.status_code == 413
    read = 0

    async def endless():
        nonlocal read
        while True:
            read += 100
            yield b"x" * 100

    assert ask(limits=small, content=endless()).status_code == 413
    assert read <= 1_300


def test_the_rate_is_limited_and_says_when_to_come_back(ask):
    slow = Limits(rate=2)
    assert [ask(limits=slow).status_code for _ in range(3)] == [200, 200, 429]
    late = ask(limits=slow)
    assert int(late.headers["retry-after"]) in range(1, 31)
    assert late.json()["error"]["code"] == "rate_limit_exceeded"
    assert ask(ADA2, limits=slow).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_places_are_limited_and_given_back(ask, echo, stream):
    one = Limits(concurrent=1)
    assert ask(limits=one).status_code == 200
    echo.hold.clear()
    first: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: first.append(ask(limits=one, stream=stream)))
    thread.start()
    while len(echo.asked) < 2:
        time.sleep(0.001)
    assert ask(ADA2, limits=one).status_code == 429
    echo.hold.set()
    thread.join()
    assert first[0].status_code == 200
    assert ask(ADA2, limits=one).status_code == 200


def test_a_fault_shows_no_traceback_and_nothing_of_anybody(ask, echo, told):
    echo.fault = RuntimeError("the private words of bob")
    found = ask()
    assert found.status_code == 500
    assert found.json()["error"] == {
        "message": "The server failed at this request.",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    streamed = events(ask(stream=True))
    assert json.loads(streamed[-1]) == found.json()
    assert len(told) == 2
    assert not any("private" in line for line in told)
    assert all("RuntimeError at test_server.py" in line for line in told)


def test_a_declined_request_keeps_its_status_in_a_stream_too(ask, echo):
    echo.fault = APIError(400, "too long", "context_length_exceeded", "messages")
    for stream in (False, True):
        found = ask(stream=stream)
        assert (found.status_code, found.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_an_adapter_that_was_edited_is_not_written_with(run, admitted, echo, tokens, told):
    (run.path / "adapters" / ADA / "adapter_config.json").write_text("{}")
    app = Gateway(echo, admitted, tokens[0], told.append).app()
    asked = {"model": ADA, "messages": [{"role": "user", "content": "hi"}]}

    async def go():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            headers = {"Authorization": f"Bearer {tokens[1][ADA]}"}
            return await client.post("/v1/chat/completions", json=asked, headers=headers)

    found = asyncio.run(go())
    assert (found.status_code, found.json()["error"]["code"]) == (403, "adapter_not_served")
    assert str(run.path) not in found.text
    assert echo.asked == []


def test_other_places_hold_nothing(ask):
    for path in ("/", "/docs", "/openapi.json", "/v1/chat/completions/x", "/v1/models/../../etc/passwd"):
        found = ask(path=path)
        assert found.status_code == 404
        assert found.json()["error"]["code"] == "not_found"
    assert ask(path="/health", headers={}).json() == {"status": "ok"}


def test_the_policys_words_stand_first(ask, echo):
    guard = PolicyFilter(system_prompt=lambda user_id: f"Be kind to {user_id}." if user_id == "Ada" else "")
    ask(ADA, guard=guard)
    ask(ADA2, guard=guard)
    mine = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    ask(ADA, guard=guard, messages=mine)
    said = [[tuple(message) for message in messages] for _, messages in echo.asked]
    assert said == [
        [("system", "Be kind to Ada."), ("user", "hi")],
        [("user", "hi")],
        [("system", "Be kind to Ada.\n\nBe brief."), ("user", "hi")],
    ]


def test_a_redirected_request_does_not_reach_the_model(ask, echo):
    guard = PolicyFilter(redirect=lambda prompt: "Ask your doctor." if prompt == "pills?" else None)
    [choice] = ask(guard=guard, messages=[{"role": "user", "content": "pills?"}]).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Ask your doctor.", "content_filter")
    assert echo.asked == []
    assert ask(guard=guard).json()["choices"][0]["message"]["content"] == f"{ADA} says hi"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("passes", "asked", "answer", "finish", "written"),
    [
        ("both", [ADA], f"{ADA} says hi", "stop", 3),
        ("base", [ADA, None], "the base says hi", "stop", 6),
        ("none", [ADA, None], INSTEAD, "content_filter", 6),
    ],
)
def test_an_answer_that_fails_is_the_bases_or_a_fixed_sentence(
    ask, echo, passes, asked, answer, finish, written, stream
):
    looked_at = []

    def post_check(prompt, text):
        looked_at.append((prompt, text))
        fine = passes == "both" or (passes == "base" and text.startswith("the base"))
        return [] if fine else ["t2.rule"]

    found = ask(guard=PolicyFilter(post_check=post_check), stream=stream, stream_options={"include_usage": True})
    assert [model for model, _ in echo.asked] == asked
    assert looked_at[0] == ("hi", f"{ADA} says hi")
    if stream:
        chunks = [json.loads(event) for event in events(found)[:-1]]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        ended, usage = choices[-1]["finish_reason"], chunks[-1]["usage"]
    else:
        [choice] = found.json()["choices"]
        text, ended, usage = choice["message"]["content"], choice["finish_reason"], found.json()["usage"]
    assert (text, ended, usage["completion_tokens"]) == (answer, finish, written)
