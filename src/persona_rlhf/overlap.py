"""Work that goes on in another thread while this one makes the next piece of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


def behind(work: Callable[[_Item], _Found], items: Iterable[_Item]) -> Iterator[_Found]:
    """What `work` makes of every item, in their order; a thread is at it while the next item is being made.

    What `work` raises comes out in its result's place. Where the making of an item raises, or is interrupted, the one
    before it is still given first.
    """
    items = iter(items)
    with ThreadPoolExecutor(1) as thread:
        for item in items:
            doing = thread.submit(work, item)
            break
        else:
            return
        while True:
            try:
                item = next(items)
            except StopIteration:
                yield doing.result()
                return
            except (Exception, KeyboardInterrupt):
                yield doing.result()
                raise
            yield doing.result()
            doing = thread.submit(work, item)
