"""Who may leave: every reason why not, asked in one place and honoured by export and verify."""

from __future__ import annotations

import json

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import pseudonym, slug
from persona_rlhf.release import integrity
from persona_rlhf.release.export import HeldBack, export, find_user, refusals_to_release
from persona_rlhf.release.integrity import write_run_manifest
from persona_rlhf.release.manifest import MANIFEST, rendered, self_hash
from persona_rlhf.release.revocation import read_list, revoke, revoked
from persona_rlhf.release.verify import revocation_notes, verify


def reasons(run, user):
    return refusals_to_release(run.path, find_user(run.path, user))


def test_only_the_released_and_sound_may_leave(run):
    assert reasons(run, "Ada") == []
    assert reasons(run, "nan") == ["it is not released (failed): not finite"]
    (run.path / "adapters" / slug("Ada") / "README.md").write_text("other")
    assert reasons(run, "Ada") == [
        f"it does not verify: README.md was changed: its sha256 is not the one in {MANIFEST}"
    ]


def test_the_revoked_stay_and_verify_says_so(run, tmp_path):
    ada = find_user(run.path, "Ada")
    [one] = revoke(run.path, [ada, find_user(run.path, "nan")], "tier one of 2027-01-01")
    assert one.user == pseudonym("Ada")
    assert revoke(run.path, [ada], "again") == []
    assert revoked(run.path) == {ada.manifest_sha256: one}
    assert reasons(run, "Ada") == [f"it was revoked on {one.day}: tier one of 2027-01-01"]
    assert reasons(run, "ada") == []
    with pytest.raises(HeldBack, match="revoked on"):
        export(run.path, "Ada", tmp_path / "out")
    assert verify(run.path) == []
    assert revocation_notes(run.path) == [f"adapters/{slug('Ada')}: {one.sentence()}"]
    assert b"Ada" not in (run.path / "revoked.jsonl").read_bytes() + (run.path / integrity.AUDIT).read_bytes()


def test_a_list_that_was_changed_lets_nobody_pass_unseen(run):
    revoke(run.path, [find_user(run.path, "Ada")], "one")
    revoke(run.path, [find_user(run.path, "ada")], "two")
    file = run.path / "revoked.jsonl"
    first, second = file.read_text().splitlines(keepends=True)
    file.write_text(second)
    assert any(
        f"lacks an adapter of user {pseudonym('Ada')}, which line 1 of audit" in fault for fault in verify(run.path)
    )
    file.unlink()
    assert sum("lacks an adapter" in fault for fault in verify(run.path)) == 2
    file.write_text(first + second + json.dumps(json.loads(second) | {"manifest_sha256": "0" * 64}) + "\n")
    assert any("no line of audit.jsonl revoked" in fault for fault in verify(run.path))
    file.write_text(first[:-5] + "\n" + second)
    assert "revoked.jsonl:1" in reasons(run, "../../etc")[0]
    with pytest.raises(InputError, match="revoked.jsonl:1"):
        read_list(file)
    assert any("revoked.jsonl:1" in fault for fault in verify(run.path))


def test_a_cut_trail_shows_against_the_seal(run):
    revoke(run.path, [find_user(run.path, "Ada")], "one")
    (run.path / "revoked.jsonl").unlink()
    (run.path / integrity.AUDIT).unlink()
    assert any("manifest.json keeps the head 1:" in fault for fault in verify(run.path))
    integrity.append(run.path, "something else")
    write_run_manifest(run.path, only="report.html")
    assert any("that line has another hash now" in fault for fault in verify(run.path))


@pytest.mark.parametrize(("until", "lives"), [("2999-01-01", True), ("2020-01-01", False)])
def test_a_verdict_expires(run, until, lives):
    folder = run.path / "adapters" / slug("Ada")
    content = json.loads((folder / MANIFEST).read_bytes())
    content["verdict"]["valid_until"] = until
    content["manifest_hash"] = self_hash(content)
    (folder / MANIFEST).write_bytes(rendered(content))
    assert verify(folder) == ([] if lives else ["its verdict expired on 2020-01-01"])
    assert any("expired" in reason for reason in reasons(run, "Ada")) != lives


def test_papers_that_the_trail_does_not_know_are_found(run):
    """An adapter put in afterwards, with papers that are sound in themselves, has no line in the trail."""
    folder = run.path / "adapters" / slug("Ada")
    head = integrity.append(run.path, "judged", user=pseudonym("Ada"))
    integrity.append(run.path, "released", user=pseudonym("Ada"), manifest_sha256="0" * 64)
    for kept, words in ((head._asdict(), "no line released"), ({"seq": 1, "hash": "1" * 64}, "keeps the head 1:11111")):
        content = json.loads((folder / MANIFEST).read_bytes()) | {"audit": kept}
        content["manifest_hash"] = self_hash(content)
        (folder / MANIFEST).write_bytes(rendered(content))
        assert any(words in fault for fault in verify(run.path)), words
        assert verify(folder) == []
    content["audit"] = {"seq": "x"}
    content["manifest_hash"] = self_hash(content)
    (folder / MANIFEST).write_bytes(rendered(content))
    assert any("keeps the head 0:" in fault for fault in verify(run.path))
