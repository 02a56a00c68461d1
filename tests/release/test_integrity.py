"""The audit trail: what is cut, changed, put in or written anew shows, and nothing that happens to it loses a line."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.common.chain import ChainHead
from persona_rlhf.release.integrity import AUDIT, append, append_all, faults, head, read


def trail(folder, lines=6):
    for n in range(lines):
        append(folder, "looked", user="0" * 32, n=n, bound=0.97 + n / 1000)
    return folder / AUDIT


def test_lines_are_numbered_chained_and_read_back(tmp_path):
    assert list(read(tmp_path)) == []
    assert head(tmp_path) is None
    assert faults(tmp_path) == []
    last = append_all(tmp_path, [("a", {"x": 1}), ("b", {})])
    assert append(tmp_path, "c", why="text \udcff") == head(tmp_path) == (3, list(read(tmp_path))[-1].hash)
    entries = list(read(tmp_path))
    assert [(entry.seq, entry.event, entry.facts) for entry in entries[:2]] == [(1, "a", {"x": 1}), (2, "b", {})]
    assert entries[0].previous == "0" * 64
    assert entries[1].hash == last.hash == entries[2].previous
    assert faults(tmp_path, [("me", last)]) == []
    assert ChainHead.parse(f" {last}\n") == last
    for bad in ("", "3", "3:abc", "x:" + "0" * 64, "-1:" + "0" * 64):
        with pytest.raises(ValueError, match="NUMBER:SHA256"):
            ChainHead.parse(bad)


@given(st.data())
def test_any_changed_byte_is_found_with_its_line(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("trail")
    file = trail(folder, 3)
    raw = file.read_bytes()
    place = data.draw(st.integers(0, len(raw) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != raw[place]))
    file.write_bytes(raw[:place] + bytes([other]) + raw[place + 1 :])
    line = raw[:place].count(b"\n") + 1
    assert any(f"line {line} " in fault for fault in faults(folder)), faults(folder)


def test_a_cut_tail_and_a_chain_written_anew_show_against_a_head(tmp_path):
    file = trail(tmp_path)
    kept = head(tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:4]))
    assert faults(tmp_path) == []
    [fault] = faults(tmp_path, [("an officer", kept)])
    assert "an officer keeps the head 6:" in fault
    assert "it ends at line 4" in fault
    file.unlink()
    trail(tmp_path).write_bytes(file.read_bytes().replace(b"looked", b"looked"))
    file.unlink()
    for n in range(7):
        append(tmp_path, "invented", n=n)
    assert faults(tmp_path) == []
    assert "that line has another hash now" in faults(tmp_path, [("an officer", kept)])[0]


@pytest.mark.parametrize("edit", [lambda lines: lines[:2] + lines[3:], lambda lines: lines[:3] + lines[2:]])
def test_lines_taken_out_or_put_in_break_the_chain(tmp_path, edit):
    file = trail(tmp_path)
    file.write_bytes(b"".join(edit(file.read_bytes().splitlines(keepends=True))))
    assert any("lines were removed or inserted" in fault for fault in faults(tmp_path))


def test_what_a_killed_process_left_is_cut_off_wherever_it_was_torn(tmp_path):
    file = trail(tmp_path, 3)
    raw = file.read_bytes()
    start = raw[:-1].rindex(b"\n") + 1
    for end in range(start, len(raw)):
        file.write_bytes(raw[:end])
        whole = end == len(raw) - 1  # only the newline is missing: nothing of what happened is
        assert (faults(tmp_path) == []) == (end == start)
        assert append(tmp_path, "went on").seq == (4 if whole else 3)
        assert faults(tmp_path) == []


def test_a_damaged_last_line_is_gone_on_with_and_stays_found(tmp_path):
    file = trail(tmp_path, 3)
    file.write_bytes(file.read_bytes()[:-2] + b"]\n")
    assert head(tmp_path) is None
    assert append(tmp_path, "forgotten").seq == 4
    append(tmp_path, "and so on")
    assert [fault.split(" was ")[0] for fault in faults(tmp_path)] == [f"{AUDIT}: line 3"]


def test_threads_and_processes_take_turns(tmp_path):
    def many(name):
        for n in range(25):
            append_all(tmp_path, [(name, {"n": n}), (name, {"n": n, "text": "x" * 3000})])

    context = multiprocessing.get_context("fork")
    with ThreadPoolExecutor(3) as threads:
        workers = [context.Process(target=many, args=(f"process {n}",)) for n in range(2)]
        for worker in workers:
            worker.start()
        list(threads.map(many, ["one", "two", "three"]))
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0
    assert faults(tmp_path) == []
    assert [entry.seq for entry in read(tmp_path)] == list(range(1, 251))


def test_killed_at_any_moment_it_goes_on_whole(tmp_path):
    def endless():
        while True:
            append_all(tmp_path, [("before the kill", {"text": "x" * 5000})] * 3)

    for _ in range(4):
        child = multiprocessing.get_context("fork").Process(target=endless)
        child.start()
        before = sum(1 for _ in read(tmp_path))
        while sum(1 for _ in read(tmp_path)) < before + 3:
            time.sleep(0.005)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        whole = sum(1 for _ in read(tmp_path))
        assert append(tmp_path, "after it").seq == whole + 1
        assert faults(tmp_path) == []


def test_a_line_is_plain_json(tmp_path):
    file = trail(tmp_path, 1)
    assert set(json.loads(file.read_text())) == {"seq", "time", "event", "facts", "previous", "hash"}
    with pytest.raises(ValueError, match="JSON"):
        append(tmp_path, "no number", x=float("nan"))
    assert faults(tmp_path) == []
