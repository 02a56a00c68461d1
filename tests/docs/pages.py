"""The pages of the documentation, each named by its path below docs/ (README.md by its name)."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GENERATED = ("reference/cli/", "reference/config.md", "reference/python-api.md")
"""Where scripts/generate_docs.py writes."""


def page_name(page: Path) -> str:
    return page.relative_to(DOCS).as_posix() if page.is_relative_to(DOCS) else page.name


PAGES = [
    ROOT / "README.md",
    *(page for page in sorted(DOCS.rglob("*.md")) if not page_name(page).startswith(GENERATED)),
]
"""Every page that a person writes."""


def blocks(page: Path, *languages: str) -> list[str]:
    """The text of the fenced blocks in these languages."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
