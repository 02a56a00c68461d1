"""Rows of users that the feedback page keeps beside the ledger: hashes of links, and notes of deletions.

Rows are appended, and a deletion writes a file anew without a user's rows. All of it happens under one lock,
RUN/state/.lock, so that no writer brings back a row that another one removed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from persona_rlhf.common.files import append_whole
from persona_rlhf.common.run_lock import WAIT_SECONDS, run_lock
from persona_rlhf.data.choice_ledger import DELETIONS
from persona_rlhf.data.erasure import DataSubject, Trace, erase, row_traces

LINKS = Path("state") / "links.jsonl"
"""Links of a run, relative to its folder."""

PAGE_ROWS = (LINKS, DELETIONS)
"""The files with rows of the page, relative to the run."""


def page_lock(run: Path) -> AbstractContextManager[None]:
    """The lock of the page's files, which waits for others. Raises InputError where it stays taken."""
    return run_lock(run / "state", "collect", wait=WAIT_SECONDS)


def append_rows(run: Path, file: Path, rows: bytes) -> None:
    """Appends whole lines to a file of PAGE_ROWS, which only its owner may read; on return they are on the disk."""
    with page_lock(run):
        if not (run / file).exists():
            (run / file).touch(0o600)
        with (run / file).open("ab") as stream:
            append_whole(stream, rows)


def remove_rows(run: Path, file: Path, user: DataSubject) -> None:
    """Removes a user's rows from a file of PAGE_ROWS."""
    with page_lock(run):
        if (run / file).exists():
            erase(run / file, user)


def page_traces(run: Path, user: DataSubject) -> Iterator[Trace]:
    """The user's rows in the files of the page."""
    for file in PAGE_ROWS:
        for trace in row_traces([run / file], user):
            yield trace._replace(remove=partial(remove_rows, run, file, user))
