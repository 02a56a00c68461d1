"""The loop of feedback: choices on the page, `add`, and answers of the new adapter on the same page."""

from __future__ import annotations

import json
import re
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import mean

import httpx
import pytest

from persona_rlhf.common.files import slug
from persona_rlhf.data.choice_ledger import CHOICES, ChoiceLedger
from tests.serving.collect_browser import Forms
from tests.story.experiment import adapters, command, environment, persona_rlhf, results

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

USER = "a newcomer <b>"
UPDATE_AFTER, SECOND = 12, 8
CLIENT = {"follow_redirects": True, "timeout": 120}


@contextmanager
def page(folder: Path, *options: str):
    """A process that serves the page of the run; the user's link."""
    words = command("collect", "run", "--user", USER, "--port", "0", "--max-tokens", "60", *options)
    process = subprocess.Popen(
        words, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield json.loads(line)["link"]
    finally:
        process.kill()
        process.communicate()


class Person:
    """A user with a written-down taste: of two answers, the one with fewer words is better."""

    def __init__(self, link: str, client: httpx.Client):
        self.address = link.partition("/enter/")[0]
        self.client, self.preferred = client, 0
        self.shown = self.client.get(link)
        if "I agree" in self.shown.text:
            self.send("/consent")

    def send(self, action: str, **fields: str) -> None:
        form = next(form["fields"] for form in Forms(self.shown.text).forms if form["action"] == action)
        self.shown = self.client.post(self.address + action, data=form | fields)
        assert self.shown.status_code == 200, self.shown.text

    def open(self, path: str) -> None:
        self.shown = self.client.get(self.address + path)
        assert self.shown.status_code == 200, self.shown.text

    def wait_for(self, sentence: str) -> None:
        """Opens the page again until it has the sentence."""
        end = time.monotonic() + 600
        while sentence not in self.shown.text:
            assert time.monotonic() < end, self.shown.text
            time.sleep(1)
            self.open("/")

    def choose(self) -> None:
        """Takes the first suggestion, and chooses."""
        suggestions = [value for form in Forms(self.shown.text).forms for _, value in form["buttons"]]
        self.send("/ask", prompt=suggestions[0])
        left, right = (
            len(text.split())
            for text in re.findall(r'Answer \d</h2>\n<div class="text" dir="auto">(.*?)</div>', self.shown.text, re.S)
        )
        self.preferred += left != right
        self.send("/choose", verdict="tie" if left == right else "left" if left < right else "right")
        assert "Saved." in self.shown.text


def test_from_choices_to_an_adapter_and_back_to_the_page(copied):
    run = copied / "run"
    with page(copied, "--update-after", str(UPDATE_AFTER)) as link, httpx.Client(**CLIENT) as client:
        person = Person(link, client)
        while person.preferred < UPDATE_AFTER:
            person.choose()
        person.wait_for("Your assistant was updated")  # trained in the background
        trained = adapters(run)[slug(USER)]
        person.send("/ask", prompt="Suggest something to do on a free day.")
        person.send("/choose", verdict="tie")
        person.open("/data")
        person.send("/assistant")  # back to the common model
        assert slug(USER) not in adapters(run)
        person.send("/ask", prompt="Suggest something to do on a rainy day.")
        person.send("/choose", verdict="tie")
        person.open("/data")
        person.send("/assistant")  # and forward again
        assert adapters(run)[slug(USER)] == trained
        assert persona_rlhf("verify", "run", cwd=copied).returncode == 0
        for _ in range(SECOND):
            person.choose()
    done = persona_rlhf("collect", "run", "--status", "--json", cwd=copied)
    [user] = json.loads(done.stdout)
    ledger = ChoiceLedger(run / CHOICES)
    choices, steps = ledger.choices(USER), [update.event for update in ledger.updates(USER)]
    ledger.close()
    assert steps[:4] == ["begun", "released", "restored", "restored"]
    first = len(choices) - SECOND - 2
    authors = [{one.left_by, one.right_by} for one in choices]
    assert authors == [*[{"base"}] * first, {trained}, {"base"}, *[{trained}] * SECOND]
    second = choices[first + 2 :]
    rounds = (choices[:first], second)
    lengths = [mean(len(text.split()) for one in part for text in (one.left, one.right)) for part in rounds]
    print(f"words of an answer: {lengths[0]:.1f} before, {lengths[1]:.1f} after")
    assert user["waiting"] == sum(one.preferred is not None for one in second)
    for words in (  # the operator's way to the same end
        ("collect", "run", "--export", "choices.jsonl"),
        ("data", "check", "choices.jsonl"),
        ("add", "run", "--users", "choices.jsonl"),
    ):
        done = persona_rlhf(*words, cwd=copied)
        assert done.returncode == 0, done.stderr
    [line] = [line for line in results(run) if line["user_id"] == USER]
    assert line["status"] == "released"
    assert line["spending"]["look"] == 2  # the look of the first one stays counted
    done = persona_rlhf("forget", "run", "--user", USER, "--data", cwd=copied)
    assert done.returncode == 0, done.stderr
    assert not [path for path in copied.rglob("*") if path.is_file() and b"newcomer" in path.read_bytes()]
