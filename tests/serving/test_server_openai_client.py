"""Calls of OpenAI's own client against a live server on loopback, over the tiny base."""

from __future__ import annotations

import itertools

import pytest

from persona_rlhf.serving.access import Limits
from persona_rlhf.serving.local_engine import AdapterCache, BatchingEngine, LocalGenerator
from persona_rlhf.serving.server import Gateway
from tests.serving.live import live
from tests.serving.test_server import ADA, ADA2, tokens  # noqa: F401 - a fixture

openai = pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")

IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
ASKED = [{"role": "user", "content": "w5 w6"}]


@pytest.fixture
def port(access, tokens, fleet, log):
    engine = BatchingEngine(fleet.adapted)
    cache = AdapterCache(access, list(fleet.adapted.spans.values()), budget=1 << 30)
    generator = LocalGenerator(fleet.adapted.base, cache, engine)
    with live(Gateway(generator, access, tokens[0], log.append, limits=Limits(rate=10_000)).app(), log.append) as port:
        yield port
    engine.close()
    assert log == []


@pytest.fixture
def client(port, tokens):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=tokens[1][ADA], max_retries=0) as client:
        yield client


def create(client, messages=ASKED, **parameters):
    parameters = {"model": ADA, "max_tokens": 6, "temperature": 0} | parameters
    return client.chat.completions.create(messages=messages, **parameters)


def test_models_are_listed_and_retrieved(client):
    [model] = client.models.list()
    assert (model.id, model.object, model.owned_by) == (ADA, "model", "persona-rlhf")
    assert client.models.retrieve(ADA) == model
    for other in (ADA2, "nobody", "gpt-5"):
        with pytest.raises(openai.NotFoundError) as error:
            client.models.retrieve(other)
        assert (error.value.code, error.value.request_id[:4]) == ("model_not_found", "req_")


def test_a_completion_with_defaults_that_programs_send(client):
    plain = create(client)
    full = create(
        client,
        tools=[],
        logit_bias={},
        response_format={"type": "text"},
        service_tier="auto",
        safety_identifier="someone",
        user="someone",
        metadata={"a": "b"},
        store=False,
        n=1,
        logprobs=False,
        presence_penalty=0,
        stop=None,
        parallel_tool_calls=True,
    )
    [choice] = full.choices
    assert choice == plain.choices[0]
    assert choice.message.role == "assistant"
    assert full.usage.total_tokens == full.usage.prompt_tokens + full.usage.completion_tokens
    assert full.system_fingerprint == plain.system_fingerprint
    assert full.system_fingerprint.startswith("fp_")
    ids = {plain._request_id, full._request_id, client.models.with_raw_response.list().headers["x-request-id"]}
    assert len(ids) == 3
    assert all(one.startswith("req_") and len(one) == 36 for one in ids)


def test_parts_and_the_developers_role_are_texts_and_the_system(client):
    parts = [{"role": "developer", "content": "w7"}, {"role": "user", "content": [{"type": "text", "text": "w5 w6"}]}]
    texts = [{"role": "system", "content": "w7"}, {"role": "user", "content": "w5 w6"}]
    assert create(client, parts).choices == create(client, texts).choices
    assert create(client, parts).usage == create(client, texts).usage


def test_a_conversation_goes_on_with_the_message_of_a_response(client):
    message = create(client).choices[0].message
    assert create(client, [*ASKED, message, {"role": "user", "content": "w8"}]).choices[0].finish_reason


def test_several_choices_are_the_answers_of_seeds_in_a_row(client):
    several = create(client, n=3, seed=7, temperature=1.5)
    single = [create(client, seed=7 + number, temperature=1.5) for number in range(3)]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert [one.message.content for one in several.choices] == [one.choices[0].message.content for one in single]
    assert len({one.message.content for one in several.choices}) > 1
    assert several.usage.completion_tokens == sum(one.usage.completion_tokens for one in single)
    assert several.usage.prompt_tokens == single[0].usage.prompt_tokens


def streamed(client, **parameters):
    chunks = list(create(client, stream=True, stream_options={"include_usage": True}, **parameters))
    *others, last = chunks
    assert last.choices == []
    assert all(chunk.usage is None for chunk in others)
    assert len({chunk.id for chunk in chunks}) == len({chunk.system_fingerprint for chunk in chunks}) == 1
    texts, logprobs, ends = {}, {}, {}
    for choice in itertools.chain.from_iterable(chunk.choices for chunk in others):
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        logprobs.setdefault(choice.index, []).extend(choice.logprobs.content if choice.logprobs else [])
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    return texts, logprobs, ends, last.usage


def test_a_stream_brings_what_the_whole_response_holds(client):
    parameters = {"n": 2, "seed": 3, "temperature": 1.0, "logprobs": True, "top_logprobs": 3}
    whole = create(client, **parameters)
    texts, logprobs, ends, usage = streamed(client, **parameters)
    for index, choice in enumerate(whole.choices):
        assert texts[index] == choice.message.content
        assert [one.token for one in logprobs[index]] == [one.token for one in choice.logprobs.content]
        assert [one.logprob for one in logprobs[index]] == pytest.approx(
            [one.logprob for one in choice.logprobs.content], abs=1e-4
        )
        assert ends[index] == choice.finish_reason
    assert usage == whole.usage
    assert not any(streamed(client)[1].values())


def test_log_probabilities_belong_to_the_tokens_of_the_answer(client):
    [choice] = create(client, logprobs=True, top_logprobs=4).choices
    content = choice.logprobs.content
    assert len(content) in (5, 6)  # without the end token
    assert choice.message.content.split() == [one.token.strip() for one in content if one.token.strip()]
    for one in content:  # greedy: the token is the likeliest
        assert (one.top_logprobs[0].token, one.top_logprobs[0].logprob) == (one.token, one.logprob)
        assert [top.logprob for top in one.top_logprobs] == sorted((t.logprob for t in one.top_logprobs), reverse=True)
        assert len(one.top_logprobs) == 4
        assert bytes(one.bytes).decode() == one.token
    assert create(client).choices[0].logprobs is None


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"n": 9}, "n"),
        ({"messages": [{"role": "user", "content": "w5 " * 10_000}]}, "messages"),
    ],
)
def test_a_mistake_is_a_bad_request_that_names_its_place(client, parameters, param):
    with pytest.raises(openai.BadRequestError) as error:
        create(client, **parameters)
    assert (error.value.param, error.value.type) == (param, "invalid_request_error")
    assert param.split("[")[0] in error.value.message
    assert error.value.request_id.startswith("req_")


def test_a_wrong_key_is_an_authentication_error(client):
    with pytest.raises(openai.AuthenticationError) as error:
        create(client.with_options(api_key="sk-wrong"))
    assert error.value.code == "invalid_api_key"
