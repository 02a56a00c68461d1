"""Certificates that lapse in service: the file, every consequence, kills in the middle, and two servers at once."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import slug
from persona_rlhf.common.run_lock import run_lock
from persona_rlhf.evaluation.lifetime import BreachProcess
from persona_rlhf.policy.rule_schema import Certify
from persona_rlhf.release import earlier_adapters, integrity, lifetimes
from persona_rlhf.release.approval_packet import exceptions
from persona_rlhf.release.earlier_adapters import restore, set_aside
from persona_rlhf.release.export import refusals_to_release
from persona_rlhf.release.lifetimes import LIFETIMES, lapse_sentences, life_file, read_life, record, settle
from persona_rlhf.release.report import write_report
from persona_rlhf.release.results import read_results
from persona_rlhf.release.revocation import revoked
from persona_rlhf.release.verify import revocation_notes, verify
from tests.pipeline.cut_short import DONE, KILLED, cut_short

DEMANDS = Certify(min_refusal=0.97, delta=0.05)


@pytest.fixture
def ada(run):
    return next(one for one in read_results(run.path) if one.user_id == "Ada")


def file_of(run, result):
    return life_file(run.path, result.slug, result.manifest_sha256)


def lapse(run, result):
    """Two misses at once lapse."""
    first, second = (record(run.path, result, False, DEMANDS) for _ in range(2))
    return first, second


def test_outcomes_add_up_on_the_disk_and_hold_no_text(run, ada):
    process = BreachProcess()
    for refused in (True, True, False, True):
        life, lapsed = record(run.path, ada, refused, DEMANDS)
        process = process.after(refused, 0.97)
        assert (life.process, lapsed) == (process, False)
    assert read_life(file_of(run, ada)).process == process
    content = json.loads(file_of(run, ada).read_bytes())
    assert content.keys() == {"user", "manifest_sha256", "judged", "refused", "wealths", "e_value", "lapsed"}
    assert (content["judged"], content["refused"], content["lapsed"]) == (4, 3, None)
    assert "Ada" not in file_of(run, ada).read_text()
    assert refusals_to_release(run.path, ada) == []
    assert settle(run.path) == []
    assert not verify(run.path)


def test_a_lapsed_certificate_is_as_good_as_revoked_at_once(run, ada):
    (_, early), (life, lapsed) = lapse(run, ada)
    assert (early, lapsed) == (False, True)
    [reason] = refusals_to_release(run.path, ada)
    assert "its certificate lapsed: 2 of 2 judged requests were not refused (e-value 64.2" in reason
    assert verify(run.path / ada.path) == [reason]
    assert not verify(run.path)
    assert revocation_notes(run.path) == [f"{ada.path}: {reason}"]
    assert record(run.path, ada, True, DEMANDS) == (life, False), "the evidence on a lapsed one stands still"


def test_the_revocation_follows_once_with_its_event(run, ada):
    lapse(run, ada)
    with run_lock(run.path, "train"), ThreadPoolExecutor(1) as server:
        busy = server.submit(settle, run.path).exception()
    assert isinstance(busy, InputError)
    assert "at work in this run" in str(busy)
    assert refusals_to_release(run.path, ada)
    assert settle(run.path) == [ada]
    assert settle(run.path) == []
    events = [entry for entry in integrity.read(run.path) if entry.event == "revoked"]
    assert [entry.facts["reason"].startswith("its certificate lapsed: 2 of 2") for entry in events] == [True]
    assert list(revoked(run.path)) == [ada.manifest_sha256]
    assert len(refusals_to_release(run.path, ada)) == len(verify(run.path / ada.path)) == 1
    assert not verify(run.path)
    assert ("revoked", True) in [(case[1], "lapsed" in case[2]) for case in exceptions(run.path, [ada])]
    write_report(run.path)
    assert "1 adapter revoked since, 1 of them lapsed in service" in (run.path / "report.html").read_text()


@pytest.mark.parametrize("at", range(1, 16))
def test_after_a_kill_anywhere_a_lapse_stands_and_is_settled(run, ada, at):
    """Killed before the n-th change of the disk: an outcome is there whole or not at all, and a lapse never returns."""
    record(run.path, ada, False, DEMANDS)

    def serve():
        record(run.path, ada, False, DEMANDS)
        settle(run.path)

    code = cut_short(serve, at)
    life = read_life(file_of(run, ada))
    assert (life.process.n, life.lapsed is None) in ((1, True), (2, False))
    assert bool(refusals_to_release(run.path, ada)) == (life.lapsed is not None)
    settle(run.path)  # the next start of a server
    assert (ada.manifest_sha256 in revoked(run.path)) == (life.lapsed is not None)
    assert not [fault for fault in verify(run.path) if ".half" not in fault]  # the next write of a file takes them away
    if life.lapsed is None:
        assert record(run.path, ada, False, DEMANDS)[1]
    assert code in (KILLED, DONE)
    assert (code == DONE) == (at >= 14), "the range has all changes of the disk, and ends behind them"


def test_two_servers_and_a_kill_lose_no_outcome_that_was_recorded(run, ada, tmp_path):
    """Each child appends a byte after each recorded outcome; one of the three is killed in its work."""
    demands = Certify(min_refusal=0.5, delta=1e-9)
    counts = [tmp_path / f"child {n}" for n in range(3)]
    children = []
    for file in counts:
        child = os.fork()
        if not child:
            with file.open("ab", buffering=0) as stream:
                for _ in range(40):
                    record(run.path, ada, True, demands)
                    stream.write(b".")
            os._exit(0)
        children.append(child)
    while not (counts[0].exists() and counts[0].stat().st_size > 5):
        time.sleep(0.001)
    os.kill(children[0], signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes[1:] == [0, 0]
    recorded = sum(file.stat().st_size for file in counts)
    life = read_life(file_of(run, ada))
    assert recorded <= life.process.n <= recorded + (codes[0] != 0)
    process = BreachProcess()
    for _ in range(life.process.n):
        process = process.after(True, 0.5)
    assert life.process == process


def test_another_adapter_has_evidence_of_its_own_and_one_that_is_gone_has_none(run, ada):
    other = next(one for one in read_results(run.path) if one.user_id == "ada")
    lapse(run, ada)
    assert record(run.path, other, True, DEMANDS)[0].process.n == 1
    assert refusals_to_release(run.path, other) == []
    manifest = run.path / other.path / "persona.json"
    manifest.rename(manifest.with_suffix(".gone"))
    assert record(run.path, other, True, DEMANDS) is None


def test_a_lapsed_adapter_does_not_come_back_as_an_earlier_one(run, ada, monkeypatch):
    """By its evidence alone, before the list of revocations has it."""
    monkeypatch.setattr(earlier_adapters, "adapter_faults", lambda *_: [])
    monkeypatch.setattr(earlier_adapters, "audit_faults", lambda *_: [])
    set_aside(run.path, {"Ada": ada})
    lapse(run, ada)
    with pytest.raises(InputError, match="its certificate lapsed"):
        restore(run.path, "Ada", ada.manifest_sha256)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"judged": 1, "refused": 1, "wealths": [1], "user": "u"}', b"[]"])
def test_evidence_that_cannot_be_read_keeps_an_adapter_from_being_served(run, ada, content):
    record(run.path, ada, True, DEMANDS)
    file_of(run, ada).write_bytes(content)
    [reason] = refusals_to_release(run.path, ada)
    assert "it may hold a lapse" in reason
    with pytest.raises(InputError, match="it may hold a lapse"):
        record(run.path, ada, True, DEMANDS)


def test_forget_takes_the_evidence_away(run, ada):
    from persona_rlhf.common.files import pseudonym
    from persona_rlhf.data.erasure import DataSubject

    record(run.path, ada, True, DEMANDS)
    [trace] = lifetimes.lifetime_traces(run.path, DataSubject(pseudonym("Ada")))
    assert not list(lifetimes.lifetime_traces(run.path, DataSubject(pseudonym("ada"))))
    trace.remove()
    assert list((run.path / LIFETIMES).glob("*.json")) == []
    assert lapse_sentences(run.path, slug("Ada"), ada.manifest_sha256) == []
