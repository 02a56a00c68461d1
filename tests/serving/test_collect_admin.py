"""The operator's page: numbers of all users, updates with their causes, a token of its own, and nobody's texts."""

from __future__ import annotations

import re

import pytest

from persona_rlhf.data.choice_ledger import CHOICES, FAULT, SAFETY, ChoiceLedger
from persona_rlhf.data.collected_users import collected_users
from persona_rlhf.serving.collect_admin import CAUSES, AdminPage, UserUpdate, user_updates
from persona_rlhf.serving.collect_views import CSP
from tests.data.test_choice_ledger import add, choice
from tests.serving.collect_browser import Browser

HOSTILE = '<script>alert(1)</script>\u202e\x1b[2J"'
SECRETS = ("prompt 0", "left 0", "right 0", "a reason", "more.jsonl")


class Desk:
    """The operator's page of a ledger; `trained` has the ids of trained pairs."""

    def __init__(self, run):
        (run / "state").mkdir(parents=True)
        self.run, self.ledger, self.trained, self.log = run, ChoiceLedger(run / CHOICES), set(), []

    def page(self, wanted=3, automatic=True) -> AdminPage:
        return AdminPage(self.users, self.ledger.updates, wanted, automatic, self.log.append)

    def users(self):
        return collected_users(self.run, self.ledger, self.trained)

    def entered(self, **options) -> Browser:
        page = self.page(**options)
        browser = Browser(page.app())
        browser.get(f"/enter/{page.token}")
        return browser

    def fill(self, user, verdicts):
        for number, verdict in enumerate(verdicts):
            add(self.ledger, choice(number, user, verdict, reason="a reason"))


@pytest.fixture
def desk(tmp_path):
    desk = Desk(tmp_path / "run")
    yield desk
    desk.ledger.close()


def words(browser) -> str:
    return re.sub(r"\s+", " ", browser.page.text)


def test_users_pairs_and_agreement_are_counted_over_all_users(desk):
    desk.fill("Ada", ("left", "tie", "right"))
    desk.fill("Bob", ("both_bad", "left"))
    for number, verdict in enumerate(("left", "right", "left"), 7):  # the pair of `Ada 0` again, as shown or swapped
        texts = ("left 0", "right 0") if number < 9 else ("right 0", "left 0")
        add(desk.ledger, choice(number, "Ada", verdict, prompt="prompt 0", left=texts[0], right=texts[1]))
    desk.ledger.undo("Bob 1", "Bob")
    text = words(desk.entered())
    for figure in ("Users2", "Choices7", "Pairs with a better answer5", "Undone1", "alike 2 of 3"):
        assert figure in text, text
    assert "0.67 (95%: 0.21 to 0.94)" in text  # Wilson's interval of 2 of 3, by hand


def test_without_choices_it_says_so(desk):
    text = words(desk.entered())
    assert "Nobody has chosen yet." in text
    assert "none came twice" in text
    assert "None waits, none runs, and none has ended." in text


def test_updates_come_with_their_state_and_cause(desk):
    for user in ("trains", "unsafe", "broken", "waits", "done", "few"):
        desk.fill(user, ("left", "right", "left") if user != "few" else ("left",))
    desk.trained = {f"{user} {number}" for user in ("done", "unsafe") for number in range(3)}
    desk.ledger.record_update("trains", "begun", "base", 3, "more.jsonl")
    desk.ledger.record_update("unsafe", "not_released", "base", 3, SAFETY)
    desk.ledger.record_update("broken", "failed", "base", 3, FAULT)
    desk.ledger.record_update("done", "released", "a" * 64, 3)
    desk.ledger.record_update("done", "restored", "base")
    found = [(one.user_id, one.state, one.cause) for one in user_updates(desk.users(), desk.ledger.updates(), wanted=3)]
    assert found == [
        ("trains", "training", ""),
        ("unsafe", "failed", CAUSES[SAFETY]),
        ("broken", "failed", CAUSES[FAULT]),
        ("waits", "waiting", ""),
        ("done", "released", ""),
    ]
    text = words(desk.entered())
    assert "In training: trains" in text
    assert f"No new adapter: broken, {CAUSES[FAULT]}" in text
    assert "Interrupted: trains" in words(desk.entered(automatic=False))


@pytest.mark.parametrize(("choices", "state"), [(5, "failed"), (6, "waiting")])
def test_a_failed_update_waits_again_after_as_many_new_choices(desk, choices, state):
    desk.fill("Ada", ["left"] * choices)
    failed = desk.ledger.record_update("Ada", "failed", "base", 3, FAULT)
    [update] = user_updates(desk.users(), desk.ledger.updates(), wanted=3)
    assert update.state == state
    assert state == "waiting" or update == UserUpdate("Ada", "failed", failed.at, CAUSES[FAULT])


def test_nobodys_text_is_on_it_and_names_are_data(desk):
    desk.fill(HOSTILE, ("left", "right"))
    desk.ledger.record_update(HOSTILE, "begun", "base", 2, "more.jsonl")
    page = desk.entered().response.text
    assert not [secret for secret in SECRETS if secret in page]
    assert "<script>alert" not in page
    assert not {"\x1b", "\u202e"} & set(page)
    assert "&lt;script&gt;alert(1)" in page


def test_it_opens_by_its_own_token_alone(desk):
    desk.fill("Ada", ("left",))
    page = desk.page()
    for path in ("/", "/enter/x", f"/enter/{desk.page().token}", "/enter/\u00e4"):
        browser = Browser(page.app())
        assert browser.get(path).status_code == 401, path
        assert "Ada" not in browser.response.text
        assert "operator's link" in browser.page.text
    browser = Browser(page.app())
    assert browser.get(f"/enter/{page.token}").status_code == 200
    assert page.token not in browser.response.text
    assert str(browser.response.url).endswith("here/")
    [cookie] = browser.cookies.jar
    assert (cookie.has_nonstandard_attr("HttpOnly"), cookie.get_nonstandard_attr("SameSite")) == (True, "strict")
    assert browser.response.headers["Content-Security-Policy"] == CSP
    assert browser.request("POST", "/").status_code == 405
    assert desk.log == []


def test_a_fault_is_a_page_and_a_line_without_texts(desk, monkeypatch):
    page = desk.page()

    def broken():
        raise ValueError("prompt 0")

    monkeypatch.setattr(page, "_users", broken)
    browser = Browser(page.app())
    assert browser.get(f"/enter/{page.token}").status_code == 500
    assert "prompt 0" not in browser.response.text + "".join(desk.log)
    assert desk.log[0].startswith("Internal fault: ValueError at test_collect_admin.py")
