from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from persona_rlhf.common.files import slug
from persona_rlhf.data.pairs import Message
from persona_rlhf.evaluation.gate import certify
from persona_rlhf.evaluation.statistics import Clustered, by_cluster
from persona_rlhf.release.manifest import DataInfo
from persona_rlhf.release.results import PairCounts, outcome, read_results, skipped, write_results
from persona_rlhf.release.revocation import revoke
from persona_rlhf.serving import access as access_module
from persona_rlhf.serving import local_engine
from persona_rlhf.serving.access import AdapterAccess, Limits, make_tokens, read_tokens
from persona_rlhf.serving.connections import ConnectionLimits, ConnectionPool
from persona_rlhf.serving.local_engine import AdapterCache, BatchingEngine, LocalGenerator
from persona_rlhf.serving.openai_api import AdmittedAdapter, APIError, SamplingParams, TextChunk, Usage
from persona_rlhf.serving.policy_filter import FALLBACK, PolicyFilter, join_chunks
from persona_rlhf.serving.server import Gateway
from persona_rlhf.training.engine import TrainedUser
from tests.release.conftest import DEMANDS, measures, pairs_of, refusals
from tests.serving.conftest import RELEASED, slugs
from tests.serving.live import live

ADA, ADA2 = slug("Ada"), slug("ada")


class Echo:
    """A generator that repeats the request, word by word."""

    def __init__(self):
        self.requests = []
        self.fault = None
        self.hold = threading.Event()
        self.hold.set()

    def generate(self, adapter, messages, sampling):
        model = None if adapter is None else adapter.slug
        self.requests.append((model, messages))
        if isinstance(self.fault, APIError):
            raise self.fault
        return self.chunks(model, messages)

    def chunks(self, model, messages):
        self.hold.wait(10)
        if self.fault is not None:
            raise self.fault
        for word in (f"{model or 'the base'}", " says", f" {messages[-1].content}"):
            yield TextChunk(word)
        yield TextChunk("", "stop", Usage(5, 3))


class FixedAccess(AdapterAccess):
    """Serves the given users, without a run on a disk."""

    def __init__(self, user_ids):
        self._refusal_hooks = []
        self.results = {slug(one): skipped(one, "", PairCounts(0, 0, 0)) for one in user_ids}

    def admit(self, slug):
        if slug not in self.results:
            raise APIError(403, "not served", "adapter_not_served")
        return AdmittedAdapter(self.results[slug], Path("adapters"), "")


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def fixed_access() -> FixedAccess:
    return FixedAccess(RELEASED)


@pytest.fixture
def tokens(tmp_path):
    made = make_tokens(tmp_path / "tokens", slugs())
    return read_tokens(tmp_path / "tokens"), made


@pytest.fixture
def ask(echo, fixed_access, tokens, log):
    """Asks the app: `ask(slug, **changes of the body)`; or another path, method or headers."""
    hashes, made = tokens
    apps = {}

    def ask(
        user=ADA, *, path="/v1/chat/completions", policy_filter=None, limits=None, headers=None, content=None, **changes
    ):
        key = (policy_filter, limits)
        if key not in apps:
            apps[key] = Gateway(echo, fixed_access, hashes, log.append, policy_filter, limits).app()
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
    response = ask().json()
    assert response["object"] == "chat.completion"
    assert response["model"] == ADA
    assert response["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": f"{ADA} says hi"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert response["usage"] == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}


def events(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def test_a_stream_in_openais_form(ask):
    response = ask(stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *response, done = events(response)
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in response]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == f"{ADA} says hi"
    assert [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]][-1] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 8


def test_everyone_sees_their_own_model_only(ask, fixed_access):
    assert [model["id"] for model in ask(ADA, path="/v1/models").json()["data"]] == [ADA]
    assert [model["id"] for model in ask(ADA2, path="/v1/models").json()["data"]] == [ADA2]
    del fixed_access.results[slug("../../etc")]
    assert ask(slug("../../etc"), path="/v1/models").json()["data"] == []


@pytest.mark.parametrize(
    "model", [ADA2, slug("nan"), "nobody", "", "base", ".", "..", f"../{ADA2}", f"{ADA}/../{ADA2}", f"./{ADA}",
              f"{ADA}/", f"{ADA} ", ADA.upper(), f"{ADA}\0", "../../../etc/passwd", "%2e%2e%2f" + ADA2, "ä\U0001f480"],
)  # fmt: skip
def test_a_foreign_model_an_unknown_one_and_a_path_get_the_same_answer(ask, echo, model):
    response = ask(ADA, model=model)
    assert response.status_code == 404
    assert response.content == ask(ADA, model="no-such-model").content
    assert echo.requests == []


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer"}, {"Authorization": "Bearer nonsense"}, {"Authorization": "Basic abc"},
                {"Authorization": f"Bearer {ADA}"}, {"Authorization": "Bearer prlhf__"}],
)  # fmt: skip
def test_without_a_token_nobody_comes_in(ask, echo, headers):
    for path in ("/v1/chat/completions", "/v1/models"):
        response = ask(path=path, headers=headers, content=b"x" * 100)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert echo.requests == []


def test_the_body_is_limited_whether_it_says_its_length_or_not(ask, tokens, echo):
    small = Limits(body=1_000)
    assert ask(limits=small).status_code == 200
    response = ask(limits=small, content=b"x" * 1_001)
    assert response.status_code == 413
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
    while len(echo.requests) < 2:
        time.sleep(0.001)
    assert ask(ADA2, limits=one).status_code == 429
    echo.hold.set()
    thread.join()
    assert first[0].status_code == 200
    assert ask(ADA2, limits=one).status_code == 200


def test_a_fault_shows_no_traceback_and_nothing_of_anybody(ask, echo, log):
    echo.fault = RuntimeError("the private words of bob")
    response = ask()
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "The server failed at this request.",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    streamed = events(ask(stream=True))
    assert json.loads(streamed[-1]) == response.json()
    assert len(log) == 2
    assert not any("private" in line for line in log)
    assert all("RuntimeError at test_server.py" in line for line in log)


def test_a_declined_request_keeps_its_status_in_a_stream_too(ask, echo):
    echo.fault = APIError(400, "too long", "context_length_exceeded", "messages")
    for stream in (False, True):
        response = ask(stream=stream)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_an_adapter_that_was_edited_is_not_written_with(run, access, echo, tokens, log):
    (run.path / "adapters" / ADA / "adapter_config.json").write_text("{}")
    app = Gateway(echo, access, tokens[0], log.append).app()
    request = {"model": ADA, "messages": [{"role": "user", "content": "hi"}]}

    async def go():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            headers = {"Authorization": f"Bearer {tokens[1][ADA]}"}
            return await client.post("/v1/chat/completions", json=request, headers=headers)

    response = asyncio.run(go())
    assert (response.status_code, response.json()["error"]["code"]) == (403, "adapter_not_served")
    assert str(run.path) not in response.text
    assert echo.requests == []


HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {}\r\n"


@pytest.fixture
def gateway(echo, fixed_access, tokens, log):
    return Gateway(echo, fixed_access, tokens[0], log.append, limits=Limits(concurrent_each=2))


def test_a_client_that_leaves_is_no_internal_fault(gateway, echo, tokens, log):
    def request(**changes):
        body = json.dumps({"model": ADA, "messages": [{"role": "user", "content": "hi"}]} | changes)
        return (HEAD.format(tokens[1][ADA]) + f"Content-Length: {len(body)}\r\n\r\n{body}").encode()

    pool = ConnectionPool(ConnectionLimits())
    with live(gateway.app(), log.append, pool) as port:
        for sent in (request()[:-9], request(), request(stream=True)) * 2:  # half a body; two answers that wait
            echo.hold.clear()
            requests = len(echo.requests) + sent.endswith(b"}")
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(sent)
                while not pool.open or len(echo.requests) < requests:
                    time.sleep(0.002)
            while pool.open:
                time.sleep(0.002)
            echo.hold.set()
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.settimeout(10)
            client.sendall(request())
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
    assert log == []


def test_bodies_that_arrive_slowly_are_counted_per_user(gateway, tokens, log):
    """One user's slow bodies take neither the connections nor the answers of another."""
    with live(gateway.app(), log.append) as port, ExitStack() as slow:
        for _ in range(2):
            client = slow.enter_context(socket.create_connection(("127.0.0.1", port)))
            client.sendall((HEAD.format(tokens[1][ADA]) + "Content-Length: 500\r\n\r\nhalf").encode())
        time.sleep(0.1)
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        statuses = []
        for user in (ADA, ADA2):
            body = {"model": user, "messages": [{"role": "user", "content": "hi"}]}
            headers = {"Authorization": f"Bearer {tokens[1][user]}"}
            statuses.append(httpx.post(url, json=body, headers=headers, trust_env=False).status_code)
        assert statuses == [429, 200]


def test_a_length_beyond_all_numbers_is_the_clients_mistake(gateway, tokens, log):
    with live(gateway.app(), log.append) as port, socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(10)
        client.sendall((HEAD.format(tokens[1][ADA]) + f"Content-Length: {'9' * 6000}\r\n\r\n").encode())
        assert client.recv(4096).startswith(b"HTTP/1.1 4")
    assert log == []


def test_other_places_hold_nothing(ask):
    for path in ("/", "/docs", "/openapi.json", "/v1/chat/completions/x", "/v1/models/../../etc/passwd"):
        response = ask(path=path)
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "not_found"
    assert ask(path="/health", headers={}).json() == {"status": "ok"}


def test_the_policys_words_stand_first(ask, echo):
    policy_filter = PolicyFilter(system_prompt=lambda user_id: f"Be kind to {user_id}." if user_id == "Ada" else "")
    ask(ADA, policy_filter=policy_filter)
    ask(ADA2, policy_filter=policy_filter)
    mine = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    ask(ADA, policy_filter=policy_filter, messages=mine)
    seen = [[tuple(message) for message in messages] for _, messages in echo.requests]
    assert seen == [
        [("system", "Be kind to Ada."), ("user", "hi")],
        [("user", "hi")],
        [("system", "Be kind to Ada.\n\nBe brief."), ("user", "hi")],
    ]


def test_a_redirected_request_does_not_reach_the_model(ask, echo):
    policy_filter = PolicyFilter(redirect=lambda prompt: "Ask your doctor." if prompt == "pills?" else None)
    [choice] = ask(policy_filter=policy_filter, messages=[{"role": "user", "content": "pills?"}]).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Ask your doctor.", "content_filter")
    assert echo.requests == []
    assert ask(policy_filter=policy_filter).json()["choices"][0]["message"]["content"] == f"{ADA} says hi"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("passes", "models", "answer", "finish", "written"),
    [
        ("both", [ADA], f"{ADA} says hi", "stop", 3),
        ("base", [ADA, None], "the base says hi", "stop", 6),
        ("none", [ADA, None], FALLBACK, "content_filter", 6),
    ],
)
def test_an_answer_that_fails_is_the_bases_or_a_fixed_sentence(
    ask, echo, passes, models, answer, finish, written, stream
):
    checked = []

    def post_check(prompt, text):
        checked.append((prompt, text))
        fine = passes == "both" or (passes == "base" and text.startswith("the base"))
        return [] if fine else ["t2.rule"]

    response = ask(
        policy_filter=PolicyFilter(post_check=post_check), stream=stream, stream_options={"include_usage": True}
    )
    assert [model for model, _ in echo.requests] == models
    assert checked[0] == ("hi", f"{ADA} says hi")
    if stream:
        chunks = [json.loads(event) for event in events(response)[:-1]]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        ended, usage = choices[-1]["finish_reason"], chunks[-1]["usage"]
    else:
        [choice] = response.json()["choices"]
        text, ended, usage = choice["message"]["content"], choice["finish_reason"], response.json()["usage"]
    assert (text, ended, usage["completion_tokens"]) == (answer, finish, written)


@pytest.fixture
def local(run, access, tokens, fleet, log, monkeypatch):
    """The app over the run's adapters: `post(**changes of the body)`, with the slugs of its admission checks."""
    checks, admit = [], access.admit
    monkeypatch.setattr(access, "admit", lambda slug: checks.append(slug) or admit(slug))
    engine = BatchingEngine(fleet.adapted)
    cache = AdapterCache(access, list(fleet.adapted.spans.values()), budget=1 << 30)
    generator = LocalGenerator(fleet.adapted.base, cache, engine)

    def post(policy_filter=None, **changes):
        app = Gateway(generator, access, tokens[0], log.append, policy_filter).app()
        body = {"model": ADA, "messages": [{"role": "user", "content": "w5 w6"}], "max_tokens": 4} | changes

        async def go():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
                headers = {"Authorization": f"Bearer {tokens[1][ADA]}"}
                return await client.post("/v1/chat/completions", json=body, headers=headers)

        return asyncio.run(go())

    yield Local(post, checks, generator)
    engine.close()


class Local(NamedTuple):
    post: Callable[..., httpx.Response]
    checks: list[str]
    generator: LocalGenerator


def test_a_request_is_checked_for_admission_once(local):
    always_broken = PolicyFilter(post_check=lambda prompt, answer: ["t2.rule"])
    for number, changes in enumerate([{}, {}, {"stream": True}, {"policy_filter": always_broken}], 1):  # cold, warm
        assert local.post(**changes).status_code == 200
        assert local.checks == [ADA] * number


def test_an_answer_that_has_begun_ends_and_the_next_request_of_a_revoked_adapter_is_refused(
    run, access, local, monkeypatch
):
    monkeypatch.setattr(access_module, "RECHECK_SECONDS", 0.0)
    admitted = access.admit(ADA)
    chunks = local.generator.generate(admitted, (Message("user", "w5 w6"),), SamplingParams(4, stream=True))
    next(chunks)
    revoke(run.path, [one for one in read_results(run.path) if one.user_id == "Ada"], "a fault")
    assert join_chunks(chunks).finish is not None
    assert local.generator.cache.slugs == [ADA]
    with ThreadPoolExecutor(8) as clients:
        refused = list(clients.map(lambda n: local.post(stream=n % 2 == 0), range(16)))
    assert {response.status_code for response in refused} == {403}
    assert local.generator.cache.slugs == []


def test_an_adapter_that_was_trained_anew_is_served_without_a_restart(run, access, local, monkeypatch):
    monkeypatch.setattr(access_module, "RECHECK_SECONDS", 0.0)
    before = access.admit(ADA)
    shutil.rmtree(run.path / "adapters" / ADA)
    verdict = certify(DEMANDS, refusals(0), (1.0,), lambda _: refusals(0))
    verdict = verdict._replace(clusters=Clustered(*(by_cluster([True] * 4, list("aabc"), 0.05),) * 2))
    data, weights = DataInfo.of(pairs_of("Ada"), 0), -run.flats["Ada"]
    written = run.exporter.write("Ada", weights, verdict, measures(0.7), data)
    trained = TrainedUser("Ada", weights, "trained", "", 12, 1.5, 2, {})
    anew = outcome(trained, data.pairs, verdict, measures(0.7), written, DEMANDS.in_pool, 0)
    results = read_results(run.path)
    write_results(run.path, [anew if one.user_id == "Ada" else one for one in results])
    assert access.admit(ADA).weights_sha256 != before.weights_sha256
    assert local.post().status_code == 200
    (run.path / "results.jsonl").unlink()
    assert local.post().status_code == 200


def test_a_long_prompt_is_refused_before_it_is_tokenised(local, monkeypatch):
    tokenised = []
    monkeypatch.setattr(local_engine, "prompt_ids", lambda *_: tokenised.append(1) or (5, 6))
    response = local.post(messages=[{"role": "user", "content": "w5 " * 100_000}])
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "300000 characters" in response.json()["error"]["message"]
    assert tokenised == []
    assert local.post().status_code == 200


def test_the_bound_in_characters_refuses_no_prompt_that_fits(local, base):
    longest = max(base.tokenizer.get_vocab(), key=lambda token: len(token) if "<" not in token else 0)
    fits = " ".join([longest] * (base.context - 8))
    assert local.post(messages=[{"role": "user", "content": fits}]).status_code == 200


def test_an_adapter_that_changed_after_its_admission_is_not_loaded(run, access, local):
    admitted = access.admit(ADA)
    weights = run.path / "adapters" / ADA / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(APIError) as error:
        local.generator.generate(admitted, (Message("user", "w5 w6"),), SamplingParams(4))
    assert error.value.status == 403
    assert local.generator.cache.slugs == []
