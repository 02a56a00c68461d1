"""The pages that people read, in a real Chromium: accessible, no wider than a phone, and whole in print."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from persona_rlhf.release.approval_packet import write_packet
from persona_rlhf.release.impact_report import write_impact
from persona_rlhf.release.report import write_report
from persona_rlhf.release.run_comparison import compare_runs
from tests.browser import MARKS, chromium  # noqa: F401 - the fixture
from tests.release.test_impact_report import measures

pytestmark = MARKS
PHONE = {"width": 360, "height": 740}
SHEET = {"width": 718, "height": 1047}  # A4 less two centimetres, at 96 dots an inch
PAGES = ("report", "impact", "packet", "comparison")


@pytest.fixture
def pages(run, tmp_path):
    """The files by name; the report has a section on impact."""
    impact = write_impact(run.path, measures(), 6, 6)
    report = write_report(run.path)
    packet, comparison = tmp_path / "packet.html", tmp_path / "comparison.html"
    write_packet(run.path, packet, None, "Officer")
    compare_runs(run.path, run.path, comparison)
    return dict(zip(PAGES, (report, impact, packet, comparison), strict=True))


@pytest.fixture
def open_page(chromium, pages):
    """Opens a page by its name; at the end, no page has asked for another address."""
    requests, contexts = [], []

    def open_page(name, **options):
        context = chromium.new_context(bypass_csp=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.goto(pages[name].as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert {address.partition(":")[0] for address in requests} <= {"file"}


def too_wide(page) -> list[str]:
    """Elements that stand out of the page at the side, unless a table scrolls in its region."""
    return page.evaluate(
        """() => [...document.querySelectorAll("main *, header *")].filter(one => !one.closest("svg") &&
            !one.closest(".wide") && one.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
            .map(one => one.outerHTML.slice(0, 80))"""
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing_on_a_phone(open_page, name, scheme):
    axe = pytest.importorskip("axe_core_python.sync_playwright", reason="axe-core-python is not installed").Axe()
    page = open_page(name, viewport=PHONE, color_scheme=scheme)
    assert not [(fault["id"], fault["nodes"][0]["html"]) for fault in axe.run(page)["violations"]]


@pytest.mark.parametrize("name", PAGES)
def test_it_fits_a_phone_and_a_sheet_of_paper_in_greys(open_page, name):
    page = open_page(name, viewport=PHONE)
    assert not too_wide(page)
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    page.set_viewport_size(SHEET)
    page.emulate_media(media="print", color_scheme="dark")
    assert not too_wide(page)
    cut = page.evaluate(
        """() => [...document.querySelectorAll(".wide")].filter(one => one.scrollWidth > one.clientWidth + 1)
            .map(one => one.textContent.trim().slice(0, 60))"""
    )
    assert not cut, "a sheet does not scroll"
    coloured = page.evaluate(
        """() => [...document.querySelectorAll("main *, header *")].map(one => getComputedStyle(one).color)
            .filter(color => { const [r, g, b] = color.match(/\\d+/g); return r !== g || g !== b; })"""
    )
    assert not coloured
    assert page.pdf(format="A4").startswith(b"%PDF")
    if folder := os.environ.get("PERSONA_RLHF_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}-print.png", full_page=True)
        page.emulate_media(media="screen", color_scheme="light")
        page.set_viewport_size(PHONE)
        page.screenshot(path=Path(folder) / f"{name}-phone.png")
        page.set_viewport_size({"width": 1200, "height": 900})
        page.screenshot(path=Path(folder) / f"{name}-wide.png")
