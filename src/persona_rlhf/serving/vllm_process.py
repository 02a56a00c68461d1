"""vLLM as a process of the gateway: started over the adapters that may be served, and again when these change.

vLLM's request to unload an adapter forgets its name alone: the weights stay in the caches until others need the room
(vllm-project/vllm#54839). The end of the process removes them, and all states that were computed with them.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.data.pairs import Prompt
from persona_rlhf.release.engine_layout import write_layout
from persona_rlhf.release.manifest import certified_dtype
from persona_rlhf.serving.access import RECHECK_SECONDS, AdapterAccess, ServedRun
from persona_rlhf.serving.openai_api import AdmittedAdapter, APIError, SamplingParams, TextChunk
from persona_rlhf.serving.vllm import KEY, VllmGenerator, engine_model, upstream_address, withhold_mixed_up

_START_SECONDS = 1_800  # a large base is read from a slow disk, and compiled
_DRAIN_SECONDS = 20.0  # running answers may take that long before the process ends
_END_SECONDS = 10.0

Layout = Callable[[Mapping[str, Path]], Path]
"""Writes the layout of these adapters' folders, by slug; returns the start script."""


class VllmProcess:
    """The TextGenerator over a vLLM that this process starts, and keeps to the adapters that may be served.

    Adapters are compared every RECHECK_SECONDS, by name and hash. On a difference running answers are finished for up
    to 20 seconds, the process is ended, and another one is started. Until it is ready, requests get a 503.
    """

    def __init__(self, access: AdapterAccess, layout: Layout, port: int, note: Callable[[str], None]) -> None:
        self._access, self._layout, self._note = access, layout, note
        self._url = f"http://127.0.0.1:{port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._engine: VllmGenerator | None = None
        self._loaded: set[str] | None = None  # names of the adapters of the layout; None: it has to be started
        self._answers, self._idle = 0, threading.Condition()
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="vllm", daemon=True)

    def start(self) -> None:
        """Starts vLLM, and the comparison of adapters. Raises InputError if vLLM does not start or mixes them up."""
        self._start()
        self._watcher.start()

    def close(self) -> None:
        """Ends vLLM, and the comparison."""
        self._ended.set()
        if self._watcher.is_alive():
            self._watcher.join()
        self._stop()

    def generate(
        self, adapter: AdmittedAdapter | None, messages: Prompt, sampling: SamplingParams
    ) -> Iterator[TextChunk]:
        """See `TextGenerator.generate`."""
        engine = self._engine
        if engine is None or (adapter is not None and engine_model(adapter) not in (self._loaded or ())):
            sentence = "The engine is being started with the adapters of this moment; try again soon."
            raise APIError(503, sentence, "engine_starting", retry_after=10)
        return self._counted(engine.generate(adapter, messages, sampling))

    def _counted(self, chunks: Iterator[TextChunk]) -> Iterator[TextChunk]:
        with self._idle:
            self._answers += 1
        try:
            yield from chunks
        finally:
            with self._idle:
                self._answers -= 1
                self._idle.notify_all()

    def _watch(self) -> None:
        while not self._ended.wait(RECHECK_SECONDS):
            try:
                self._access.refresh()
                died = self._process is not None and self._process.poll() is not None
                if died or set(self._served()) != self._loaded:
                    self._restart()
            except (InputError, OSError) as fault:
                self._loaded = None  # and again after the next wait
                sentence = fault.problems[0].sentence if isinstance(fault, InputError) else type(fault).__name__
                self._note(f"vLLM does not serve at present: {sentence}")

    def _served(self) -> dict[str, str]:
        """The slugs of all adapters that may be served now, by the engine's name."""
        adapters = (self._access.admitted(slug) for slug in list(self._access.results))
        return {engine_model(one): one.slug for one in adapters if one is not None}

    def _restart(self) -> None:
        self._note("The adapters that may be served have changed: vLLM is ended, and started with those of now.")
        self._engine = None
        with self._idle:
            self._idle.wait_for(lambda: self._answers == 0, timeout=_DRAIN_SECONDS)
        self._stop()
        self._start()

    def _start(self) -> None:
        self._loaded = set()
        served = self._served()
        if not served and self._watcher.is_alive():
            return  # all were withdrawn; at the first start this is an error of the layout
        folders = {slug: self._access.folder(slug) for slug in served.values()}
        script = self._layout(folders)
        engine = VllmGenerator(upstream_address(self._url), secrets.token_urlsafe(32))
        environment = os.environ | {KEY: engine.key or ""}
        self._process = subprocess.Popen([script.resolve()], env=environment, start_new_session=True)
        deadline = time.monotonic() + _START_SECONDS
        try:
            while not engine.healthy:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    sentence = f"vLLM did not start (exit code {self._process.poll()}); its own messages are above"
                    raise InputError([Problem(str(script), None, None, sentence)])
                if self._ended.wait(0.2):
                    return
            withhold_mixed_up(engine, self._access)
        except InputError:
            self._stop()
            raise
        self._loaded = set(served) & set(self._served())
        self._engine = engine

    def _stop(self) -> None:
        """Ends the process and its workers, by force after ten seconds."""
        self._engine = None
        if (process := self._process) is None:
            return
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._process = None


@contextmanager
def vllm_run(
    access: AdapterAccess, model: str, rank: int, target: Path | str, port: int, note: Callable[[str], None]
) -> Iterator[ServedRun | None]:
    """vLLM over the adapters that may be served now, checked (`withhold_mixed_up`) before it is used.

    A `target` URL names a running server. For a `target` folder, the layout is written there and vLLM is started at
    `port`, as `VllmProcess`; None if vLLM is not installed. Raises InputError if it does not start, or has no layout
    of this version.
    """
    if isinstance(target, str):
        upstream = VllmGenerator(upstream_address(target), os.environ.get(KEY))
        withhold_mixed_up(upstream, access)
        yield ServedRun(upstream, access)
        return
    folder = target

    def layout(folders: Mapping[str, Path]) -> Path:
        dtypes = {dtype for one in folders.values() if (dtype := certified_dtype(one)) is not None}
        dtype = min(dtypes) if len(dtypes) == 1 else None
        script = write_layout(folder, model, rank, folders, "127.0.0.1", port, dtype)
        note(
            f"vLLM runs kernels of its own, in {dtype or 'the type of the files'}: certificates do not cover its "
            "rounding."
        )
        note(f"Layout of {len(folders)} adapters: {folder}; the command is in {script}")
        return script

    if shutil.which("vllm") is None:
        folders = {slug: access.folder(slug) for slug in access.results if not access.reasons(slug)}
        script = layout(folders)
        note(f"vLLM is not installed here. Where it is, run {script}; then serve with --upstream and its address.")
        yield None
        return
    process = VllmProcess(access, layout, port, note)
    try:
        process.start()
        yield ServedRun(process, access)
    finally:
        process.close()
