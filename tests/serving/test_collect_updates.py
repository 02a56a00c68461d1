"""Updates of a user's assistant on the feedback page: notices, the way back, and advice to stop."""

from __future__ import annotations

import json

import pytest

from persona_rlhf.common.files import pseudonym
from persona_rlhf.data.erasure import DataSubject
from persona_rlhf.release import earlier_adapters, integrity
from persona_rlhf.release.earlier_adapters import BASE, adapter_name, result_of, set_aside
from persona_rlhf.release.integrity import ended
from persona_rlhf.release.results import read_results
from persona_rlhf.serving.collect import CollectSettings
from persona_rlhf.serving.collect_progress import CAUSES, RECEIVED
from tests.data.test_choice_ledger import add, choice
from tests.release.conftest import base, run  # noqa: F401 - fixtures
from tests.serving.test_collect import Site, site  # noqa: F401 - a fixture

BACK = "Go back to the common model"


def test_the_page_says_when_an_update_begins_and_that_it_is_under_way(site):
    site.settings = CollectSettings(3, automatic=True)
    site.restart()
    browser = site.browser("Bob")
    assert "3 more are wanted for a first update" in browser.response.text
    for number in range(3):
        browser.send("/ask", prompt=f"prompt {number}")
        browser.send("/choose", verdict="left")
    assert "a first update, which begins by itself" in browser.response.text
    assert site.noticed == [1, 2, 3]
    site.ledger.record_update("Bob", "begun", BASE, 3, "source")
    assert "Your assistant is being trained on your choices now" in browser.get("/").text
    assert "is being trained" in browser.get("/data").text


@pytest.mark.parametrize("cause", CAUSES)
def test_an_update_that_failed_is_explained_until_the_next_choice(site, cause):
    browser = site.browser("Bob")
    add(site.ledger, choice(1, "Bob"))  # in November
    site.ledger.record_update("Bob", "begun", BASE, 3, "source")
    site.ledger.record_update("Bob", "failed" if cause == "fault" else "not_released", BASE, 3, cause)
    sentence = f"Your assistant was not updated: {CAUSES[cause]}. Answers come from the common model."
    assert sentence in browser.get("/").text
    assert f"It was not updated: {CAUSES[cause]}." in browser.get("/data").text
    add(site.ledger, choice(2, "Bob", at="2100-01-01T00:00:00Z"))
    assert "not updated" not in browser.get("/").text


@pytest.mark.parametrize("status", ["prior", "held_back", "released"])
def test_users_whose_own_adapter_is_not_released_read_what_they_receive(site, status):
    for result in site.access.results.values():
        object.__setattr__(result, "status", status)
    browser = site.browser()
    for address in ("/", "/data"):
        text = browser.get(address).text
        assert {key for key, sentence in RECEIVED.items() if sentence in text} == {status} & set(RECEIVED)
        assert ("Answers come from your own assistant." in text) == (status == "released")


def test_advice_to_stop_is_shown_and_forces_nothing(site):
    site.settings = CollectSettings(3, advice=lambda choices: len(choices) >= 2)
    site.restart()
    browser = site.browser()
    for number in range(3):
        assert ("you may stop here" in browser.response.text) == (number >= 2)
        browser.send("/ask", prompt=f"prompt {number}")
        browser.send("/choose", verdict="left")
    assert len(site.ledger.choices()) == 3


@pytest.fixture
def updated(run):
    """The pages of a run whose user Ada came from the base to an adapter."""
    integrity.append_all(run.path, [ended(result_of(run.path, "Ada"))])
    set_aside(run.path, {"Ada": None})
    made = Site(run.path)
    yield made
    made.ledger.close()


def test_back_to_the_one_before_and_forward_by_a_button(updated):
    newest = adapter_name(result_of(updated.run, "Ada"))
    browser = updated.asked()
    updated.ledger.record_update("Ada", "released", newest, 3)
    assert updated.open.of("Ada") is not None
    browser.get("/data")
    assert BACK in browser.response.text
    form = browser.form("/assistant")
    browser.send("/assistant")
    assert "New answers come from the assistant that you chose." in browser.response.text
    assert updated.open.of("Ada") is None  # it came from the other one
    assert adapter_name(result_of(updated.run, "Ada")) == BASE
    browser.request("POST", "/assistant", data=form)  # sent twice, it is done once
    browser.get("/data")
    assert "Use the newer one again" in browser.response.text
    browser.send("/assistant")
    assert adapter_name(result_of(updated.run, "Ada")) == newest
    steps = [(update.event, update.adapter) for update in updated.ledger.updates("Ada")]
    assert steps == [("released", newest), ("restored", BASE), ("restored", newest)]
    told = [entry.facts["manifest_sha256"] for entry in integrity.read(updated.run) if entry.event == "restored"]
    assert told == [None, newest]


def test_an_adapter_that_may_not_come_back_is_explained(updated):
    browser = updated.browser()
    browser.get("/data")
    browser.send("/assistant")
    lines = updated.run / "state/earlier/lines.jsonl"
    integrity.append(updated.run, integrity.RECERTIFIED, documents=[], policy_hash="x", tested=1, passed=1, looks=1)
    assert "Use the newer" not in browser.get("/data").text  # no update of the page brought it
    browser.send("/assistant")
    assert browser.response.status_code == 409
    assert "may not be used any more" in browser.response.text
    assert lines.exists()
    assert adapter_name(result_of(updated.run, "Ada")) == BASE


def test_nobody_changes_another_users_adapter_and_a_deleted_user_none(updated):
    rows = earlier_adapters.other_adapter(updated.run, "Ada")
    other = updated.browser("ada")
    form = {"form_token": other.form("/ask")["form_token"], "adapter": rows.adapter}
    before = read_results(updated.run)
    assert other.request("POST", "/assistant", data=form).status_code == 409
    browser = updated.browser()
    browser.get("/data")
    updated.ledger.erase(DataSubject(pseudonym("Ada")))
    assert browser.send("/assistant").status_code == 403
    assert read_results(updated.run) == before


def test_updates_are_taken_away_with_the_choices(updated):
    browser = updated.browser()
    browser.get("/data")
    browser.send("/assistant")
    assert [one["event"] for one in json.loads(browser.get("/choices.json").text)["updates"]] == ["restored"]
