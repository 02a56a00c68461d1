"""The feedback page, used by a browser without JavaScript."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import Counter
from functools import cache
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlencode

import httpx
import pytest
import yaml

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import find, pseudonym, slug
from persona_rlhf.data.choice_ledger import CHOICES, DELETIONS, ChoiceLedger
from persona_rlhf.data.page_rows import LINKS
from persona_rlhf.data.wish_documents import WishDesk, document_file
from persona_rlhf.policy.policy import Policy
from persona_rlhf.release.deletion_records import forgotten
from persona_rlhf.release.served_places import note_place
from persona_rlhf.serving.access import Limits
from persona_rlhf.serving.answer_sampler import AnswerSampler
from persona_rlhf.serving.collect import LIMITS, CollectSettings, FeedbackPages
from persona_rlhf.serving.collect_links import make_links
from persona_rlhf.serving.collect_views import STATIC
from persona_rlhf.serving.comparisons import OpenComparisons, Suggestions
from persona_rlhf.serving.openai_api import APIError, TextChunk, Usage
from persona_rlhf.serving.policy_filter import PolicyFilter
from tests.data.test_choice_ledger import add, choice
from tests.serving.collect_browser import Browser
from tests.serving.test_server import FixedAccess

BASE = "c" * 64
HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)>\u202e\0\x1b[2J {{ 7*7 }} &lt;b&gt; \u0645\u0631'


DOCUMENTS = ("configs/policy/tier_one.yaml", "configs/policy/tier_two.yaml", "configs/policy/tier_three.yaml")


@cache
def policy() -> Policy:
    return Policy.read(DOCUMENTS)


class Writer:
    """A generator whose answers differ by their seeds, and name their adapter; `text` overrides them."""

    def __init__(self):
        self.requests, self.text, self.fault = [], None, None
        self.hold = threading.Event()
        self.hold.set()

    def generate(self, adapter, messages, sampling):
        self.requests.append((adapter and adapter.slug, messages[-1].content, sampling))
        if self.fault is not None:
            raise self.fault
        return self.chunks(adapter, sampling)

    def chunks(self, adapter, sampling):
        self.hold.wait(10)
        text = f"answer {sampling.seed} of {adapter.slug if adapter else 'the base'}"
        yield TextChunk(text if self.text is None else self.text, "stop", Usage(5, 3))


class ReleasedAccess(FixedAccess):
    """Adapters of these users may be served; `refresh` has nothing to read."""

    def __init__(self, user_ids):
        super().__init__(user_ids)
        for result in self.results.values():
            object.__setattr__(result, "status", "released")
        self.weights = "d" * 64

    def admit(self, slug):
        return super().admit(slug)._replace(weights_sha256=self.weights)

    def refresh(self):
        pass


class Site:
    """The pages of a run without a run, and browsers on them."""

    def __init__(self, run: Path):
        (run / "state").mkdir(parents=True, exist_ok=True)
        self.run, self.writer, self.access, self.log = run, Writer(), ReleasedAccess(["Ada"]), []
        self.ledger = ChoiceLedger(run / CHOICES, lambda: forgotten(run))
        self.open = OpenComparisons(lambda: forgotten(run))
        self.policy_filter, self.candidates, self.settings = PolicyFilter(), 3, CollectSettings(3)
        self.noticed = []
        self.restart()

    def restart(self, limits: Limits = LIMITS):
        """A new server over the same files."""
        self.open = OpenComparisons(lambda: forgotten(self.run))
        sampler = AnswerSampler(self.writer, self.access, self.policy_filter, BASE, 64, self.candidates)
        suggestions = Suggestions([f"suggestion {n}" for n in range(40)])
        desk = WishDesk(self.run, tuple(map(find, DOCUMENTS)), policy())
        self.app = FeedbackPages(
            self.run,
            sampler,
            self.ledger,
            suggestions,
            self.open,
            desk,
            self.log.append,
            self.settings,
            limits,
            lambda: self.noticed.append(len(self.ledger.choices())),
        ).app()

    def link(self, user="Ada", days=1.0) -> str:
        return f"/enter/{make_links(self.run, [user], days)[user]}"

    def browser(self, user="Ada", consent=True) -> Browser:
        browser = Browser(self.app)
        browser.get(self.link(user))
        if consent and self.ledger.consent(user) is None:
            browser.send("/consent")
        return browser

    def asked(self, user="Ada", prompt="How are you?") -> Browser:
        """A browser with a pair before it."""
        browser = self.browser(user)
        browser.send("/ask", prompt=prompt)
        return browser


@pytest.fixture
def site(tmp_path):
    site = Site(tmp_path / "run")
    yield site
    site.ledger.close()


def test_from_the_link_to_a_saved_choice(site):
    browser = site.browser(consent=False)
    assert "I agree, begin" in browser.response.text
    assert browser.response.url.path == "/"  # the secret left the address
    browser.send("/consent", scope="shared")
    assert site.ledger.consent("Ada") == "shared"
    browser.send("/ask", prompt=" How are you?\r\nFine? ")
    asked = {(adapter, prompt) for adapter, prompt, _ in site.writer.requests}
    assert asked == {(slug("Ada"), "How are you?\nFine?")}
    assert {sampling.temperature for *_, sampling in site.writer.requests} == {0.8}
    comparison = site.open.of("Ada")
    assert browser.page.text.index(comparison.left.text) < browser.page.text.index(comparison.right.text)
    browser.send("/choose", verdict="right", reason="shorter")
    assert "Saved." in browser.response.text
    [choice] = site.ledger.choices("Ada")
    assert (choice.verdict, choice.reason, choice.consent, choice.source) == ("right", "shorter", "shared", "collect")
    assert (choice.left, choice.right) == (comparison.left.text, comparison.right.text)
    assert (choice.left_by, choice.right_by, choice.base) == ("d" * 64, "d" * 64, BASE)
    assert {choice.left_seed, choice.right_seed} < {sampling.seed for *_, sampling in site.writer.requests}
    assert choice.seconds >= 0
    assert "1 choice; in 1 of them one answer was better" in " ".join(browser.page.text.split())


def test_a_user_without_an_adapter_gets_the_base(site):
    site.asked("a new user").send("/choose", verdict="tie")
    [choice] = site.ledger.choices("a new user")
    assert (choice.left_by, choice.right_by) == ("base", "base")


def test_the_two_most_different_answers_are_shown(site):
    texts = iter(["Walk in the forest today.", "Bake bread, or read a book.", "Walk in the forest now."])
    site.writer.chunks = lambda *_: iter([TextChunk(next(texts), "stop", Usage(1, 1))])
    site.asked()
    shown = site.open.of("Ada")
    assert "Bake bread, or read a book." in (shown.left.text, shown.right.text)


def test_the_order_of_the_answers_is_random(site):
    firsts, site.candidates = Counter(), 2
    site.restart(LIMITS._replace(rate=10_000))
    browser = site.asked()
    for _ in range(30):
        firsts[site.open.of("Ada").left.seed == site.writer.requests[-2][2].seed] += 1
        browser.send("/skip")
        browser.send("/ask", prompt="again")
    assert min(firsts[True], firsts[False]) >= 4  # a fair order fails once in 200,000 runs


def test_equal_answers_are_shown_only_where_all_are_equal(site):
    texts = iter(["same", "same", "other"])
    site.writer.chunks = lambda *_: iter([TextChunk(next(texts), "stop", Usage(1, 1))])
    site.asked("Bob")
    assert not site.open.of("Bob").same
    del site.writer.chunks
    site.writer.text = "always this"
    browser = site.asked()
    assert [value for _, value in browser.page.forms[0]["buttons"]] == ["tie", "both_bad"]
    assert browser.send("/choose", verdict="left").status_code == 400
    browser.get("/")
    browser.send("/choose", verdict="both_bad")
    assert [choice.verdict for choice in site.ledger.choices()] == ["both_bad"]


def test_policy_texts_are_shown_as_they_are_and_no_adapter_wrote_them(site):
    site.policy_filter = PolicyFilter(redirect=lambda text: "Ask a doctor." if "ill" in text else None)
    site.restart()
    browser = site.asked(prompt="I am ill")
    assert browser.page.text.count("Ask a doctor.") == 2
    browser.send("/choose", verdict="tie")
    assert site.ledger.choices()[0].left_by == "policy"


def test_undo_brings_the_pair_back(site):
    browser = site.asked()
    shown = site.open.of("Ada")
    browser.send("/choose", verdict="left")
    browser.send("/undo")
    assert "Undone." in browser.response.text
    again = site.open.of("Ada")
    assert (again.left, again.right) == (shown.left, shown.right)
    assert site.ledger.choices() == []
    browser.send("/choose", verdict="right")
    assert [choice.verdict for choice in site.ledger.choices()] == ["right"]


def test_a_pause_is_not_counted(site, monkeypatch):
    clock = count(100.0, 10.0)
    monkeypatch.setattr("persona_rlhf.serving.comparisons.time", SimpleNamespace(monotonic=lambda: next(clock)))
    browser = site.asked()  # shown at 100
    browser.send("/pause")  # at 110
    assert "Paused" in browser.response.text
    browser.get("/")  # at 120
    browser.send("/choose", verdict="left")  # at 130
    assert site.ledger.choices()[0].seconds == 20.0


def test_a_reload_shows_the_same_pair_and_asks_no_model(site):
    browser = site.asked()
    before = browser.response.text
    assert browser.get("/").text == before
    assert len(site.writer.requests) == 3


def test_a_restart_loses_the_open_pair_and_no_choice(site):
    browser = site.asked()
    browser.send("/choose", verdict="left")
    browser.send("/ask", prompt="two")
    site.restart()
    browser._app = site.app
    browser.send("/choose", verdict="left")
    assert "not open any more" in browser.response.text
    assert len(site.ledger.choices()) == 1


def test_two_tabs_share_one_pair_which_is_chosen_once(site):
    tab = site.asked()
    other = Browser(site.app)
    other.cookies = tab.cookies
    other.get("/")
    assert other.form("/choose") == tab.form("/choose")
    tab.send("/choose", verdict="left")
    other.send("/choose", verdict="right")
    assert "counts once" in other.response.text
    assert [choice.verdict for choice in site.ledger.choices()] == ["left"]
    other.send("/ask", prompt="new")
    tab.response = other.response
    tab.send("/skip")
    other.send("/choose", verdict="left")
    assert "not open any more" in other.response.text


def test_a_form_sent_many_times_at_once_is_one_choice(site):
    browser = site.asked()
    form = browser.form("/choose") | {"verdict": "left"}

    async def flood():
        transport = httpx.ASGITransport(site.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here", cookies=browser.cookies) as client:
            return await asyncio.gather(*(client.post("/choose", data=form) for _ in range(20)))

    places = Counter(response.headers["location"] for response in asyncio.run(flood()))
    assert places["/?note=saved"] == 1
    assert set(places) <= {"/?note=saved", "/?note=repeated"}
    assert len(site.ledger.choices()) == 1


def test_a_prompt_sent_twice_at_once_is_asked_once(site):
    browser = site.browser()
    form = browser.form("/ask") | {"prompt": "hello"}
    site.writer.hold.clear()

    async def both():
        transport = httpx.ASGITransport(site.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here", cookies=browser.cookies) as client:
            asking = [asyncio.create_task(client.post("/ask", data=form)) for _ in range(3)]
            await asyncio.sleep(0.2)
            site.writer.hold.set()
            return [(await one).status_code for one in asking]

    assert asyncio.run(both()) == [303] * 3
    assert len(site.writer.requests) == 3


def test_users_wait_for_a_place_and_nobody_is_sent_away(site):
    site.restart(LIMITS._replace(concurrent=2))
    browsers = [site.browser(f"user {n}") for n in range(6)]
    site.writer.hold.clear()

    async def ask(browser):
        transport = httpx.ASGITransport(site.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here", cookies=browser.cookies) as client:
            return (await client.post("/ask", data=browser.form("/ask") | {"prompt": "p"})).status_code

    async def all_at_once():
        asking = [asyncio.create_task(ask(browser)) for browser in browsers]
        await asyncio.sleep(0.2)
        assert len(site.writer.requests) == 6  # three answers each for two users
        site.writer.hold.set()
        return [await one for one in asking]

    assert asyncio.run(all_at_once()) == [303] * 6
    assert all(site.open.of(f"user {n}") for n in range(6))


@pytest.mark.parametrize("prompt", ["", "  \r\n ", "a\x00b", "x" * 4_001, "\x1b[2J"])
def test_a_prompt_that_cannot_be_asked_is_explained_beside_its_field(site, prompt):
    browser = site.browser()
    response = browser.send("/ask", prompt=prompt)
    assert response.status_code == 400
    assert 'role="alert"' in response.text
    assert site.writer.requests == []


def test_the_engines_refusal_of_a_prompt_is_shown_with_the_prompt(site):
    site.writer.fault = APIError(400, "The messages have 900 tokens; the context holds 512.", "context_length_exceeded")
    browser = site.browser()
    response = browser.send("/ask", prompt="keep <this>")
    assert response.status_code == 400
    assert "the context holds 512" in response.text
    assert "keep &lt;this&gt;</textarea>" in response.text


def test_suggestions_leave_out_what_was_answered(site):
    browser = site.browser()

    def suggested():
        return [value for form in browser.page.forms for name, value in form["buttons"] if name == "prompt"]

    first = suggested()
    assert len(set(first)) == 3
    browser.send("/ask", prompt=first[0])
    browser.send("/choose", verdict="tie")
    assert first[0] not in suggested()
    browser.get("/?more=1")
    assert not set(suggested()) & set(first)
    for odd in ("-1", "1e9", "9" * 99, "²", "<b>"):
        assert browser.get("/", params={"more": odd}).status_code == 200


def test_a_new_adapter_is_announced_until_the_next_choice(site):
    site.asked().send("/choose", verdict="left")
    site.access.weights = "e" * 64
    browser = site.asked()
    assert "Your assistant was updated" in browser.response.text
    assert "since it was trained: 0" in browser.response.text
    browser.send("/choose", verdict="left")
    assert "Your assistant was updated" not in browser.response.text
    assert "since it was trained: 1" in browser.response.text
    assert site.ledger.choices()[-1].left_by == "e" * 64
    site.policy_filter = PolicyFilter(redirect=lambda _: "Ask a doctor.")
    site.restart()
    browser = site.asked()
    browser.send("/choose", verdict="tie")
    assert site.ledger.choices()[-1].left_by == "policy"
    assert "Your assistant was updated" not in browser.response.text


def test_wishes_become_the_users_document(site):
    browser = site.browser()
    browser.get("/wishes")
    wishes = {"max_words": "40", "tone": "warm", "language": "de", "avoid": " war,, sports "}
    browser.send("/wishes", **wishes)
    assert "Your wishes are saved" in browser.response.text
    merged = Policy.read([*DOCUMENTS, document_file(site.run, "Ada")])
    mine = [rule for rule in merged.for_user("Ada").preferences if rule.user_id == "Ada"]
    assert {(rule.wish.name, rule.wish.value) for rule in mine} == {
        ("max_words", 40), ("tone", "warm"), ("language", "de"), ("avoid", "war, sports")
    }  # fmt: skip
    assert not [rule for rule in merged.for_user("Bob").preferences if rule.user_id == "Ada"]
    assert 'value="war, sports"' in browser.get("/wishes").text
    browser.send("/wishes", **dict.fromkeys(wishes, ""))
    assert "max_words: 40" not in document_file(site.run, "Ada").read_text()


def test_a_wish_that_a_requirement_overrules_is_explained(site):
    browser = site.browser()
    browser.get("/wishes")
    page = browser.send("/wishes", min_words="500").text
    assert "Example Helpdesk requires `max_words: 120`" in page
    assert "a requirement overrides a user&#39;s wish" in page


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"max_words": "few"}, "max words: expected a whole number, got `few`"),
        ({"max_words": "0"}, "max words: must be"),
        ({"max_words": "9" * 5_000}, "max words: expected a whole number"),
        ({"language": "English"}, "language: does not match the pattern"),
        ({"avoid": ","}, "avoid: expected at least one"),
        ({"tone": "\u200b"}, "tone: must have a visible character"),
    ],
)
def test_a_malformed_wish_is_explained_and_not_saved(site, wish, words):
    browser = site.browser()
    browser.get("/wishes")
    response = browser.send("/wishes", **wish)
    assert response.status_code == 400
    assert "Nothing was saved" in response.text
    assert words in browser.page.text
    assert not document_file(site.run, "Ada").exists()


def test_wishes_about_fixed_aspects_are_not_offered_and_not_taken(site, tmp_path):
    one = yaml.safe_load(find(DOCUMENTS[0]).read_text())
    one["aspects"] = {"fixed": ["facts", "tone"], "personalisable": ["length"]}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(one))
    desk = WishDesk(site.run, (tmp_path / "one.yaml",), Policy.read([tmp_path / "one.yaml"]))
    assert desk.offered == ["max_words", "min_words"]
    for name, value in (("tone", "warm"), ("language", "de"), ("avoid", ["war"])):
        [sentence] = desk.faults("Ada", {name: value})
        assert "may not be tailored" in sentence
        assert "personalisable: length" in sentence
    assert desk.faults("Ada", {"max_words": 3}) == []


@pytest.mark.parametrize("user", ["../../etc", "a: b\n- c", "'\"", "\u2028", "true"])
def test_a_document_names_its_user_whatever_the_name(site, user):
    browser = site.browser(user)
    browser.get("/wishes")
    browser.send("/wishes", tone=": {[}]\n- '\"")
    assert document_file(site.run, user).parent == site.run / "state/wishes"
    [rule] = [
        one for one in Policy.read([*DOCUMENTS, document_file(site.run, user)]).preferences if one.user_id == user
    ]
    assert rule.wish.value == ": {[}]\n- '\""


# Hostile texts, forms and links


def test_the_page_of_data_says_how_long_the_link_opens_it(site):
    browser = site.browser()
    [link] = [json.loads(line) for line in (site.run / LINKS).read_text().splitlines()]
    assert f"until {link['expires'][:10]}." in browser.get("/data").text


def test_hostile_texts_are_shown_as_data(site):
    site.writer.text = HOSTILE + "x" * 100_000
    browser = site.asked("<i>user</i>\u202e", prompt=HOSTILE.replace("\0", "").replace("\x1b", ""))
    page = browser.response.text
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "<i>user" not in page
    assert "\0" not in page
    assert "\x1b" not in page
    assert "\u202e</bdi>" not in page  # a name cannot turn the page around
    assert "{{ 7*7 }}" in page
    assert page.count('dir="auto"') >= 3
    browser.send("/choose", verdict="both_bad", reason="<script>" + "r" * 5_000)
    [choice] = site.ledger.choices()
    assert choice.left == site.writer.text
    assert len(choice.reason) == 1_000
    assert not [line for line in site.log if "script" in line]
    browser.send("/undo")
    [kept] = json.loads(browser.get("/choices.json").text)["choices"]
    assert kept["left"] == site.writer.text
    assert kept["undone_at"]


def test_every_response_forbids_scripts_frames_and_copies(site):
    browser = site.asked()
    paths = ("/", "/data", "/choices.json", "/static/collect.js", "/static/../collect.py", "/nowhere", "/enter/x")
    for path in paths:
        headers = browser.get(path).headers
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["form-action"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert "no-store" in headers["cache-control"]
        assert headers["referrer-policy"] == "same-origin"
        assert headers["x-content-type-options"] == "nosniff"


def test_pages_have_no_inline_script_or_style(site):
    for name in ("welcome", "prompt", "comparison", "data", "paused", "delete", "wishes"):
        browser = site.browser(f"a user of {name}", consent=name != "welcome")
        if name in ("comparison", "paused"):
            browser.send("/ask", prompt="p")
        if name == "paused":
            browser.send("/pause")
        if name in ("data", "delete"):
            browser.get("/data")
        if name == "delete":
            browser.send("/delete")
        if name == "wishes":
            browser.get("/wishes")
        page = browser.response.text
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! src)", page), name
        assert '<html lang="en">' in page
        assert page.count("<main") == page.count("<h1") == 1, name


def test_a_cookie_is_out_of_reach_of_scripts_and_other_sites(site):
    link = site.link()

    async def enter():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(site.app), base_url="http://here") as client:
            return await client.get(link)

    cookie = asyncio.run(enter()).headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie


def test_no_page_opens_without_a_link_that_holds(site):
    browser = Browser(site.app)
    token = site.link().removeprefix("/enter/")
    for wrong in ("", "x", token[:-1], token + "x", token.upper(), "é", "." + token.partition(".")[2]):
        browser.cookies = httpx.Cookies({site_cookie(site): wrong.encode("ascii", "ignore").decode()})
        for path in ("/", "/data", "/choices.json"):
            assert browser.get(path).status_code == 401, wrong
        assert browser.request("POST", "/delete", data={"sure": "yes"}).status_code == 401
    assert site.ledger.choices() == []


def site_cookie(site) -> str:
    return f"collect-{pseudonym(str(site.run.resolve()))[:8]}"


def test_an_expired_link_opens_nothing_and_loses_nothing(site):
    site.asked().send("/choose", verdict="left")
    browser = Browser(site.app)
    browser.get(site.link(days=-1.0))
    assert browser.response.status_code == 401
    assert "has expired" in browser.response.text
    assert len(site.ledger.choices()) == 1


def test_a_link_whose_row_is_removed_opens_nothing(site):
    browser = site.asked()
    (site.run / LINKS).write_text("")
    assert browser.get("/").status_code == 401


@pytest.mark.parametrize("path", ["/choose", "/ask", "/undo", "/skip", "/pause", "/consent", "/delete", "/wishes"])
def test_a_form_needs_the_sessions_token_and_this_site(site, path):
    mallory = site.asked("Mallory")
    browser = site.asked()
    fields = {"verdict": "left", "prompt": "p", "scope": "shared", "sure": "yes"}
    fields["comparison"] = site.open.of("Ada").id
    theirs = mallory.form("/skip")["form_token"]
    own = browser.form("/skip")["form_token"]
    for token in (None, "", theirs, own[:-1], "é"):
        form = fields | ({} if token is None else {"form_token": token})
        assert browser.request("POST", path, data=form).status_code == 403
    form = fields | {"form_token": own}
    for origin in ("http://evil.example", "null", "http://here.evil.example", "https://here:444"):
        assert browser.request("POST", path, data=form, headers={"Origin": origin}).status_code == 403
    assert browser.get(path).status_code == (200 if path == "/wishes" else 405)
    assert site.ledger.choices() == []
    assert site.ledger.consent("Ada") == "own"
    assert site.open.of("Ada").id == fields["comparison"]


@pytest.mark.parametrize("address", ["http://feedback.example", "http://Feedback.example:80/"])
def test_a_form_may_come_from_the_address_that_a_proxy_serves(site, address):
    site.settings = CollectSettings(3, address)
    site.restart()
    browser = site.browser()
    browser.get("/data")
    form = browser.form("/consent")
    origins = {"http://feedback.example": 200, "http://here": 200, "http://evil.example": 403, "null": 403, "": 403}
    for origin, status in origins.items():
        response = browser.request("POST", "/consent", data=form, headers={"Origin": origin})
        assert response.status_code == status, origin


def test_a_link_of_another_user_replaces_no_open_session_by_itself(site):
    ada, link = site.asked(), site.link("Mallory")
    page = ada.get(link)
    assert "Open another user" in page.text
    assert "Ada" in page.text
    form = ada.form("/enter")
    assert ada.get("/choices.json").status_code == 200
    assert "Which answer do you like better?" in ada.get("/").text  # it is still Ada's page
    for wrong in (form | {"form_token": ""}, form | {"token": "x"}):
        assert ada.request("POST", "/enter", data=wrong).status_code in (401, 403)
    assert ada.request("POST", "/enter", data=form, headers={"Origin": "http://evil.example"}).status_code == 403
    assert "Ada" in ada.get("/").text
    assert "Mallory" in ada.request("POST", "/enter", data=form).text
    assert "Mallory" in ada.get(site.link("Mallory")).text  # another link of the same user


def test_another_users_pair_cannot_be_chosen_skipped_or_undone(site):
    ada, mallory = site.asked(), site.asked("Mallory")
    mallory.send("/choose", verdict="left", comparison=site.open.of("Ada").id)
    assert site.ledger.choices() == []
    mallory.get("/")
    mallory.send("/skip", comparison=site.open.of("Ada").id)
    assert site.open.of("Ada") is not None
    ada.send("/choose", verdict="left")
    choice = site.ledger.choices()[0]
    mallory.get("/")
    mallory.send("/choose", verdict="tie")
    mallory.send("/undo", choice=choice.id)
    assert choice in site.ledger.choices()
    assert "nothing to undo" in mallory.response.text


def test_bodies_of_other_kinds_and_sizes_are_refused(site):
    browser = site.asked()
    token = browser.form("/skip")["form_token"]
    kind = {"Content-Type": "application/x-www-form-urlencoded"}

    def status(content, headers=kind):
        return browser.request("POST", "/ask", content=content, headers=headers).status_code

    assert status(urlencode({"form_token": token, "prompt": "p" * (1 << 19)})) == 413
    assert status(b"form_token=%ff&prompt=%fe") == 400
    assert status("prompt=é".encode()) == 400
    assert status("&".join(f"a{n}=1" for n in range(99))) == 400
    assert status(json.dumps({"form_token": token, "prompt": "p"}), {"Content-Type": "application/json"}) == 415
    assert status(b"", {}) == 415
    assert len(site.writer.requests) == 3


def test_a_user_can_only_do_so_much_in_a_minute(site):
    site.restart(LIMITS._replace(rate=5))
    browser = site.browser()
    codes = [browser.get("/").status_code for _ in range(8)]
    assert codes[-1] == 429
    assert browser.response.headers["retry-after"]
    assert site.browser("Bob").get("/").status_code == 200


@pytest.mark.parametrize("user", ["../../etc", "a/b", "CON", "\U0001f600" * 128, "Ann", "ann", "a\nb"])
def test_strange_names_stay_apart_and_inside_the_run(site, user):
    site.asked(user).send("/choose", verdict="left")
    site.asked("Ada").send("/choose", verdict="tie")
    assert [choice.verdict for choice in site.ledger.choices(user)] == ["left"]
    assert [path.name for path in site.run.parent.iterdir()] == ["run"]


# Faults and deletions


def test_a_choice_that_cannot_be_saved_is_not_called_saved(site, monkeypatch):
    browser = site.asked()
    form = browser.form("/choose") | {"verdict": "left"}

    def full(_):
        raise OSError(28, "No space left on device: secret text")

    monkeypatch.setattr(site.ledger, "append", full)
    response = browser.request("POST", "/choose", data=form)
    assert response.status_code == 500
    assert "nothing was saved" in response.text
    assert site.log == [line for line in site.log if "secret text" not in line]
    monkeypatch.undo()
    assert "Saved." in browser.request("POST", "/choose", data=form).text
    assert len(site.ledger.choices()) == 1


def test_a_fault_is_logged_by_type_and_place_alone(site):
    site.writer.fault = RuntimeError("a private text")
    response = site.browser().send("/ask", prompt="another private text")
    assert response.status_code == 500
    [line] = site.log
    assert line.startswith("Internal fault: RuntimeError at test_collect.py:")
    assert "private" not in line


def test_a_deletion_asks_once_more_and_leaves_nothing(site):
    browser = site.asked(prompt="CANARY")
    browser.send("/choose", verdict="left", reason="CANARY")
    browser.get("/wishes")
    browser.send("/wishes", tone="CANARY")
    site.asked("Bob").send("/choose", verdict="left")
    browser.get("/data")
    browser.send("/delete")
    assert "cannot be brought back" in browser.response.text
    assert len(site.ledger.choices("Ada")) == 1
    browser.send("/delete")
    assert "Your choices are deleted" in browser.response.text
    assert "persona-rlhf forget" in browser.response.text
    assert site.ledger.choices("Ada") == []
    assert len(site.ledger.choices("Bob")) == 1
    assert not any(b"CANARY" in file.read_bytes() for file in site.run.rglob("*") if file.is_file())
    assert browser.get("/").status_code == 401
    assert "Ada" not in (site.run / LINKS).read_text()
    assert (site.run / LINKS).stat().st_mode & 0o777 == 0o600
    assert json.loads((site.run / DELETIONS).read_text())["user_id"] == "Ada"
    assert any("forget RUN --user 'Ada'" in line for line in site.log)


def test_a_deletion_reaches_every_ledger_of_the_run_that_can_be_read(site, tmp_path):
    for name in ("other.db", "gone.db"):
        note_place(site.run, "ledger", tmp_path / name)
    other = ChoiceLedger(tmp_path / "other.db")
    for user in ("Ada", "Bob"):
        add(other, choice(1, user, prompt=f"of {user}"))
    browser = site.browser()
    browser.get("/data")
    browser.send("/delete")
    browser.send("/delete")
    assert "Your choices are deleted" in browser.response.text
    assert [one.user_id for one in other.choices()] == ["Bob"]
    other.close()
    assert not any(b"of Ada" in file.read_bytes() for file in tmp_path.glob("other.db*"))
    assert not (tmp_path / "gone.db").exists()


@pytest.mark.parametrize("form", ["/choose", "/wishes", "/consent"])
def test_a_form_under_way_is_not_saved_after_a_deletion_in_another_tab(site, monkeypatch, form):
    browser, other = site.asked(prompt="CANARY"), site.browser()
    if form != "/choose":
        browser.get({"/wishes": "/wishes", "/consent": "/data"}[form])
    other.get("/data")
    other.send("/delete")

    def after_a_deletion(act):
        def late(*arguments):
            sending = threading.Thread(target=other.send, args=("/delete",))
            sending.start()
            sending.join()
            return act(*arguments)

        return late

    if form == "/choose":
        monkeypatch.setattr(site.ledger, "append", after_a_deletion(site.ledger.append))
    else:
        monkeypatch.setattr(FeedbackPages, "_while_linked", after_a_deletion(FeedbackPages._while_linked))
    response = browser.send(form, verdict="left", reason="CANARY", tone="CANARY")
    assert response.status_code == (503 if form == "/choose" else 401)
    assert "Your choices are deleted" in other.response.text
    assert site.ledger.everything("Ada") == {"choices": [], "consents": [], "updates": []}
    assert not any(b"CANARY" in file.read_bytes() for file in site.run.rglob("*") if file.is_file())


def test_a_forgotten_user_saves_nothing_more(site):
    browser = site.asked()
    (site.run / "forgotten").mkdir()
    (site.run / f"forgotten/{pseudonym('Ada')}.pending").write_text("{}")
    response = browser.send("/choose", verdict="left")
    assert response.status_code == 503
    assert site.ledger.choices() == []
    site.asked("Bob")
    assert site.open.of("Ada") is None  # dropped from memory


def test_a_ledger_that_is_in_use_keeps_the_deletion_wish(site, monkeypatch):
    def in_use(_):
        raise InputError([Problem("choices.db", None, None, "another program reads this ledger")])

    browser = site.asked()
    browser.send("/choose", verdict="left")
    monkeypatch.setattr(site.ledger, "erase", in_use)
    browser.get("/data")
    browser.send("/delete")
    form = browser.form("/delete")
    assert browser.send("/delete").status_code == 503
    assert (site.run / DELETIONS).exists()
    monkeypatch.undo()
    assert "Your choices are deleted" in browser.request("POST", "/delete", data=form).text  # the link still opens
    assert site.ledger.choices() == []


def test_static_files_are_those_of_the_page_alone(site):
    browser = Browser(site.app)
    for name in ("collect.css", "collect.js", "collect.svg"):
        assert browser.get(f"/static/{name}").status_code == 200
    for name in ("..%2fcollect.py", "collect_base.html.j2", "%2e%2e/collect.py", ""):
        assert browser.get(f"/static/{name}").status_code in (401, 404), name
    assert STATIC.keys() == {"collect.css", "collect.js", "collect.svg"}
