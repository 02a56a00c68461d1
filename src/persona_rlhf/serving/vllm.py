"""vLLM as an engine of `serve`: the proxy to its API, and the test of its adapters at the start."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, NamedTuple

import httpx

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.data.pairs import Message, Prompt
from persona_rlhf.release.engine_layout import ZERO_NAME, engine_name
from persona_rlhf.serving.access import AdapterAccess
from persona_rlhf.serving.openai_api import (
    AdmittedAdapter,
    APIError,
    Finish,
    SamplingParams,
    TextChunk,
    TokenLogprob,
    Usage,
)
from persona_rlhf.serving.policy_filter import join_chunks

_TIMEOUT_SECONDS = 300.0
_COMPLETIONS = "/v1/chat/completions"


def engine_model(adapter: AdmittedAdapter | None) -> str:
    """The engine's name of an adapter, or of the zero adapter for the base."""
    return ZERO_NAME if adapter is None else engine_name(adapter.slug, adapter.weights_sha256)


class VllmGenerator(NamedTuple):
    """The TextGenerator over a vLLM server at `address`. Its error messages are not passed on."""

    address: httpx.URL
    key: str | None

    def generate(
        self, adapter: AdmittedAdapter | None, messages: Prompt, sampling: SamplingParams
    ) -> Iterator[TextChunk]:
        """See `TextGenerator.generate`."""
        model = engine_model(adapter)
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        client = httpx.Client(base_url=self.address, headers=headers, timeout=_TIMEOUT_SECONDS, trust_env=False)
        request = client.build_request("POST", _COMPLETIONS, json=_body(model, messages, sampling))
        try:
            response = client.send(request, stream=True)
        except httpx.HTTPError:
            client.close()
            raise APIError(502, "The engine behind this server cannot be reached.", "engine_unreachable") from None
        if response.status_code != 200:
            client.close()
            if response.status_code == 400:
                raise APIError(400, "The engine rejected this request; is it too long?", "invalid_value")
            raise APIError(502, "The engine behind this server failed.", "engine_failed")
        return _chunks(client, response)

    def probe(self, adapter: AdmittedAdapter | None) -> str:
        """The first words of a greedy answer to one fixed prompt. Raises APIError if the engine gives none."""
        return join_chunks(self.generate(adapter, _PROBE, SamplingParams(_PROBE_TOKENS))).text

    def models(self) -> set[str]:
        """The names of the base and of all adapters that the engine has. Raises InputError if it cannot be asked."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            response = httpx.get(f"{str(self.address).rstrip('/')}/v1/models", headers=headers, trust_env=False)
            return {str(model["id"]) for model in response.raise_for_status().json()["data"]}
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as fault:
            sentence = f"the engine does not list its models ({type(fault).__name__}); is it vLLM, with this key?"
            raise InputError([Problem(str(self.address), None, "--upstream", sentence)]) from fault

    @property
    def healthy(self) -> bool:
        """Whether the server answers its health check."""
        try:
            return httpx.get(self.address.join("/health"), timeout=5.0, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False


def upstream_address(url: str) -> httpx.URL:
    """The address of an upstream server. Raises InputError if the URL is not one."""
    address = httpx.URL(url)
    if address.scheme not in ("http", "https") or not address.host:
        sentence = f"`{url}` is no address; it has the form http://127.0.0.1:8001"
        raise InputError([Problem("serve", None, "--upstream", sentence)])
    return address


def _body(model: str, messages: Prompt, sampling: SamplingParams) -> dict[str, Any]:
    """The request, always for a stream: a client that disconnects then ends the generation."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [message._asdict() for message in messages],
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "stream": True,
        "stream_options": {"include_usage": True},
        "chat_template_kwargs": {"enable_thinking": False},  # as in training and at the gate
    }
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": sampling.logprobs}
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    return body


def _chunks(client: httpx.Client, response: httpx.Response) -> Iterator[TextChunk]:
    """The events of an answer as chunks; the last one waits for the token counts, which come after it."""
    finish: Finish | None = None
    usage = None
    with closing(client), closing(response):
        try:
            for event in _events(response):
                if (counted := event.get("usage")) is not None:
                    usage = Usage(int(counted["prompt_tokens"]), int(counted["completion_tokens"]))
                for choice in event["choices"]:
                    text, logprobs = choice["delta"].get("content"), _logprobs(choice)
                    if text or logprobs:
                        yield TextChunk(str(text or ""), logprobs=logprobs)
                    if (reason := choice.get("finish_reason")) is not None:
                        finish = "length" if reason == "length" else "stop"
        except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError):
            raise APIError(502, "The engine behind this server failed.", "engine_failed") from None
    if finish is None:
        raise APIError(502, "The engine behind this server ended without an end of its answer.", "engine_failed")
    yield TextChunk("", finish, usage)


def _logprobs(choice: Mapping[str, Any]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            str(one["token"]),
            float(one["logprob"]),
            tuple((str(top["token"]), float(top["logprob"])) for top in one["top_logprobs"]),
        )
        for one in (choice.get("logprobs") or {}).get("content") or ()
    )


def _events(response: httpx.Response) -> Iterator[Mapping[str, Any]]:
    for line in response.iter_lines():
        name, _, value = line.partition(":")
        if name == "data" and value.strip() == "[DONE]":
            return
        if name == "data":
            yield json.loads(value)


KEY = "VLLM_API_KEY"
"""vLLM's own variable for its API key; the gateway needs the same key."""


_PROBE = (Message("user", "Hello! Please introduce yourself in one sentence."),)
_PROBE_TOKENS = 8  # few: rounding may differ with the batch, and a difference grows from token to token
_TOGETHER = 8  # adapters that answer at the same time, as many as the device holds


def withhold_mixed_up(upstream: VllmGenerator, access: AdapterAccess) -> None:
    """Withholds adapters that the engine does not have under the hash of their manifest, or mixes up with others.

    Each adapter answers one prompt alone, and again while others and the base answer it; both answers must be equal.
    Raises InputError where the engine has no zero adapter, cannot be reached, or mixes up the base itself.
    """
    loaded, url = upstream.models(), str(upstream.address)
    if ZERO_NAME not in loaded:
        sentence = f"this engine has no adapter {ZERO_NAME}; write the layout again with --to, and start vLLM from it"
        raise InputError([Problem(url, None, "--upstream", sentence)])
    served = [one for slug in access.results if (one := access.admitted(slug)) is not None]
    adapters = [None, *served]
    present = [one for one in adapters if one is None or engine_model(one) in loaded]
    for one in adapters:
        if one is not None and one not in present:
            access.withhold(one.slug, "the engine has not loaded the adapter of its manifest; write the layout again")
    try:
        alone = [upstream.probe(one) for one in present]
        with ThreadPoolExecutor(_TOGETHER) as clients:
            together = list(clients.map(upstream.probe, present))
    except APIError as error:
        raise InputError([Problem(url, None, "--upstream", error.message)]) from error
    for one, first, second in zip(present, alone, together, strict=True):
        if first != second and one is None:
            sentence = "the base answers otherwise while adapters are used beside it; use vLLM 0.33 or later"
            raise InputError([Problem(url, None, "--upstream", sentence)])
        if first != second and one is not None:
            access.withhold(one.slug, "the engine answers otherwise while other adapters are used beside this one")
