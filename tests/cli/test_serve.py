"""`serve` as people run it: a process, a port, a signal."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from persona_rlhf.cli import app
from persona_rlhf.cli.serve import _lines
from persona_rlhf.common.files import slug
from persona_rlhf.release.engine_layout import ZERO_NAME, engine_name
from persona_rlhf.release.results import RunResults
from persona_rlhf.serving.access import METRICS_READER, read_tokens
from tests.serving.conftest import RELEASED, base, base_folder, run, served_run  # noqa: F401 - fixtures
from tests.serving.vllm_stand_in import stand_in

ADA = slug("Ada")


def cli_words(run, tmp_path, *words):
    return ["serve", str(run.path), "--tokens", str(tmp_path / "tokens"), *words]


@pytest.fixture
def tokens(served_run, tmp_path) -> dict[str, str]:
    """A token a user, by slug, as `--make-tokens` prints them."""
    done = CliRunner().invoke(app.app, cli_words(served_run, tmp_path, "--make-tokens"))
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["user_id"] for line in lines] == list(RELEASED)
    assert not any(line["token"] in done.stderr for line in lines)
    return {line["model"]: line["token"] for line in lines}


class Server:
    """A running server: its process and its port."""

    def __init__(self, words, cwd=None):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "persona_rlhf", *words, "--port", "0"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=cwd)
        self.log = ""
        while "Serving" not in self.log:
            line = self.process.stderr.readline()
            assert line, f"the server did not start: {self.log}"
            self.log += line
        self.port = int(self.log.split("Serving")[1].split("http://")[1].split(":")[1].split("/")[0])

    def ask(self, token, **changes):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = {"model": ADA, "messages": [{"role": "user", "content": "w5 w6"}], "temperature": 0} | changes
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Authorization": f"Bearer {token}"})
        return connection, connection.getresponse()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        _, rest = self.process.communicate(timeout=60)
        self.log += rest
        return self.process.returncode


def read(answer):
    connection, response = answer
    with response:
        answered = response.status, json.loads(response.read())
    connection.close()
    return answered


@pytest.mark.slow
def test_a_server_from_its_tokens_to_its_end(served_run, tokens, tmp_path):
    server = Server(cli_words(served_run, tmp_path, "--max-tokens", "200", "--watch", "1"))
    try:
        assert "Watching 100% of the requests" in server.log
        assert "127.0.0.1" in server.log
        assert "Warning" not in server.log
        status, answered = read(server.ask(tokens[ADA], max_tokens=5))
        assert status == 200
        assert answered["usage"]["completion_tokens"] == 5
        assert read(server.ask(tokens[slug("ada")]))[0] == 404
        assert read(server.ask(tokens[ADA], max_tokens=-1))[0] == 400
        refuses_a_long_body(server.port, tokens[ADA])
        connection, stream = server.ask(tokens[ADA], stream=True, max_tokens=200, temperature=1.5, seed=1)
        first = stream.readline()
        server.process.send_signal(signal.SIGTERM)
        rest = stream.read()  # what runs is finished
        stream.close()
        connection.close()
        assert first.startswith(b"data: ")
        assert rest.endswith(b"data: [DONE]\n\n")
        assert server.stop() == 0
        assert not any(token in server.log for token in tokens.values())
        assert "Traceback" not in server.log
    finally:
        server.process.kill()
        server.process.wait()
        server.process.stderr.close()


def refuses_a_long_body(port, token):
    """100 MB that the server does not read: it answers, closes, and most of the body is never taken."""
    size, sent = 100_000_000, 0
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
    for length in (f"Content-Length: {size}\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            client.sendall((head + length).encode())
            block = b"x" * 65_536 if "Content" in length else b"10000\r\n" + b"x" * 65_536 + b"\r\n"
            try:
                while sent < size:
                    client.sendall(block)
                    sent += 65_536
            except (BrokenPipeError, ConnectionResetError):
                pass
            assert sent < size / 4
            try:
                answer = client.recv(4096)
            except ConnectionResetError:  # it closed while we were sending, which is as good
                answer = b"HTTP/1.1 413"
            assert answer.startswith(b"HTTP/1.1 413")


@pytest.mark.slow
def test_the_gateway_before_a_vllm_that_runs_already(served_run, tokens, tmp_path):
    """In a process of its own, with a stand-in for vLLM."""
    with stand_in() as vllm:
        url = f"http://127.0.0.1:{vllm.server_port}"
        weights = (served_run.path / "adapters" / ADA / "adapter_model.safetensors").read_bytes()
        ada = engine_name(ADA, hashlib.sha256(weights).hexdigest())
        vllm.adapters = [ZERO_NAME, ada]
        server = Server(cli_words(served_run, tmp_path, "--engine", "vllm", "--upstream", url))
        vllm.requests.clear()  # those of the start
        try:
            status, answered = read(server.ask(tokens[ADA], max_tokens=5))
            assert (status, answered["choices"][0]["message"]["content"]) == (200, f"{ada} says w5 w6")
            assert read(server.ask(tokens[slug("ada")]))[0] == 404
            assert len(vllm.requests) == 1
            assert server.stop() == 0
        finally:
            server.process.kill()
            server.process.wait()
            server.process.stderr.close()


def test_the_token_of_the_metrics_is_made_once_and_is_no_users(served_run, tokens, tmp_path):
    words = cli_words(served_run, tmp_path, "--make-metrics-token")
    first, second = CliRunner().invoke(app.app, words), CliRunner().invoke(app.app, words)
    token = json.loads(first.stdout)["token"]
    assert read_tokens(tmp_path / "tokens").holder(token) == METRICS_READER
    assert (second.exit_code, second.stdout) == (0, "")
    assert token not in (tmp_path / "tokens").read_text()


def test_mistakes_are_said_before_anything_is_loaded(served_run, tokens, tmp_path):
    def outcome(*words):
        done = CliRunner().invoke(app.app, cli_words(served_run, tmp_path, *words))
        return done.exit_code, done.stderr

    assert outcome("--engine", "vllm")[0] == 2
    assert outcome("--engine", "vllm", "--to", "x", "--upstream", "http://x")[0] == 2
    assert outcome("--tokens", str(tmp_path / "nowhere"))[0] == 2
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, log = outcome("--port", str(taken.getsockname()[1]))
        assert code == 2
        assert "cannot listen" in log
    code, log = outcome("--engine", "vllm", "--to", str(tmp_path / "tokens"))
    assert code == 2
    assert "something else stands there" in log


def test_chat_refuses_before_it_loads_the_base(served_run, monkeypatch):
    import persona_rlhf.serving.local_engine

    monkeypatch.setattr(persona_rlhf.serving.local_engine, "local_run", lambda *_: pytest.fail("the base was loaded"))
    held_back = next(one for one in RunResults(served_run.path) if one.status == "held_back")
    done = CliRunner().invoke(app.app, ["chat", str(served_run.path), "--user", held_back.user_id])
    assert done.exit_code == 3, done.output
    assert "This adapter cannot be used: it is not released (held_back)" in done.stderr


def test_a_line_of_chat_that_is_no_utf_8_costs_that_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xc3\xa9\n\xff\xfe\nlast"), "utf-8"))
    assert list(_lines()) == ["café\n", "last"]
    assert capsys.readouterr().err == "This line is not UTF-8 text; write it again.\n"
