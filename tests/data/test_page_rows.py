"""Rows of the feedback page's files: several writers and deletions at once."""

from __future__ import annotations

import json
import threading
import time
from functools import partial

import pytest

from persona_rlhf.common.files import pseudonym
from persona_rlhf.data import erasure
from persona_rlhf.data.erasure import DataSubject
from persona_rlhf.data.page_rows import PAGE_ROWS, append_rows, page_traces, remove_rows


def row(user):
    return json.dumps({"user_id": user}).encode() + b"\n"


@pytest.fixture
def slow_erasure(monkeypatch):
    """An erasure that takes a while between its look at a file and its write."""
    write = erasure.atomic_write

    def slow(file, content, **options):
        read = b"".join(content)
        time.sleep(0.15)
        write(file, read, **options)

    monkeypatch.setattr(erasure, "atomic_write", slow)


@pytest.mark.parametrize("file", PAGE_ROWS, ids=lambda file: file.name)
def test_deletions_and_new_rows_at_once_lose_nothing_and_bring_nothing_back(tmp_path, file, slow_erasure):
    for user in ("Ada", "Bob", "Carl", "Dora"):
        append_rows(tmp_path, file, row(user))
    [forget] = page_traces(tmp_path, DataSubject(pseudonym("Ada")))
    acts = [
        forget.remove,
        partial(remove_rows, tmp_path, file, DataSubject(pseudonym("Bob"))),
        partial(append_rows, tmp_path, file, row("Emil")),
    ]
    threads = [threading.Thread(target=act) for act in acts]
    for thread in threads:
        thread.start()
        time.sleep(0.03)  # each begins while the first is at work
    for thread in threads:
        thread.join()
    users = {json.loads(line)["user_id"] for line in (tmp_path / file).read_text().splitlines()}
    assert users == {"Carl", "Dora", "Emil"}
    assert (tmp_path / file).stat().st_mode & 0o777 == 0o600
