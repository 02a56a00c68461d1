"""The sentences of a Markdown page, and how long they are."""

from __future__ import annotations

import re
from typing import NamedTuple

MOST_WORDS = 25
"""A sentence of more words is long."""

_FENCE = re.compile(r"\s*(`{3,}|~{3,})")
_SKIPPED = re.compile(r"\s*(#{1,6}\s|\||!!!|\?\?\?|\[[^\]]+\]:\s|(-{3,}|={3,}|\*{3,})\s*$)")
_ITEM = re.compile(r"\s*([-*+]|\d+[.)])\s+")
_NO_END = re.compile(r"(?:^|[\s(])(?:e\.g|i\.e|etc|vs|cf|al|approx|resp|fig|eq|sec|no|dr|st|[A-Z])\.$", re.IGNORECASE)
_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")


class Length(NamedTuple):
    """Mean words a sentence, and the sentences over `MOST_WORDS`."""

    sentences: int
    mean: float
    long: list[str]


def sentences(page: str) -> list[str]:
    """Every sentence of the prose of a page.

    Front matter, code, headings, tables, comments and rules are no prose. A blank line, a list item and a skipped line
    end a sentence. A code span counts as one word, a link as its text.
    """
    return [sentence for paragraph in _paragraphs(page) for sentence in _split(_plain(paragraph))]


def words(sentence: str) -> int:
    """The words of a sentence; a lone sign is none."""
    return sum(any(sign.isalnum() for sign in word) for word in sentence.split())


def length(page: str) -> Length:
    """The lengths of the sentences of a page; labels of fewer than four words are no sentences."""
    counted = [(sentence, words(sentence)) for sentence in sentences(page)]
    counted = [(sentence, count) for sentence, count in counted if count >= 4]
    mean = sum(count for _, count in counted) / max(len(counted), 1)
    return Length(len(counted), mean, [sentence for sentence, count in counted if count > MOST_WORDS])


def _paragraphs(page: str) -> list[str]:
    """Blocks of prose, each one list item or paragraph, on one line."""
    page = re.sub(r"\A---\n.*?\n---\n", "", page, flags=re.DOTALL)
    page = re.sub(r"<!--.*?-->", "", page, flags=re.DOTALL)
    blocks: list[list[str]] = [[]]
    fence, listed, blank = "", False, True
    for line in page.splitlines():
        line = re.sub(r"^\s*>\s?", "", line)
        mark = _FENCE.match(line)
        if fence or mark:
            fence = _next_fence(fence, mark, line)
            blocks.append([])
            continue
        code = line.startswith(("    ", "\t")) and blank and not listed
        if not line.strip() or _SKIPPED.match(line) or code:
            if re.match(r"\s*(=+|-+)\s*$", line):
                blocks.pop()  # what a line of = or - underlines is a heading
            blocks.append([])
            listed = (listed and not line.strip()) or line.startswith(("!!!", "???"))
            blank = blank if code else not line.strip()
            continue
        item = _ITEM.match(line)
        if item:
            blocks.append([])
        listed = bool(item) or (listed and (not blank or line.startswith(" ")))
        blocks[-1].append(line[item.end() :] if item else line.strip())
        blank = False
    return [" ".join(block) for block in blocks if block]


def _next_fence(fence: str, mark: re.Match[str] | None, line: str) -> str:
    """The mark that ends the code in which the next line stands; empty outside code."""
    if not fence:
        return mark[1] if mark else ""
    closes = mark is not None and mark[1].startswith(fence) and not line.strip().strip(fence[0])
    return "" if closes else fence


def _plain(paragraph: str) -> str:
    """A paragraph without its markup."""
    text = re.sub(r"(`+)(.+?)\1", "Code", paragraph)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])", r"\1", text)
    text = re.sub(r"<[a-zA-Z/][^>]*>", "", text)
    return re.sub(r"\*+|(?<!\w)_+|_+(?!\w)", "", text).strip()


def _split(text: str) -> list[str]:
    """The sentences of one paragraph without markup."""
    found, begin = [], 0
    for end in _END.finditer(text):
        before, after = text[begin : end.start() + 1], text[end.end() :].lstrip()
        if _NO_END.search(before) or (before.endswith("...") and after[:1].islower()):
            continue
        found.append(text[begin : end.end()].strip())
        begin = end.end()
    return [sentence for sentence in [*found, text[begin:].strip()] if words(sentence)]
