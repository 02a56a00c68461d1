"""`serve` put together: the adapters of a run, and an engine that writes with them."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from persona_rlhf.apps.admitted import Admitted
from persona_rlhf.apps.built_in import BuiltIn
from persona_rlhf.apps.engine import Engine
from persona_rlhf.apps.shelf import Shelf
from persona_rlhf.apps.upstream import Upstream, connect, upstream_place
from persona_rlhf.apps.vllm_layout import write_layout
from persona_rlhf.apps.writing import Writer
from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.training.base import load_base
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.settings import BaseSettings, LoraSettings

KEY = "VLLM_API_KEY"
"""vLLM's own variable for the key that it asks for; the gateway must know it too."""

_STARTING_SECONDS = 1_800  # a large base is read from a slow disk, and compiled


class Served(NamedTuple):
    """Who writes, and which users' adapters he may write with."""

    writer: Writer
    admitted: Admitted


@contextmanager
def built_in(
    run: Path, base: BaseSettings, lora: LoraSettings, adapter_bytes: int, tell: Callable[[str], None]
) -> Iterator[Served]:
    """The built-in engine over the adapters of a run, with `adapter_bytes` of them in memory at most.

    Raises InputError where the base cannot be loaded, or the run has no results.
    """
    adapted = AdaptedModel(load_base(base), lora)
    admitted = Admitted(run, adapted.base.weights_hash, lora, tell)
    engine = Engine(adapted)
    try:
        yield Served(
            BuiltIn(adapted.base, Shelf(admitted, list(adapted.spans.values()), adapter_bytes), engine), admitted
        )
    finally:
        engine.close()


@contextmanager
def behind_vllm(
    admitted: Admitted, model: str, rank: int, place: Path | str, port: int, tell: Callable[[str], None]
) -> Iterator[Served | None]:
    """vLLM over the adapters that are admitted now: one that runs at the URL `place`, or one started at `port`, from a
    layout that is written to the folder `place`. None where the layout is written, but vLLM is not installed here.

    Raises InputError where it does not come up.
    """
    if isinstance(place, str):
        yield Served(Upstream(upstream_place(place), os.environ.get(KEY)), admitted)
        return
    fine = {slug: admitted.folder(slug) for slug in admitted.results if not admitted.reasons(slug)}
    script = write_layout(place, model, rank, fine, "127.0.0.1", port)
    tell(f"Layout of {len(fine)} adapters: {place}; the command is in {script}")
    if shutil.which("vllm") is None:
        tell(f"vLLM is not installed here. Where it is, run {script}; then serve with --upstream and its address.")
        yield None
        return
    with _running(script, f"http://127.0.0.1:{port}") as upstream:
        yield Served(upstream, admitted)


@contextmanager
def _running(script: Path, url: str) -> Iterator[Upstream]:
    """The server of a script, as long as it is used; a key that nobody else has keeps others off its port."""
    upstream = Upstream(upstream_place(url), secrets.token_urlsafe(32))
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


def _answers(upstream: Upstream) -> bool:
    connection = connect(upstream.place, 5.0)
    try:
        connection.request("GET", "/health")
        with connection.getresponse() as response:
            return response.status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()
