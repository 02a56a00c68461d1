"""The stand-in's process follows the adapters that may be served."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from persona_rlhf.common.files import slug
from persona_rlhf.release.engine_layout import layout_adapters
from persona_rlhf.serving import vllm_process
from persona_rlhf.serving.openai_api import APIError, SamplingParams
from persona_rlhf.serving.policy_filter import join_chunks
from persona_rlhf.serving.vllm import engine_model
from persona_rlhf.serving.vllm_process import VllmProcess, vllm_run
from tests.serving.test_vllm import MESSAGES, free_port, slugs, vllm  # noqa: F401 - fixture


@pytest.fixture
def process(access, tmp_path, log, vllm, monkeypatch) -> VllmProcess:
    """Over all three adapters, compared every 50 ms."""
    monkeypatch.setattr(vllm_process, "RECHECK_SECONDS", 0.05)
    with vllm_run(access, "o/b", 4, tmp_path / "out", free_port(), log.append) as served:
        yield served.generator


def started(folder: Path) -> int:
    """The inode of the file that the stand-in writes anew at each start."""
    try:
        return (folder / "out/asked.json").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def answer(process: VllmProcess, access, one: str) -> str:
    """The answer under a user's adapter, as soon as the engine has started."""
    for _ in range(400):
        try:
            return join_chunks(process.generate(access.admit(one), MESSAGES, SamplingParams(3))).text
        except APIError as error:
            assert error.code == "engine_starting", error.message
            time.sleep(0.05)
    raise AssertionError("the engine did not start")


def until(condition) -> None:
    for _ in range(400):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen in 20 seconds")


def test_a_withdrawn_adapter_ends_the_process_that_holds_it(process, access, run, tmp_path, log):
    ada, other = slug("Ada"), next(one for one in slugs() if one != slug("Ada"))
    withdrawn = engine_model(access.admit(ada))
    first, at = process._process.pid, started(tmp_path)
    (run.path / "adapters" / ada / "README.md").write_text("edited")
    until(lambda: started(tmp_path) > at)
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert answer(process, access, other) == f"{engine_model(access.admit(other))} says hi"
    words = json.loads((tmp_path / "out/asked.json").read_text())["command"]
    assert not any(withdrawn in word for word in words)
    assert withdrawn not in layout_adapters(tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if withdrawn in path.name]
    assert any("have changed" in line for line in log)
    pid = process._process.pid
    time.sleep(0.3)
    assert process._process.pid == pid, "nothing changed since"


def test_a_process_that_dies_is_started_again(process, access):
    first = process._process.pid
    os.kill(first, signal.SIGKILL)
    until(lambda: process._process is not None and process._process.pid != first)
    assert answer(process, access, slug("ada")).endswith("says hi")


def test_with_no_adapter_left_nothing_runs(process, run, tmp_path):
    for one in slugs():
        (run.path / "adapters" / one / "README.md").write_text("edited")
    until(lambda: process._process is None)
    with pytest.raises(APIError) as error:
        process.generate(None, MESSAGES, SamplingParams(3))
    assert (error.value.status, error.value.retry_after) == (503, 10)


def test_an_engine_that_no_longer_starts_is_noted_and_tried_again(process, run, access, tmp_path, log, vllm):
    good = vllm.read_text()
    vllm.write_text("#!/bin/sh\nexit 7\n")
    (run.path / "adapters" / slug("Ada") / "README.md").write_text("edited")
    until(lambda: any("exit code 7" in line for line in log))
    vllm.write_text(good)
    assert answer(process, access, slug("ada")).endswith("says hi")


def test_running_answers_are_finished_before_the_end(process, run, access, monkeypatch):
    chunks = process.generate(access.admit(slug("ada")), MESSAGES, SamplingParams(3))
    next(chunks)
    first = process._process
    (run.path / "adapters" / slug("Ada") / "README.md").write_text("edited")
    until(lambda: process._engine is None)
    time.sleep(0.2)
    assert first.poll() is None, "it waits for this answer"
    assert "".join(chunk.text for chunk in chunks).endswith("says hi")
    until(lambda: first.poll() is not None)
