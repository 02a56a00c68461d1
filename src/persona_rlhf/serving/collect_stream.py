"""The page of a pair whose answers are still being written, sent as they grow. The browser needs no script for it.

HTML only grows, so each state of both answers is a part of its own, and the style sheet shows the last part alone. The
choice follows when both answers are whole. Screen readers hear that, and not every word.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from persona_rlhf.serving.collect_views import render
from persona_rlhf.serving.comparisons import AnswerPair

_POLL_SECONDS = 0.1
_GROWTH = 32  # a part for each 1/32 of the text, so that all parts together are at most about 32 times the text
_MARK = "<!-- answers -->"


async def growing_page(pair: AnswerPair, open_now: Callable[[], bool], **content: Any) -> AsyncIterator[str]:
    """The page with the template's `content`, in parts, until the answers are whole or the pair is not `open_now`."""

    def whole() -> str:
        return render("comparison", comparison=pair, growing=True, **content)

    head = whole().partition(_MARK)[0]
    yield head
    parts, shown = 0, 0
    while not pair.finished and not pair.fault and open_now():
        length = len(pair.left.text) + len(pair.right.text)
        if length > shown + shown // _GROWTH:
            pair.show()
            parts, shown = parts + 1, length
            yield render("answers", comparison=pair, part=parts)
        await asyncio.sleep(_POLL_SECONDS)
    if not pair.finished:
        yield render("unfinished", fault=pair.fault)
        return
    pair.show()
    yield render("answers", comparison=pair, part=parts + 1) + whole().partition(_MARK)[2]
