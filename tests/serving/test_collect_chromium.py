"""The feedback page in a real Chromium: by keyboard, by mouse, without JavaScript, on a phone."""

from __future__ import annotations

from itertools import count

import pytest

from persona_rlhf.data.choice_ledger import SAFETY
from persona_rlhf.release.earlier_adapters import EarlierAdapter
from persona_rlhf.serving import collect, collect_progress
from persona_rlhf.serving.collect import LIMITS
from persona_rlhf.serving.collect_links import remove_links
from persona_rlhf.serving.openai_api import TextChunk, Usage
from tests.browser import MARKS, chromium  # noqa: F401 - the fixture
from tests.data.test_choice_ledger import add, choice
from tests.serving.live import live
from tests.serving.test_collect import HOSTILE, site  # noqa: F401 - a fixture
from tests.serving.test_collect_admin import Desk
from tests.serving.test_collect_stream import SlowWriter

pytestmark = MARKS
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


@pytest.fixture
def visit(chromium, site):
    """Opens a user's page: `visit(user, **options of the browser)`; at the end, no page has complained."""
    numbers = count()
    site.writer.chunks = lambda *_: iter([TextChunk(f"{HOSTILE} {next(numbers)}", "stop", Usage(1, 1))])
    site.restart(LIMITS._replace(rate=10_000))
    complaints, contexts = [], []
    with live(site.app) as port:

        def visit(user="Ada", link=None, **options):
            context = chromium.new_context(**options)
            contexts.append(context)
            page = context.new_page()
            page.on("console", lambda message: complaints.append(message.text))
            page.on("pageerror", lambda fault: complaints.append(str(fault)))
            page.on("dialog", lambda dialog: complaints.append("a script ran"))
            page.address = f"http://127.0.0.1:{port}"
            page.goto(page.address + (link or site.link(user)))
            if page.get_by_role("button", name="I agree, begin").count():
                page.get_by_role("button", name="I agree, begin").click()
                page.wait_for_selector(".suggestions")
                page.wait_for_load_state()
            return page

        yield visit
        for context in contexts:
            context.close()
    assert not [line for line in complaints if "status of 401" not in line]


def fits(page) -> bool:
    """Whether nothing stands out of the page at the side."""
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_twenty_choices_by_keyboard_with_undo_and_pause(visit, site):
    page = visit()
    for number in range(20):
        page.keyboard.press("123"[number % 3])
        page.wait_for_selector(".pair")
        page.keyboard.press(("1", "2", "3", "4", "ArrowLeft", "ArrowRight")[number % 6])
        page.wait_for_selector(".undo")
    verdicts = [choice.verdict for choice in site.ledger.choices()]
    assert verdicts == (["left", "right", "tie", "both_bad", "left", "right"] * 4)[:20]
    page.keyboard.press("u")
    page.wait_for_selector(".pair")
    assert len(site.ledger.choices()) == 19
    page.keyboard.press("p")
    page.wait_for_selector("text=Paused")
    page.keyboard.press("p")
    page.wait_for_selector(".pair")
    page.get_by_text("Say why").click()
    page.get_by_label("Your reason").fill("12 34 u p")  # keys in a field are text
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Equally good").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".undo")
    assert (site.ledger.choices()[-1].verdict, site.ledger.choices()[-1].reason) == ("tie", "12 34 u p")
    page.get_by_role("button", name="Turn the keys off").click()
    page.keyboard.press("u")
    page.keyboard.press("1")
    assert page.get_by_role("heading", name="Ask for two answers").is_visible()
    assert len(site.ledger.choices()) == 20


@pytest.mark.parametrize("options", [{}, PHONE, {"java_script_enabled": False, **PHONE}, {"color_scheme": "dark"}])
def test_twenty_choices_by_mouse_or_finger(visit, site, options):
    page = visit("Bob", **options)
    names = ("Answer 1 is better", "Answer 2 is better", "Equally good", "Both bad")
    for number in range(20):
        page.locator(".suggestions button").first.click()
        page.wait_for_selector(".pair")
        assert fits(page) or not options.get("java_script_enabled", True)
        page.get_by_role("button", name=names[number % 4]).click()
        page.wait_for_selector(".undo")
        if len(site.ledger.choices()) % 8 == 0:
            page.get_by_label("Your prompt").fill(f"prompt {number}\nmarhaban \u0645\u0631\u062d\u0628\u0627")
    assert [choice.verdict for choice in site.ledger.choices()] == ["left", "right", "tie", "both_bad"] * 5
    page.get_by_role("button", name="Undo").click()
    page.wait_for_selector(".pair")
    assert len(site.ledger.choices()) == 19


def test_a_reload_two_tabs_and_a_double_click(visit, site):
    page = visit()
    page.get_by_label("Your prompt").fill("hello")
    page.get_by_role("button", name="Write two answers").dblclick()
    page.wait_for_selector(".pair")
    shown = page.locator(".pair").inner_text()
    assert len(site.writer.requests) == 3
    page.reload()
    assert page.locator(".pair").inner_text() == shown
    tab = page.context.new_page()
    tab.goto(page.address)
    assert tab.locator(".pair").inner_text() == shown
    page.get_by_role("button", name="Answer 1 is better").dblclick()
    page.wait_for_selector(".undo")
    tab.get_by_role("button", name="Answer 2 is better").click()
    tab.wait_for_selector("text=counts once")
    assert [choice.verdict for choice in site.ledger.choices()] == ["left"]
    page.go_back()
    page.wait_for_selector("text=Ask for two answers")


def test_an_expired_link_says_so(visit, site):
    page = visit(link=site.link(days=-1.0))
    assert page.get_by_text("Your link has expired.").is_visible()
    page.get_by_role("link", name="Go on").click()
    assert page.get_by_text("opens with your personal link").is_visible()


def test_a_link_that_expires_in_the_middle_keeps_the_choices(visit, site):
    page = visit()
    page.keyboard.press("1")
    page.wait_for_selector(".pair")
    page.keyboard.press("1")
    page.wait_for_selector(".undo")
    tab = page.context.new_page()
    tab.goto(page.address)
    remove_links(site.run, "Ada")
    page.get_by_label("Your prompt").fill("hello")
    page.get_by_role("button", name="Write two answers").click()
    page.wait_for_selector("text=opens with your personal link")
    tab.get_by_role("button", name="Undo").click()
    tab.wait_for_selector("text=opens with your personal link")
    assert len(site.ledger.choices()) == 1
    page.goto(page.address + site.link())
    page.wait_for_selector("text=1 choice")


@pytest.mark.parametrize("options", [{}, {"java_script_enabled": False, **PHONE}])
def test_both_answers_grow_side_by_side_and_once_each(visit, site, options):
    slow = SlowWriter()
    page = visit(**options)
    site.writer.chunks = slow.chunks
    page.get_by_label("Your prompt").fill("hello")
    page.get_by_role("button", name="Write two answers").click(no_wait_after=True)
    page.wait_for_selector(".pair:visible:has-text('19>')")
    shown = [part for part in page.locator(".pair").all() if part.is_visible()]
    assert len(shown) == 1
    assert [answer.is_visible() for answer in shown[0].locator(".answer").all()] == [True, True]
    assert page.get_by_text("You choose when both are whole.").is_visible()
    assert page.get_by_role("button", name="Equally good").count() == 0
    slow.go.set()
    page.get_by_role("button", name="Equally good").wait_for()
    assert page.get_by_text("Both answers are whole.").is_visible()
    assert not page.get_by_text("You choose when both are whole.").is_visible()
    assert [part.is_visible() for part in page.locator(".pair").all()][-2:] == [False, True]
    if not options:
        page.keyboard.press("3")
    else:
        page.get_by_role("button", name="Equally good").click()
    page.wait_for_selector(".undo")
    assert [choice.verdict for choice in site.ledger.choices()] == ["tie"]


def test_a_reload_while_the_answers_are_written_asks_nothing_anew(visit, site):
    slow = SlowWriter()
    page = visit()
    site.writer.chunks = slow.chunks
    page.get_by_label("Your prompt").fill("hello")
    page.get_by_role("button", name="Write two answers").click(no_wait_after=True)
    page.wait_for_selector(".pair:visible:has-text('19>')")
    page.reload(wait_until="commit")
    page.wait_for_selector(".pair:visible:has-text('19>')")
    slow.go.set()
    page.get_by_role("button", name="Equally good").wait_for()
    assert len(site.writer.requests) == 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_operators_page_fits_a_phone_and_axe_finds_nothing(chromium, tmp_path, scheme):
    axe = pytest.importorskip("axe_core_python.sync_playwright", reason="axe-core-python is not installed").Axe()
    desk = Desk(tmp_path / "run")
    for user in ("Ada", "a" * 128, HOSTILE[:100]):
        desk.fill(user, ("left", "right", "tie"))
    desk.ledger.record_update("Ada", "not_released", "base", 2, SAFETY)
    admin = desk.page()
    context = chromium.new_context(color_scheme=scheme, bypass_csp=True, **PHONE)
    with live(admin.app()) as port:
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{port}/enter/{admin.token}")
        assert page.get_by_role("rowheader").count() == 3
        assert fits(page)
        assert not [(fault["id"], fault["nodes"][0]["html"]) for fault in axe.run(page)["violations"]]
        page.get_by_role("link", name="Read the numbers again").click()
        assert page.get_by_text("the gate did not release it").is_visible()
    context.close()
    desk.ledger.close()


class Changed:
    """An assistant that was updated, and the one before, in place of a run's files."""

    def __init__(self, site, monkeypatch):
        self.site, self.names, self.present = site, ["old", "new"], "new"
        site.ledger.record_consent("Ada", "own")
        site.ledger.record_update("Ada", "released", "new", 3)
        for module, name in ((collect, "change_adapter"), (collect_progress, "other_adapter")):
            monkeypatch.setattr(module, name, getattr(self, name))

    def change_adapter(self, run, ledger, user_id, adapter):
        self.present = adapter

    def other_adapter(self, run, user_id):
        return EarlierAdapter(user_id, next(name for name in self.names if name != self.present), 0, {})


@pytest.mark.parametrize("options", [{}, {"java_script_enabled": False, **PHONE}])
def test_back_to_the_assistant_before_and_forward_by_a_button(visit, site, monkeypatch, options):
    changed = Changed(site, monkeypatch)
    page = visit(**options)
    page.get_by_role("link", name="Your data").click()
    page.get_by_role("button", name="Go back to the one before").click()
    page.wait_for_selector("text=New answers come from the assistant that you chose.")
    assert changed.present == "old"
    page.get_by_role("link", name="Your data").click()
    page.get_by_role("button", name="Use the newer one again").click()
    page.wait_for_selector("text=Ask for two answers")
    assert changed.present == "new"


def test_a_deletion_asks_once_more(visit, site):
    page = visit()
    page.keyboard.press("1")
    page.wait_for_selector(".pair")
    page.keyboard.press("1")
    page.wait_for_selector(".undo")
    page.get_by_role("link", name="Your data").click()
    page.get_by_role("button", name="Delete my choices").click()
    page.get_by_role("link", name="No, keep them").click()
    page.get_by_role("button", name="Delete my choices").click()
    page.get_by_role("button", name="Yes, delete them").click()
    page.wait_for_selector("text=Your choices are deleted")
    assert site.ledger.choices() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(visit, site, scheme, monkeypatch):
    Changed(site, monkeypatch)
    add(site.ledger, choice(1))  # of another adapter than the present one, so that the page tells of an update
    axe = pytest.importorskip("axe_core_python.sync_playwright", reason="axe-core-python is not installed").Axe()
    page = visit(color_scheme=scheme, bypass_csp=True, viewport={"width": 360, "height": 740})

    def check():
        assert not [(fault["id"], fault["nodes"][0]["html"]) for fault in axe.run(page)["violations"]], page.url

    check()
    for path in ("/wishes", "/data", "/enter/x"):
        page.goto(page.address + path)
        check()
    page.goto(page.address)
    page.get_by_label("Your prompt").fill("hello")
    page.get_by_role("button", name="Write two answers").click()
    page.wait_for_selector(".pair")
    check()
