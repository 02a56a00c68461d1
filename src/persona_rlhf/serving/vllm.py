"""VLLM launcher, layout and proxy."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write, find, is_hub_id, write_folder
from persona_rlhf.config.training import BaseSettings, LoraSettings
from persona_rlhf.data.pairs import Prompt
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import load_base
from persona_rlhf.release.compatibility import CONFIG, WEIGHTS
from persona_rlhf.serving.access import AdapterAccess
from persona_rlhf.serving.local_engine import AdapterCache, BatchingEngine, LocalGenerator
from persona_rlhf.serving.openai_api import APIError, Finish, SamplingParams, TextChunk, TextGenerator, Usage

# ----------------------------------------------------------------------------------------------------
# What vLLM needs to serve the adapters of a run: a tree of PEFT folders, and the command line over it.
# ----------------------------------------------------------------------------------------------------

BASE_NAME = "base"
"""What the base is called beside the adapters; no slug is a single word without a hash."""

SCRIPT, ADAPTERS, LIST = "vllm.sh", "adapters", "adapters.json"
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes (vLLM 0.32)
_SLOTS, _HELD = 8, 256  # adapters on the device at once, and held in main memory


def write_layout(folder: Path, base: str, rank: int, adapters: Mapping[str, Path], host: str, port: int) -> Path:
    """Writes `folder`: adapters/SLUG with PEFT's two files, and the script, whose path is returned. Adapters of an
    earlier layout that are not in this one go.

    `adapters` are verified folders by slug. Raises InputError where the folder holds something else, or there is no
    adapter to serve.
    """
    if not adapters:
        raise InputError([Problem(str(folder), None, "--to", "no user with a token has an adapter that may be served")])
    before = _before(folder)
    for slug, source in adapters.items():
        write_folder(folder / ADAPTERS / slug, {name: (source / name).read_bytes() for name in (CONFIG, WEIGHTS)})
    for slug in before - set(adapters):
        shutil.rmtree(folder / ADAPTERS / slug, ignore_errors=True)
    atomic_write(folder / LIST, (json.dumps(sorted(adapters), indent=2) + "\n").encode())
    atomic_write(folder / SCRIPT, _script(command_line(base, rank, sorted(adapters), host, port)).encode())
    (folder / SCRIPT).chmod(0o755)
    return folder / SCRIPT


def command_line(base: str, rank: int, slugs: Sequence[str], host: str, port: int) -> list[str]:
    """The command, for the folder of the layout."""
    where = base if is_hub_id(base) else str(find(base).resolve())
    return [
        *("vllm", "serve", where, "--served-model-name", BASE_NAME, "--host", host, "--port", str(port)),
        *("--enable-lora", "--max-lora-rank", str(next(r for r in _RANKS if r >= rank))),
        *("--max-loras", str(min(_SLOTS, len(slugs))), "--max-cpu-loras", str(min(_HELD, len(slugs)))),
        *("--lora-modules", *(f"{slug}={ADAPTERS}/{slug}" for slug in slugs)),
    ]


def _before(folder: Path) -> set[str]:
    """The adapters that an earlier layout put into a folder. Raises InputError where it is none of ours."""
    try:
        return set(json.loads((folder / LIST).read_bytes()))
    except FileNotFoundError:
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return set()
    except (OSError, ValueError, TypeError):
        pass
    raise InputError([Problem(str(folder), None, "--to", "something else stands there; name a new or empty folder")])


def _script(command: Sequence[str]) -> str:
    lines = [
        "#!/bin/sh",
        "# Serves the adapters of this folder. Whoever reaches this port reaches every user's adapter: let only",
        "# `persona-rlhf serve RUN --engine vllm --upstream URL` reach it, and give both the same VLLM_API_KEY.",
        'cd "$(dirname "$0")" || exit 1',
        f'exec {shlex.join(command)} "$@"',
    ]
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------------
# An OpenAI-style server behind the gateway (vLLM) as a writer: what it says of a fault stays here.
# ----------------------------------------------------------------------------------------------------

_TIMEOUT_SECONDS = 300.0
_COMPLETIONS = "/v1/chat/completions"


class VllmGenerator(NamedTuple):
    """Writes with the adapters that a server at `place` has loaded (see `writing.Writer`)."""

    place: SplitResult
    key: str | None

    def write(self, model: str | None, messages: Prompt, wish: SamplingParams) -> Iterator[TextChunk]:
        """See `Writer.write`."""
        connection, response = self._asked(_body(model or BASE_NAME, messages, wish))
        return _pieces(connection, response)

    def _asked(self, body: dict[str, Any]) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = connect(self.place, _TIMEOUT_SECONDS)
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        try:
            connection.request("POST", self.place.path.rstrip("/") + _COMPLETIONS, json.dumps(body), headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException):
            connection.close()
            raise APIError(502, "The engine behind this server cannot be reached.", "engine_unreachable") from None
        if response.status != 200:
            response.close()
            connection.close()
            if response.status == 400:
                raise APIError(400, "The engine did not take this request; is it too long?", "invalid_value")
            raise APIError(502, "The engine behind this server failed.", "engine_failed")
        return connection, response


def upstream_place(url: str) -> SplitResult:
    """The address of an upstream. Raises InputError where it is none."""
    place = urlsplit(url)
    if place.scheme not in ("http", "https") or not place.hostname:
        raise InputError(
            [Problem("serve", None, "--upstream", f"`{url}` is no address; such as http://127.0.0.1:8001")]
        )
    return place


def connect(place: SplitResult, timeout: float) -> http.client.HTTPConnection:
    """A connection to a server, not opened yet."""
    kind = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
    assert place.hostname is not None
    return kind(place.hostname, place.port, timeout=timeout)


def _body(model: str, messages: Prompt, wish: SamplingParams) -> dict[str, Any]:
    """Always a stream: so a client who goes away ends the writing."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [message._asdict() for message in messages],
        "max_tokens": wish.max_tokens,
        "temperature": wish.temperature,
        "top_p": wish.top_p,
        "stream": True,
        "stream_options": {"include_usage": True},
        "chat_template_kwargs": {"enable_thinking": False},  # as in training and at the gate
    }
    if wish.stop:
        body["stop"] = list(wish.stop)
    if wish.seed is not None:
        body["seed"] = wish.seed
    return body


def _pieces(connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> Iterator[TextChunk]:
    """The events of an answer as pieces; the last one waits for the count of tokens that comes after it."""
    finish: Finish | None = None
    usage = None
    with closing(connection), response:
        try:
            for event in _events(response):
                if (counted := event.get("usage")) is not None:
                    usage = Usage(int(counted["prompt_tokens"]), int(counted["completion_tokens"]))
                for choice in event["choices"]:
                    if text := choice["delta"].get("content"):
                        yield TextChunk(str(text))
                    if (reason := choice.get("finish_reason")) is not None:
                        finish = "length" if reason == "length" else "stop"
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError):
            raise APIError(502, "The engine behind this server failed.", "engine_failed") from None
    if finish is None:
        raise APIError(502, "The engine behind this server ended without an end of its answer.", "engine_failed")
    yield TextChunk("", finish, usage)


def _events(response: http.client.HTTPResponse) -> Iterator[Mapping[str, Any]]:
    for line in response:
        name, _, value = line.partition(b":")
        if name == b"data" and value.strip() == b"[DONE]":
            return
        if name == b"data":
            yield json.loads(value)


# ----------------------------------------------------------------------------------------------------
# `serve` put together: the adapters of a run, and an engine that writes with them.
# ----------------------------------------------------------------------------------------------------

KEY = "VLLM_API_KEY"
"""vLLM's own variable for the key that it asks for; the gateway must know it too."""

_STARTING_SECONDS = 1_800  # a large base is read from a slow disk, and compiled


class ServedRun(NamedTuple):
    """Who writes, and which users' adapters he may write with."""

    writer: TextGenerator
    admitted: AdapterAccess


@contextmanager
def built_in(
    run: Path, base: BaseSettings, lora: LoraSettings, adapter_bytes: int, tell: Callable[[str], None]
) -> Iterator[ServedRun]:
    """The built-in engine over the adapters of a run, with `adapter_bytes` of them in memory at most.

    Raises InputError where the base cannot be loaded, or the run has no results.
    """
    adapted = AdaptedModel(load_base(base), lora)
    admitted = AdapterAccess(run, adapted.base.weights_hash, lora, tell)
    engine = BatchingEngine(adapted)
    try:
        yield ServedRun(
            LocalGenerator(adapted.base, AdapterCache(admitted, list(adapted.spans.values()), adapter_bytes), engine),
            admitted,
        )
    finally:
        engine.close()


@contextmanager
def behind_vllm(
    admitted: AdapterAccess, model: str, rank: int, place: Path | str, port: int, tell: Callable[[str], None]
) -> Iterator[ServedRun | None]:
    """vLLM over the adapters that are admitted now: one that runs at the URL `place`, or one started at `port`, from a
    layout that is written to the folder `place`. None where the layout is written, but vLLM is not installed here.

    Raises InputError where it does not come up.
    """
    if isinstance(place, str):
        yield ServedRun(VllmGenerator(upstream_place(place), os.environ.get(KEY)), admitted)
        return
    fine = {slug: admitted.folder(slug) for slug in admitted.results if not admitted.reasons(slug)}
    script = write_layout(place, model, rank, fine, "127.0.0.1", port)
    tell(f"Layout of {len(fine)} adapters: {place}; the command is in {script}")
    if shutil.which("vllm") is None:
        tell(f"vLLM is not installed here. Where it is, run {script}; then serve with --upstream and its address.")
        yield None
        return
    with _running(script, f"http://127.0.0.1:{port}") as upstream:
        yield ServedRun(upstream, admitted)


@contextmanager
def _running(script: Path, url: str) -> Iterator[VllmGenerator]:
    """The server of a script, as long as it is used; a key that nobody else has keeps others off its port."""
    upstream = VllmGenerator(upstream_place(url), secrets.token_urlsafe(32))
    process = subprocess.Popen([script.resolve()], env=os.environ | {KEY: upstream.key or ""})
    try:
        until = time.monotonic() + _STARTING_SECONDS
        while not _answers(upstream):
            if process.poll() is not None or time.monotonic() > until:
                sentence = f"vLLM did not come up (exit code {process.poll()}); its own words are above"
                raise InputError([Problem(str(script), None, None, sentence)])
            time.sleep(0.2)
        yield upstream
    finally:
        process.terminate()
        process.wait()


def _answers(upstream: VllmGenerator) -> bool:
    connection = connect(upstream.place, 5.0)
    try:
        connection.request("GET", "/health")
        with connection.getresponse() as response:
            return response.status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()
