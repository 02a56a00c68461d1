"""The page while its answers are written: words before the end; a reload, a skip, a deletion and faults meanwhile."""

from __future__ import annotations

import re
import threading
import time

import httpx
import pytest

from persona_rlhf.common.files import pseudonym
from persona_rlhf.data.erasure import DataSubject
from persona_rlhf.serving.collect_views import CSP
from persona_rlhf.serving.openai_api import APIError, TextChunk, Usage
from tests.serving.collect_browser import Forms
from tests.serving.live import live
from tests.serving.test_collect import site  # noqa: F401 - a fixture

WORDS = [f"<w{n}>\n " for n in range(40)]


class SlowWriter:
    """Generates WORDS, whose first 20 come at once, and the rest when `go` is set."""

    def __init__(self):
        self.go, self.stopped, self.fault = threading.Event(), [], None

    def chunks(self, adapter, sampling):
        yield from self.words(sampling)
        yield TextChunk("end", "stop", Usage(1, 1))

    def words(self, sampling):
        try:
            for number, word in enumerate(WORDS):
                if number == 20:
                    assert self.go.wait(20)
                    if self.fault is not None:
                        raise self.fault
                yield TextChunk(word.replace("w", f"{sampling.seed} "))
        except GeneratorExit:
            self.stopped.append(sampling.seed)
            raise


class Visitor:
    """A user's browser on a live server, whose pages may be read in parts."""

    def __init__(self, site, port):
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", follow_redirects=True, timeout=30)
        page = self.client.get(site.link()).text
        if 'action="/consent"' in page:
            page = self.send(page, "/consent").text
        self.home = page

    def send(self, page, action, **fields) -> httpx.Response:
        form = next(form["fields"] for form in Forms(page).forms if form["action"] == action)
        return self.client.post(action, data=form | fields)

    def ask(self):
        """The response to a prompt, to be read in parts."""
        form = next(form["fields"] for form in Forms(self.home).forms if form["action"] == "/ask")
        return self.client.stream("POST", "/ask", data=form | {"prompt": "hello"})


@pytest.fixture
def writer(site):
    writer = SlowWriter()
    site.writer.chunks, site.candidates = writer.chunks, 3
    site.restart()
    yield writer
    writer.go.set()


@pytest.fixture
def ada(site, writer):
    """Ada's browser on a live server."""
    with live(site.app, site.log.append) as port:
        visitor = Visitor(site, port)
        yield visitor
        writer.go.set()
        visitor.client.close()


def read_until(parts, text, page=""):
    """The page as far as it was sent when a text was in it."""
    for part in parts:
        page += part
        if text in page:
            return page
    raise AssertionError(page)


def eventually(holds):
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_words_come_before_the_end_and_the_choice_after_it(site, ada, writer):
    with ada.ask() as response:
        assert response.headers["Content-Security-Policy"] == CSP
        parts = response.iter_text()
        page = read_until(parts, "19&gt;")
        assert "Answer 2" in page
        assert "/choose" not in page
        assert "end" not in Forms(page).text.split("Your prompt")[1]
        writer.go.set()
        page = read_until(parts, "</html>", page)
    assert "Both answers are whole." in page
    last = page[page.rindex('<div class="pair">') :]
    shown = re.findall(r'<div class="text" dir="auto">(.*?)</div>', last, re.DOTALL)
    assert ada.send(page, "/choose", verdict="left").is_success
    [choice] = site.ledger.choices()
    for text, recorded, seed in zip(
        shown, (choice.left, choice.right), (choice.left_seed, choice.right_seed), strict=True
    ):
        assert recorded == "".join(word.replace("w", f"{seed} ") for word in WORDS) + "end"
        assert Forms(text).text == recorded
    assert choice.left != choice.right
    assert choice.left_by == "d" * 64
    assert len(writer.stopped) == 1  # the third candidate
    names = re.findall(r' id="(.*?)"', page)
    assert len(names) == len(set(names))


def test_a_reload_and_a_second_tab_see_the_same_two(site, ada, writer):
    with ada.ask() as response:
        read_until(response.iter_text(), "19&gt;")
    with ada.client.stream("GET", "/") as first, ada.client.stream("GET", "/") as second:
        begun = [read_until(response.iter_text(), "19&gt;") for response in (first, second)]
        assert len({tuple(re.findall(r"&lt;\d+ 3&gt;", page)[:2]) for page in begun}) == 1
        with ada.ask() as again:  # the form that is sent twice asks nothing anew
            parts = again.iter_text()
            read_until(parts, "19&gt;")
            writer.go.set()
            read_until(parts, "</html>")
    assert len(site.writer.requests) == 3
    assert 'class="growing"' not in ada.client.get("/").text


@pytest.mark.parametrize("way", ["skip", "delete", "ask"])
def test_what_ends_the_pair_ends_the_writing(site, ada, writer, way):
    with ada.ask() as response:
        parts = response.iter_text()
        page = read_until(parts, "19&gt;")
        token = Forms(ada.home).forms[0]["fields"]["form_token"]
        if way == "skip":
            ada.client.post("/skip", data={"form_token": token, "comparison": site.open.of("Ada").id})
        elif way == "delete":
            ada.client.post("/delete", data={"form_token": token, "sure": "yes"})
        else:
            threading.Timer(0.2, writer.go.set).start()
            ada.client.post("/ask", data={"form_token": token, "prompt": "another"})
        writer.go.set()
        page = read_until(parts, "</html>", page)
    assert "not open any more" in page
    assert "/choose" not in page
    eventually(lambda: len(writer.stopped) >= 3)
    assert site.ledger.choices() == []
    assert site.log == ([] if way != "delete" else site.log[:1])


@pytest.mark.parametrize("fault", [APIError(502, "The engine failed.", "engine_failed"), ValueError("a private text")])
def test_a_fault_in_the_middle_is_explained_and_the_prompt_stays(site, ada, writer, fault):
    writer.fault = fault
    with ada.ask() as response:
        parts = response.iter_text()
        page = read_until(parts, "19&gt;")
        writer.go.set()
        page = read_until(parts, "</html>", page)
    sentence = "The engine failed." if isinstance(fault, APIError) else "The answers could not be written."
    assert sentence in page
    again = ada.client.get("/")
    assert again.status_code == 503
    assert sentence in again.text
    assert ">hello</textarea>" in again.text
    assert "private" not in page + "".join(site.log)
    assert len(site.log) == (not isinstance(fault, APIError))
    assert ada.client.get("/").status_code == 200
    writer.fault = None
    assert "/choose" in ada.send(again.text, "/ask", prompt="hello").text


def test_a_choice_before_the_answers_are_whole_is_none(site, ada, writer):
    with ada.ask() as response:
        parts = response.iter_text()
        read_until(parts, "19&gt;")
        token = Forms(ada.home).forms[0]["fields"]["form_token"]
        form = {"form_token": token, "comparison": site.open.of("Ada").id, "verdict": "left"}
        answer = ada.client.post("/choose", data=form, follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        writer.go.set()
        read_until(parts, "</html>")
    assert site.ledger.choices() == []


def test_a_user_whose_lines_were_erased_meanwhile_saves_nothing(site, ada, writer):
    with ada.ask() as response:
        parts = response.iter_text()
        page = read_until(parts, "19&gt;")
        site.ledger.erase(DataSubject(pseudonym("Ada")))
        writer.go.set()
        page = read_until(parts, "</html>", page)
    assert "Welcome" in ada.send(page, "/choose", verdict="left").text
    assert site.ledger.choices() == []
