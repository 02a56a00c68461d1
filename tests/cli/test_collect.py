"""`collect` as people run it: links on stdout, a page behind them, numbers and an export for the operator."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import httpx
import pytest
from typer.testing import CliRunner

from persona_rlhf.cli import app
from persona_rlhf.common.files import pseudonym
from persona_rlhf.data.choice_ledger import CHOICES, DELETIONS, ChoiceLedger
from persona_rlhf.data.pairs import read_pairs
from persona_rlhf.release.served_places import served_places
from persona_rlhf.serving.collect_links import Links
from persona_rlhf.serving.server import bind_socket
from tests.data.test_choice_ledger import add, choice
from tests.serving.collect_browser import Forms
from tests.serving.conftest import base, base_folder, run, served_run  # noqa: F401 - fixtures


def collect(run, *words):
    done = CliRunner().invoke(app.app, ["collect", str(run.path), *map(str, words)])
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def choices(served_run):
    """Choices of a user of the run, and of a new one, in the run's ledger."""
    ledger = ChoiceLedger(served_run.path / CHOICES)
    for number, verdict in enumerate(("left", "tie", "right")):
        for user in ("Ada", "new\x1b[2J"):
            add(ledger, choice(number, user, verdict))
    add(ledger, choice(9, "Ada", "left", prompt="prompt 0", left="right 0", right="left 0"))  # the other answer now
    ledger.undo("new\x1b[2J 0", "new\x1b[2J")
    ledger.record_update("Ada", "begun", "base", 3, "more.jsonl")
    ledger.record_update("Ada", "not_released", "base", 3, "safety")
    ledger.close()
    return served_run


def test_the_status_has_numbers_and_nobodys_text(choices):
    (choices.path / DELETIONS).write_text('{"user_id": "gone", "at": "2026-11-30T10:00:00Z"}\n')
    code, out, _ = collect(choices, "--status", "--json")
    users = {user.pop("user_id"): user for user in json.loads(out)}
    assert code == 0
    assert list(users) == ["Ada", "new\x1b[2J", "gone"]
    figures = {"choices": 4, "preferred": 3, "waiting": 3, "repeated": 1, "alike": 0, "undone": 0}
    update = users["Ada"].pop("update")
    assert re.fullmatch(r"not released: safety, 20[-0-9T:]+Z", update)
    assert users["Ada"] == figures | {"last": "2026-11-30T10:00:00Z", "deletion_wished": False}
    assert (users["new\x1b[2J"]["preferred"], users["new\x1b[2J"]["undone"]) == (1, 1)
    assert users["gone"]["deletion_wished"]
    code, out, err = collect(choices, "--status")
    assert "prompt 0" not in out + err
    assert "\x1b[2J" not in out + err
    assert "gone deleted their choices on the page" in err


def test_choices_are_exported_once_per_file(choices, tmp_path):
    out = tmp_path / "choices.jsonl"
    code, _, err = collect(choices, "--export", out)
    assert code == 0, err
    assert f"persona-rlhf add {choices.path} --users {out}" in err
    assert {pair.user_id for pair in read_pairs(out, 0.25)} == {"Ada", "new\x1b[2J"}
    assert collect(choices, "--export", out)[0] == 2


def test_a_ledger_outside_is_noted_for_forget(served_run, tmp_path):
    assert collect(served_run, "--status", "--ledger", tmp_path / "mine.db")[0] == 0
    assert [place.place for place in served_places(served_run.path)] == [str(tmp_path / "mine.db")]
    assert not (served_run.path / CHOICES).exists()


def test_mistakes_are_said_before_anything_is_loaded(served_run, tmp_path):
    (tmp_path / "no.db").write_text("no database")
    assert collect(served_run, "--ledger", tmp_path / "no.db")[0] == 2
    assert collect(served_run, "--user", "")[0] == 2
    assert collect(served_run, "--user", "x" * 129)[0] == 2
    assert collect(served_run, "--user", "Ada", "--prompts", tmp_path / "nowhere")[0] == 2
    with bind_socket("127.0.0.1", 0) as taken:
        taken.listen()
        code, _, err = collect(served_run, "--port", 0, "--admin-port", taken.getsockname()[1])
    assert code == 2
    assert "name another --admin-port" in err
    (served_run.path / "forgotten").mkdir()
    (served_run.path / f"forgotten/{pseudonym('Ada')}.json").write_text("{}")
    code, _, err = collect(served_run, "--user", "Ada")
    assert code == 2
    assert "this user was forgotten" in err
    assert Links(served_run.path).users() == set()


@pytest.mark.slow
def test_a_page_from_its_link_to_a_choice_and_a_kill(served_run):
    """The server is killed (kill -9) after a choice; a second one opens by the same link, and the choice is there."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def start(*words):
        words = ["collect", str(served_run.path), "--port", "0", "--max-tokens", "8", *words]
        command = [sys.executable, "-m", "persona_rlhf", *words]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        log = ""
        while "Serving" not in log:
            line = process.stderr.readline()
            assert line, log
            log += line
        return process, log.split("Serving")[1].split(" at ")[1].split(";")[0]

    process, address = start("--user", "Ada", "--admin-port", "0")
    try:
        link = json.loads(process.stdout.readline())["link"]
        assert link.startswith(address)
        admin = json.loads(process.stdout.readline())["admin"]
        with httpx.Client(follow_redirects=True, timeout=60) as browser:
            page = browser.get(link)
            for action, fields in (
                ("/consent", {}),
                ("/ask", {"prompt": "w5 w6"}),
                ("/choose", {"verdict": "tie"}),
                ("/ask", {"prompt": "w7"}),
            ):
                form = next(form["fields"] for form in Forms(page.text).forms if form["action"] == action)
                page = browser.post(address + action, data=form | fields)
                assert page.status_code == 200, page.text
            assert "Which answer do you like better?" in page.text
        with httpx.Client(follow_redirects=True, timeout=60) as browser:
            page = browser.get(admin)
            assert page.status_code == 200, page.text
            assert "<bdi>Ada</bdi>" in page.text
            assert "w5 w6" not in page.text
            assert browser.get(f"{address}/enter/{admin.rpartition('/')[2]}").status_code == 401
    finally:
        process.kill()
        process.communicate()
    process, address = start()
    try:
        with httpx.Client(follow_redirects=True, timeout=60) as browser:
            page = browser.get(f"{address}/enter/{link.rpartition('/')[2]}")
            assert "1 choice" in page.text.replace("<strong>", "")
        process.send_signal(signal.SIGTERM)
        links, log = process.communicate(timeout=60)
        assert process.returncode == 0, log
        assert "Ada" not in links  # a user with a link gets no second one
        assert link.rpartition("/")[2] not in log
    finally:
        process.kill()
        process.communicate()
