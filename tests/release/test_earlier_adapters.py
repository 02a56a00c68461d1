"""Earlier adapters: the way back and forward again, whatever cuts it short, and the reasons against it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import count

import pytest

from persona_rlhf.cli.console import open_run
from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import pseudonym
from persona_rlhf.data.erasure import DataSubject
from persona_rlhf.evaluation.gate import certify
from persona_rlhf.pipeline.forget_user import traces
from persona_rlhf.release import integrity
from persona_rlhf.release.earlier_adapters import (
    BASE,
    adapter_name,
    drop_earlier,
    other_adapter,
    restore,
    result_of,
    set_aside,
)
from persona_rlhf.release.integrity import AUDIT, ended, write_run_manifest
from persona_rlhf.release.manifest import DataInfo
from persona_rlhf.release.results import read_results, write_results
from persona_rlhf.release.revocation import revoke, revoked
from persona_rlhf.release.verify import verify
from tests.pipeline.cut_short import DONE, KILLED, cut_short
from tests.release.conftest import DEMANDS, measures, pairs_of, refusals
from tests.release.test_lifetimes import lapse

USER = "Ada"


@pytest.fixture
def updated(run):
    """A run in which USER had an adapter, which was set aside, and has a newer one; the names of both."""
    old = result_of(run.path, USER)
    integrity.append_all(run.path, [ended(old)])
    set_aside(run.path, {USER: old})
    verdict = certify(DEMANDS, refusals(0), (0.5, 1.0), lambda _: refusals(0))
    data = DataInfo.of(pairs_of(USER), 1)
    written = run.exporter.write(USER, -run.flats[USER], verdict, measures(0.9), data)
    new = replace(old, alpha=verdict.alpha, manifest_sha256=written.manifest_sha256, measures=measures(0.9))
    pooled = verdict.pooled
    new = replace(new, tier_one={**new.tier_one, "pooled": pooled}, looks=verdict.looks)
    counts = {"pooled": pooled, **verdict.categories}
    new = replace(new, tier_one={key: counts[key] for key in old.tier_one}, tier_two={"gambling": counts["gambling"]})
    write_results(run.path, [new if one.user_id == USER else one for one in read_results(run.path)])
    integrity.append_all(run.path, [ended(new)])
    write_run_manifest(run.path)
    assert verify(run.path) == []
    return run, adapter_name(old), adapter_name(new)


def weights(run, user=USER) -> bytes:
    return (run.path / result_of(run.path, user).path / "adapter_model.safetensors").read_bytes()


def test_back_and_forward_again(updated):
    run, old, new = updated
    others = {result.user_id: result for result in read_results(run.path) if result.user_id != USER}
    newest = weights(run)
    assert other_adapter(run.path, USER).adapter == old
    assert adapter_name(restore(run.path, USER, old)) == old
    assert weights(run) != newest
    assert other_adapter(run.path, USER).adapter == new
    assert adapter_name(restore(run.path, USER, old)) == old  # a form that is sent twice changes nothing more
    assert adapter_name(restore(run.path, USER, new)) == new
    assert weights(run) == newest
    assert verify(run.path) == []
    assert {result.user_id: result for result in read_results(run.path) if result.user_id != USER} == others
    told = [entry.facts for entry in integrity.read(run.path) if entry.event == "restored"]
    assert [(one["user"], one["manifest_sha256"]) for one in told] == [(pseudonym(USER), old), (pseudonym(USER), new)]


def test_a_first_adapter_can_be_left_for_the_base_and_taken_again(run):
    present = result_of(run.path, USER)
    integrity.append_all(run.path, [ended(present)])
    set_aside(run.path, {USER: None})
    write_run_manifest(run.path, only=AUDIT)
    before = weights(run)
    assert not restore(run.path, USER, BASE).has_adapter
    assert verify(run.path) == []
    assert not (run.path / present.path).exists()
    assert restore(run.path, USER, present.manifest_sha256) == present
    assert weights(run) == before
    assert verify(run.path) == []


def test_an_adapter_that_may_not_be_released_does_not_come_back(updated):
    run, old, new = updated
    with pytest.raises(InputError, match="no such earlier adapter"):
        restore(run.path, USER, "f" * 64)
    with pytest.raises(InputError, match="no such earlier adapter"):
        restore(run.path, "ada", old)  # another user's
    restore(run.path, USER, old)
    revoke(run.path, [replace(result_of(run.path, USER), manifest_sha256=new)], "a new law")
    with pytest.raises(InputError, match="revoked on .* a new law"):
        restore(run.path, USER, new)
    assert adapter_name(result_of(run.path, USER)) == old


def test_a_lapsed_adapter_does_not_come_back_before_its_revocation_is_listed(updated):
    run, old, new = updated
    _, (life, lapsed) = lapse(run, result_of(run.path, USER))
    assert (lapsed, life.manifest_sha256) == (True, new)
    assert new not in revoked(run.path), "a kill may come before the list"
    restore(run.path, USER, old)
    with pytest.raises(InputError, match="its certificate lapsed"):
        restore(run.path, USER, new)
    assert adapter_name(result_of(run.path, USER)) == old


def test_a_recertification_since_bars_an_adapter_that_it_did_not_test(updated):
    run, old, _ = updated
    integrity.append(run.path, integrity.RECERTIFIED, documents=[], policy_hash="x", tested=1, passed=1, looks=1)
    with pytest.raises(InputError, match="a recertification since did not test it"):
        restore(run.path, USER, old)


def test_a_changed_or_planted_adapter_does_not_come_back(updated):
    run, old, _ = updated
    row = other_adapter(run.path, USER)
    file = run.path / row.folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="was changed"):
        restore(run.path, USER, old)
    lines = run.path / "state/earlier/lines.jsonl"
    planted = json.loads(lines.read_text()) | {"adapter": "e" * 64}
    lines.write_text(json.dumps(planted) + "\n")
    with pytest.raises(InputError, match="may not come back"):
        restore(run.path, USER, "e" * 64)


def test_killed_before_any_change_it_is_whole_after_the_next_start(updated, tmp_path):
    run, old, new = updated
    for at in count(1):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run.path, copy)
        met = cut_short(lambda copy=copy: restore(copy, USER, old), at)
        assert met in (DONE, KILLED)
        with open_run(copy, "verify", 0, shared=True):
            pass
        assert verify(copy) == [], at
        present = adapter_name(result_of(copy, USER))
        assert present in (old, new), at
        assert other_adapter(copy, USER) is None or other_adapter(copy, USER).adapter == {old: new, new: old}[present]
        restored = [entry for entry in integrity.read(copy) if entry.event == "restored"]
        assert len(restored) == (present == old), at
        if met == DONE:
            assert at > 10
            break


def test_earlier_adapters_go_with_their_user_and_no_other(updated):
    run = updated[0]
    set_aside(run.path, {"ada": result_of(run.path, "ada")})
    kept = other_adapter(run.path, USER)
    (run.path / "state/slots.safetensors").unlink()
    listed = {trace.path: trace for trace in traces(run.path, DataSubject(pseudonym(USER)))}
    assert {run.path / kept.folder, run.path / "state/earlier/lines.jsonl"} <= listed.keys()
    for trace in listed.values():
        if "earlier" in str(trace.path):
            trace.remove()
    assert not (run.path / kept.folder).exists()
    assert b'"Ada"' not in (run.path / "state/earlier/lines.jsonl").read_bytes()
    assert b'"ada"' in (run.path / "state/earlier/lines.jsonl").read_bytes()
    drop_earlier(run.path, {"ada"})
    assert (run.path / "state/earlier/lines.jsonl").read_bytes() == b""
