"""The loop of feedback: choices on the page, `add`, and answers of the new adapter on the same page."""

from __future__ import annotations

import json
import re
import subprocess
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
CHOICES_OF_A_ROUND = 16


@contextmanager
def page(folder: Path):
    """A process that serves the page of the run; the user's link."""
    words = command("collect", "run", "--user", USER, "--port", "0", "--max-tokens", "60")
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
        self.client = client
        self.shown = self.client.get(link)
        if "I agree" in self.shown.text:
            self.send("/consent")

    def send(self, action: str, **fields: str) -> None:
        form = next(form["fields"] for form in Forms(self.shown.text).forms if form["action"] == action)
        self.shown = self.client.post(self.address + action, data=form | fields)
        assert self.shown.status_code == 200, self.shown.text

    def choose(self) -> None:
        """Takes the first suggestion, and chooses."""
        suggestions = [value for form in Forms(self.shown.text).forms for _, value in form["buttons"]]
        self.send("/ask", prompt=suggestions[0])
        left, right = (
            len(text.split())
            for text in re.findall(r'Answer \d</h2>\n<div class="text" dir="auto">(.*?)</div>', self.shown.text, re.S)
        )
        self.send("/choose", verdict="tie" if left == right else "left" if left < right else "right")
        assert "Saved." in self.shown.text


def test_from_choices_to_an_adapter_and_back_to_the_page(copied):
    with page(copied) as link, httpx.Client(follow_redirects=True, timeout=120) as client:
        person = Person(link, client)
        for _ in range(CHOICES_OF_A_ROUND):
            person.choose()
        assert "common model" in person.shown.text
        for words in (
            ("collect", "run", "--export", "choices.jsonl"),
            ("data", "check", "choices.jsonl"),
            ("add", "run", "--users", "choices.jsonl"),
        ):
            done = persona_rlhf(*words, cwd=copied)
            assert done.returncode == 0, done.stderr
        [line] = [line for line in results(copied / "run") if line["user_id"] == USER]
        assert line["status"] == "released"
        person.send("/ask", prompt="Suggest something to do on a free day.")  # the page went on meanwhile
        assert "Your assistant was updated" in person.shown.text
        person.send("/choose", verdict="tie")
        for _ in range(CHOICES_OF_A_ROUND):
            person.choose()
    ledger = ChoiceLedger(copied / "run" / CHOICES)
    choices = ledger.choices(USER)
    ledger.close()
    first, second = choices[:CHOICES_OF_A_ROUND], choices[CHOICES_OF_A_ROUND:]
    assert {author for one in first for author in (one.left_by, one.right_by)} == {"base"}
    assert {author for one in second for author in (one.left_by, one.right_by)} == {
        adapters(copied / "run")[slug(USER)]
    }
    lengths = [mean(len(text.split()) for one in part for text in (one.left, one.right)) for part in (first, second)]
    print(f"words of an answer: {lengths[0]:.1f} before, {lengths[1]:.1f} after")
    done = persona_rlhf("collect", "run", "--status", "--json", cwd=copied)
    [user] = json.loads(done.stdout)
    assert user["waiting"] == sum(one.pair is not None for one in second)
    done = persona_rlhf("forget", "run", "--user", USER, "--data", cwd=copied)
    assert done.returncode == 0, done.stderr
    assert not [path for path in copied.rglob("*") if path.is_file() and b"newcomer" in path.read_bytes()]
