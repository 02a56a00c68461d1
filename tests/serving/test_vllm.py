from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from collections import Counter
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import pseudonym, sha256_of, slug
from persona_rlhf.data.erasure import DataSubject
from persona_rlhf.data.pairs import Message
from persona_rlhf.release.engine_layout import (
    ZERO_NAME,
    command_line,
    engine_name,
    erase_from_layout,
    layout_adapters,
    write_layout,
)
from persona_rlhf.release.results import PairCounts, Result
from persona_rlhf.serving.openai_api import AdmittedAdapter, APIError, SamplingParams, TextChunk, TokenLogprob, Usage
from persona_rlhf.serving.policy_filter import join_chunks
from persona_rlhf.serving.vllm import VllmGenerator, upstream_address, withhold_mixed_up
from persona_rlhf.serving.vllm_process import vllm_run
from tests.serving.conftest import slugs
from tests.serving.vllm_stand_in import stand_in

MESSAGES = (Message("system", "Be kind."), Message("user", "hi"))
ANN = AdmittedAdapter(
    Result(user_id="ann", slug="ann", status="released", reason="", pairs=PairCounts(0, 0, 0)),
    Path("adapters"),
    "abcdef0123456789",
)


@pytest.fixture
def server():
    with stand_in() as server:
        yield server


@pytest.fixture
def upstream(server) -> VllmGenerator:
    return VllmGenerator(upstream_address(f"http://127.0.0.1:{server.server_port}"), "a key")


def test_a_request_goes_on_as_it_came_and_comes_back_in_pieces(server, upstream):
    sampling = SamplingParams(9, 0.5, 0.9, 3, ("x",))
    chunks = list(upstream.generate(ANN, MESSAGES, sampling))
    assert chunks == [
        TextChunk("ann@abcdef012345 "),
        TextChunk("says "),
        TextChunk("hi"),
        TextChunk("", "length", Usage(4, 3)),
    ]
    [(path, key, body)] = server.requests
    assert (path, key) == ("/v1/chat/completions", "Bearer a key")
    assert body == {
        "model": "ann@abcdef012345",
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}],
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "stop": ["x"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert join_chunks(upstream.generate(None, MESSAGES, sampling)).text == "base@zero says hi"


@pytest.mark.parametrize(("fault", "status"), [(400, 400), (401, 502), (404, 502), (500, 502)])
def test_what_it_says_of_a_fault_stays_behind(server, upstream, fault, status):
    server.fault = fault
    with pytest.raises(APIError) as error:
        upstream.generate(ANN, MESSAGES, SamplingParams(9))
    assert error.value.status == status
    assert "bob" not in error.value.message


@pytest.mark.parametrize("fault", ["half", "nonsense", "error"])
def test_a_stream_that_goes_wrong_is_no_answer(server, upstream, fault):
    server.fault = fault
    with pytest.raises(APIError) as error:
        join_chunks(upstream.generate(ANN, MESSAGES, SamplingParams(9)))
    assert error.value.status == 502
    assert "bob" not in error.value.message


def test_nobody_there_is_said_in_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        nowhere = VllmGenerator(upstream_address(f"http://127.0.0.1:{taken.getsockname()[1]}"), None)
        with pytest.raises(APIError, match="cannot be reached"):
            nowhere.generate(ANN, MESSAGES, SamplingParams(9))
    with pytest.raises(InputError, match="is no address"):
        upstream_address("localhost:8000")


def test_the_layout_holds_the_two_files_of_peft_and_the_command(run, tmp_path):
    folders = {one: run.path / "adapters" / one for one in slugs()}
    script = write_layout(tmp_path / "out", "owner/base", 4, folders, "127.0.0.1", 8001)
    names = {one: engine_name(one, sha256_of(source / "adapter_model.safetensors")) for one, source in folders.items()}
    for one, source in folders.items():
        files = ["adapter_config.json", "adapter_model.safetensors"]
        assert sorted(file.name for file in (tmp_path / "out/adapters" / names[one]).iterdir()) == files
        for name in files:
            assert (tmp_path / "out/adapters" / names[one] / name).read_bytes() == (source / name).read_bytes()
    zero, other = (
        load_file(tmp_path / f"out/adapters/{name}/adapter_model.safetensors")
        for name in (ZERO_NAME, names[slugs()[0]])
    )
    assert {name: tensor.shape for name, tensor in zero.items()} == {n: tensor.shape for n, tensor in other.items()}
    assert not any(tensor.any() for tensor in zero.values())
    assert os.access(script, os.X_OK)
    [line] = [line for line in script.read_text().splitlines() if line.startswith("exec ")]
    words = shlex.split(line)[1:-1]
    assert words == [
        *("vllm", "serve", "owner/base", "--served-model-name", "base", "--host", "127.0.0.1", "--port", "8001"),
        *("--enable-lora", "--max-lora-rank", "8", "--max-loras", "4", "--max-cpu-loras", "4", "--lora-modules"),
        *(f"{name}=adapters/{name}" for name in [ZERO_NAME, *sorted(names.values())]),
    ]
    gone = sorted(folders)[0]
    write_layout(tmp_path / "out", "owner/base", 4, {k: v for k, v in folders.items() if k != gone}, "127.0.0.1", 1)
    assert names[gone] not in {folder.name for folder in (tmp_path / "out/adapters").iterdir()}
    assert gone not in script.read_text()


def test_changed_weights_get_another_name(run, tmp_path):
    one, source = slugs()[0], run.path / "adapters" / slugs()[0]
    write_layout(tmp_path / "out", "o/b", 4, {one: source}, "127.0.0.1", 1)
    before = layout_adapters(tmp_path / "out")
    weights = load_file(source / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, source / "adapter_model.safetensors")
    write_layout(tmp_path / "out", "o/b", 4, {one: source}, "127.0.0.1", 1)
    after = layout_adapters(tmp_path / "out")
    assert before.isdisjoint(after)
    assert {folder.name for folder in (tmp_path / "out/adapters").iterdir()} == {*after, ZERO_NAME}


def test_a_user_is_taken_out_of_a_layout(run, tmp_path):
    folders = {one: run.path / "adapters" / one for one in slugs()}
    script = write_layout(tmp_path / "out", "owner/base", 4, folders, "127.0.0.1", 8001)
    before = script.read_text().splitlines()[-1]
    erase_from_layout(tmp_path / "out", DataSubject(pseudonym("Ada")))
    gone = slug("Ada")
    assert not [path for path in (tmp_path / "out").rglob("*") if gone in path.name]
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and gone in path.read_text("latin-1")]
    assert len(shlex.split(before)) - len(shlex.split(script.read_text().splitlines()[-1])) == 1
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize(("rank", "allowed"), [(1, "1"), (8, "8"), (9, "16"), (33, "64"), (512, "512")])
def test_the_rank_is_one_that_vllm_takes(rank, allowed):
    words = command_line("data/base", rank, ["a"], "127.0.0.1", 1)
    assert words[words.index("--max-lora-rank") + 1] == allowed
    assert Path(words[2]).is_absolute()


def test_nothing_is_written_over_what_is_not_a_layout(run, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("mine")
    (tmp_path / "a file").write_text("mine")
    for place in ("taken", "a file"):
        with pytest.raises(InputError, match="something else"):
            write_layout(tmp_path / place, "o/b", 4, {"a": run.path / "adapters" / slugs()[0]}, "127.0.0.1", 1)
    with pytest.raises(InputError, match="no user"):
        write_layout(tmp_path / "new", "o/b", 4, {}, "127.0.0.1", 1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a file", "run", "taken"]


def test_without_vllm_the_layout_is_written_and_it_says_so(run, access, tmp_path, log, monkeypatch):
    monkeypatch.setenv("PATH", "")
    (run.path / "adapters" / slug("Ada") / "README.md").write_text("edited")
    with vllm_run(access, "o/b", 4, tmp_path / "out", 8001, log.append) as served:
        assert served is None
    assert "not installed" in log[-1]
    assert {folder.name for folder in (tmp_path / "out/adapters").iterdir()} == {
        ZERO_NAME,
        *names_of(access, set(slugs()) - {slug("Ada")}),
    }


def names_of(access, slugs) -> list[str]:
    return [engine_name(adapter.slug, adapter.weights_sha256) for adapter in map(access.admit, slugs)]


def test_an_engine_that_mixes_up_an_adapter_does_not_serve_it(server, upstream, access, log):
    """The second time, while others are asked, Ada's adapter answers with another's; one was never loaded."""
    ada, mallory, other = names_of(access, [slug("Ada"), *(one for one in slugs() if one != slug("Ada"))])
    asked = Counter[str]()

    def mixed_up(name):
        asked[name] += 1
        return mallory if name == ada and asked[name] > 1 else name

    server.adapters, server.mixed_up = [ZERO_NAME, ada, mallory], mixed_up
    withhold_mixed_up(upstream, access)
    assert asked == {ZERO_NAME: 2, ada: 2, mallory: 2}
    served = {name.partition("@")[0] for name in (mallory,)}
    for one in slugs():
        if one in served:
            access.admit(one)
        else:
            with pytest.raises(APIError):
                access.admit(one)
    assert any("other adapters are used beside" in line for line in log)
    assert any(other.partition("@")[0] in line and "write the layout again" in line for line in log)


@pytest.mark.parametrize("fault", ["no zero adapter", "the base is mixed up", "nobody answers", "no such list"])
def test_an_engine_that_cannot_be_used_is_refused_at_the_start(server, upstream, access, fault):
    server.adapters = [ZERO_NAME, *names_of(access, slugs())]
    if fault == "no zero adapter":
        server.adapters.remove(ZERO_NAME)
    if fault == "the base is mixed up":
        numbers = iter(range(99))
        server.mixed_up = lambda name: name if name != ZERO_NAME else next(numbers)
    if fault == "nobody answers":
        server.fault = 500
    if fault == "no such list":
        upstream = VllmGenerator(upstream_address(f"http://127.0.0.1:{server.server_port}/elsewhere"), None)
    with pytest.raises(InputError, match=r"--upstream|127\.0\.0\.1"):
        withhold_mixed_up(upstream, access)


@pytest.fixture
def vllm(tmp_path, monkeypatch) -> Path:
    """A command `vllm` that is the stand-in."""
    program = tmp_path / "bin/vllm"
    program.parent.mkdir()
    source = Path(__file__).with_name("vllm_stand_in.py").read_text().replace("/usr/bin/env python3", sys.executable, 1)
    program.write_text(source)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return program


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_vllm_is_started_with_a_key_of_its_own_and_ended(access, tmp_path, log, vllm):
    port = free_port()
    with vllm_run(access, "o/b", 4, tmp_path / "out", port, log.append) as served:
        assert served is not None
        assert (
            join_chunks(served.generator.generate(access.admit(slug("Ada")), MESSAGES, SamplingParams(3))).text
            == f"{names_of(access, [slug('Ada')])[0]} says hi"
        )
    started = json.loads((tmp_path / "out/asked.json").read_text())
    assert started["command"][:2] == ["serve", "o/b"]
    assert len(started["key"]) > 30
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_vllm_that_does_not_come_up_is_said(access, tmp_path, log, vllm):
    vllm.write_text("#!/bin/sh\nexit 7\n")
    with (
        pytest.raises(InputError, match="exit code 7"),
        vllm_run(access, "o/b", 4, tmp_path / "out", free_port(), log.append),
    ):
        pass


def test_log_probabilities_are_requested_and_come_back(server, upstream):
    sampling = SamplingParams(5, logprobs=2)
    answer = join_chunks(upstream.generate(None, (Message("user", "hi"),), sampling))
    assert (server.requests[-1][2]["logprobs"], server.requests[-1][2]["top_logprobs"]) == (True, 2)
    words = ["base@zero ", "says ", "hi"]
    assert answer.logprobs == tuple(TokenLogprob(word, -1.5, (("x", -0.5),) * 2) for word in words)
