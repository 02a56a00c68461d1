"""Whoever does it, every chunk of users is done exactly once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.common.errors import InputError
from persona_rlhf.pipeline.distributed import MOST, WorkShare, work_share_of

counts = st.integers(1, 40)


@given(shards=counts, world=counts, chunks=st.integers(0, 500))
def test_every_chunk_has_one_process(shards, world, chunks):
    taken = [n for i in range(shards) for r in range(world) for n in WorkShare(i, shards, r, world).mine(chunks)]
    assert sorted(taken) == list(range(chunks))
    jobs = [n for i in range(shards) for n in WorkShare(i, shards, 0, world).job(chunks)]
    assert sorted(jobs) == list(range(chunks))
    assert len({WorkShare(i, shards, r, world).name for i in range(shards) for r in range(world)}) == shards * world


@given(users=st.integers(1, 30_000), workers=st.integers(1, 64))
def test_chunks_are_small_and_leave_nobody_idle(users, workers):
    size = WorkShare(0, workers).chunk_size(users, "auto")
    chunks = -(-users // size)
    assert 1 <= size <= MOST
    assert chunks * size < users + size
    if users >= workers * workers:
        assert chunks >= workers
    if users <= MOST:
        assert WorkShare().chunk_size(users, "auto") == users  # a small run is one chunk
    assert WorkShare(0, workers).chunk_size(users, 7) == 7


def test_the_environment_of_a_launcher_is_understood():
    told = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}
    assert work_share_of(None, told) == WorkShare(0, 1, 3, 4)
    assert work_share_of("2/5", told) == WorkShare(1, 5, 3, 4)
    assert work_share_of(None, {}) == work_share_of("1/1", {}) == WorkShare()


@pytest.mark.parametrize("text", ["0/1", "2/1", "x", "1/2 ", "1//2"])
def test_anything_else_is_refused(text):
    with pytest.raises(InputError, match="1 <= i <= n"):
        work_share_of(text, {})
