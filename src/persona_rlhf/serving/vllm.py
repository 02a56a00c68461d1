"""vLLM as the engine of `serve`: adapter layout, launcher, and the proxy to its API."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write, find, is_hub_id, write_folder
from persona_rlhf.data.pairs import Prompt
from persona_rlhf.release.compatibility import CONFIG, WEIGHTS, max_lora_rank
from persona_rlhf.release.manifest import certified_dtype
from persona_rlhf.serving.access import AdapterAccess, ServedRun
from persona_rlhf.serving.openai_api import (
    AdmittedAdapter,
    APIError,
    Finish,
    SamplingParams,
    TextChunk,
    Usage,
)

BASE_NAME = "base"
"""The base's model name beside the adapters; a slug always has a hash, so it differs."""

SCRIPT, ADAPTERS, LIST = "vllm.sh", "adapters", "adapters.json"
_DEVICE_ADAPTERS, _MEMORY_ADAPTERS = 8, 256  # adapters on the device at once, and in main memory


def write_layout(
    folder: Path, base: str, rank: int, adapters: Mapping[str, Path], host: str, port: int, dtype: str | None = None
) -> Path:
    """Writes adapters/SLUG with PEFT's two files, and the start script; returns the script's path.

    `adapters` are verified folders by slug; other adapters of an earlier layout are removed. Raises InputError if the
    folder holds something else, or there is no adapter to serve.
    """
    if not adapters:
        raise InputError([Problem(str(folder), None, "--to", "no user with a token has an adapter that may be served")])
    earlier = _earlier_layout(folder)
    for slug, source in adapters.items():
        write_folder(folder / ADAPTERS / slug, {name: (source / name).read_bytes() for name in (CONFIG, WEIGHTS)})
    for slug in earlier - set(adapters):
        shutil.rmtree(folder / ADAPTERS / slug, ignore_errors=True)
    atomic_write(folder / LIST, (json.dumps(sorted(adapters), indent=2) + "\n").encode())
    atomic_write(folder / SCRIPT, _script(command_line(base, rank, sorted(adapters), host, port, dtype)).encode())
    (folder / SCRIPT).chmod(0o755)
    return folder / SCRIPT


def command_line(
    base: str, rank: int, slugs: Sequence[str], host: str, port: int, dtype: str | None = None
) -> list[str]:
    """The vLLM command, to be run in the layout's folder; without a `dtype`, vLLM takes that of the base's files."""
    model = base if is_hub_id(base) else str(find(base).resolve())
    return [
        *("vllm", "serve", model, "--served-model-name", BASE_NAME, "--host", host, "--port", str(port)),
        *(() if dtype is None else ("--dtype", dtype)),
        *("--enable-lora", "--max-lora-rank", str(max_lora_rank(rank))),
        *(
            "--max-loras",
            str(min(_DEVICE_ADAPTERS, len(slugs))),
            "--max-cpu-loras",
            str(min(_MEMORY_ADAPTERS, len(slugs))),
        ),
        *("--lora-modules", *(f"{slug}={ADAPTERS}/{slug}" for slug in slugs)),
    ]


def _earlier_layout(folder: Path) -> set[str]:
    """The adapters of an earlier layout in a folder. Raises InputError if the folder holds something else."""
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
        "# Serves the adapters of this folder. Anyone who reaches this port can use every user's adapter: let only",
        "# `persona-rlhf serve RUN --engine vllm --upstream URL` reach it, and give both the same VLLM_API_KEY.",
        'cd "$(dirname "$0")" || exit 1',
        f'exec {shlex.join(command)} "$@"',
    ]
    return "\n".join(lines) + "\n"


_TIMEOUT_SECONDS = 300.0
_COMPLETIONS = "/v1/chat/completions"


class VllmGenerator(NamedTuple):
    """The TextGenerator over a vLLM server at `address`. Its error messages are not passed on."""

    address: httpx.URL
    key: str | None

    def generate(
        self, adapter: AdmittedAdapter | None, messages: Prompt, sampling: SamplingParams
    ) -> Iterator[TextChunk]:
        """See `TextGenerator.generate`."""
        model = BASE_NAME if adapter is None else adapter.slug
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
                    if text := choice["delta"].get("content"):
                        yield TextChunk(str(text))
                    if (reason := choice.get("finish_reason")) is not None:
                        finish = "length" if reason == "length" else "stop"
        except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError):
            raise APIError(502, "The engine behind this server failed.", "engine_failed") from None
    if finish is None:
        raise APIError(502, "The engine behind this server ended without an end of its answer.", "engine_failed")
    yield TextChunk("", finish, usage)


def _events(response: httpx.Response) -> Iterator[Mapping[str, Any]]:
    for line in response.iter_lines():
        name, _, value = line.partition(":")
        if name == "data" and value.strip() == "[DONE]":
            return
        if name == "data":
            yield json.loads(value)


KEY = "VLLM_API_KEY"
"""vLLM's own variable for its API key; the gateway needs the same key."""

_START_SECONDS = 1_800  # a large base is read from a slow disk, and compiled


@contextmanager
def vllm_run(
    access: AdapterAccess, model: str, rank: int, target: Path | str, port: int, note: Callable[[str], None]
) -> Iterator[ServedRun | None]:
    """vLLM over the adapters that may be served now.

    A `target` URL names a running server. For a `target` folder, the layout is written there and vLLM is started at
    `port`; None if vLLM is not installed. Raises InputError if it does not start.
    """
    if isinstance(target, str):
        yield ServedRun(VllmGenerator(upstream_address(target), os.environ.get(KEY)), access)
        return
    folders = {slug: access.folder(slug) for slug in access.results if not access.reasons(slug)}
    dtypes = {dtype for folder in folders.values() if (dtype := certified_dtype(folder)) is not None}
    dtype = min(dtypes) if len(dtypes) == 1 else None
    script = write_layout(target, model, rank, folders, "127.0.0.1", port, dtype)
    note(
        f"vLLM runs kernels of its own, in {dtype or 'the type of the files'}: certificates do not cover its rounding."
    )
    note(f"Layout of {len(folders)} adapters: {target}; the command is in {script}")
    if shutil.which("vllm") is None:
        note(f"vLLM is not installed here. Where it is, run {script}; then serve with --upstream and its address.")
        yield None
        return
    with _running(script, f"http://127.0.0.1:{port}") as upstream:
        yield ServedRun(upstream, access)


@contextmanager
def _running(script: Path, url: str) -> Iterator[VllmGenerator]:
    """The server of a script while it is used; its random key keeps other clients off its port."""
    upstream = VllmGenerator(upstream_address(url), secrets.token_urlsafe(32))
    process = subprocess.Popen([script.resolve()], env=os.environ | {KEY: upstream.key or ""})
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not upstream.healthy:
            if process.poll() is not None or time.monotonic() > deadline:
                sentence = f"vLLM did not start (exit code {process.poll()}); its own messages are above"
                raise InputError([Problem(str(script), None, None, sentence)])
            time.sleep(0.2)
        yield upstream
    finally:
        process.terminate()
        process.wait()
