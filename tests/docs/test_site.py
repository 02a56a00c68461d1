"""The documentation site builds without warnings and without the network; its pages fetch nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import persona_rlhf as pr
from tests.docs.pages import DOCS, ROOT

_BUILD = """
import socket

def refuse(*_):
    raise OSError("the build asked for the network")

socket.socket.connect = socket.getaddrinfo = refuse

from mkdocs.__main__ import cli
cli()
"""


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Runs `mkdocs build --strict` in a process that cannot open a connection."""
    words = ["build", "--strict", "--config-file", str(config), "--site-dir", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        [sys.executable, "-c", _BUILD, *words], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_built(site):
    built = {page.relative_to(site).with_suffix("").as_posix() for page in site.rglob("*.html")}
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")}
    assert built - {"404"} == {page.replace("README", "index") for page in pages}


def test_every_public_name_is_documented(site):
    text = (site / "reference/python-api.html").read_text(encoding="utf-8")
    for name in pr.__all__:
        assert f'id="persona_rlhf.{pr._HOMES[name]}"' in text


def test_lists_and_tables_are_rendered(site):
    """Python-Markdown wants an empty line before a list or a table; GitHub does not."""
    assert not {page: lines for page in site.rglob("*.html") if (lines := unrendered(page.read_text(encoding="utf-8")))}


def unrendered(page: str) -> list[str]:
    """Lines of paragraphs that still begin with the mark of a list, a table, a heading or a block of code."""
    prose = re.sub(r"<(pre|script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    texts = [re.sub(r"<[^>]+>", "", text) for _, text in re.findall(r"<(p|li|td)>(.*?)</\1>", prose, re.DOTALL)]
    lines = [line for text in texts for line in text.splitlines()]
    return [line for line in lines if re.match(r"\s*([-*+] |\|.*\|\s*$|\d+\. |```|#+ )", line)]


def test_a_table_inside_a_paragraph_would_be_noticed():
    assert unrendered("<p>A text:\n| a | b |</p>") == ["| a | b |"]
    assert unrendered("<li>A text:\n- an item</li>") == ["- an item"]
    assert not unrendered("<p>1.5 is - a number | of sorts</p><pre>- code</pre>")


def test_a_page_fetches_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        assert not fetched(page.read_text(encoding="utf-8")), page
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*[\"']?https?:", sheet.read_text(encoding="utf-8")), sheet


def fetched(page: str) -> list[str]:
    """Tags that make a browser ask another host. The theme's script fetches mermaid where a page has a diagram."""
    tags = re.findall(r"<(?:script|link|img|iframe|source|object|embed)\b[^>]*>", page)
    return [tag for tag in tags if re.search(r"(?:src|href|data)=[\"']?(?:https?:)?//", tag)] + re.findall(
        r"<pre class=\"mermaid\"|class=\"mermaid\"", page
    )


def test_a_tag_that_fetches_would_be_noticed():
    assert fetched('<script src="https://cdn.example/x.js"></script>')
    assert fetched('<link rel="preconnect" href="//fonts.example">')
    assert fetched('<pre class="mermaid">')
    assert not fetched('<link rel="stylesheet" href="assets/x.css"><a href="https://example.org">x</a>')


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[a](nowhere.md)", "'nowhere.md'"),
        ("[a](other.md#nowhere)", "#nowhere"),
        ("[a](/other.md)", "absolute link"),
        ("::: persona_rlhf.nowhere", "persona_rlhf.nowhere"),
    ],
)
def test_a_broken_link_fails_the_build(tmp_path, text, fault):
    pages = tmp_path / "docs"
    pages.mkdir()
    (pages / "index.md").write_text(f"# Home\n\n{text}\n", encoding="utf-8")
    (pages / "other.md").write_text("# Other\n", encoding="utf-8")
    config = tmp_path / "mkdocs.yml"
    nav = "[{Home: index.md}, {Other: other.md}]"
    config.write_text(f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: {pages}\nnav: {nav}\n", encoding="utf-8")
    done = build(config, tmp_path / "site")
    assert done.returncode != 0
    assert fault in done.stderr
