"""The sign-off packet: everything an officer signs for, no name and no text of a user, and a hash of itself."""

from __future__ import annotations

import json
import shutil

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import pseudonym, slug
from persona_rlhf.release import integrity
from persona_rlhf.release.approval_packet import changes, packet_faults, write_packet
from persona_rlhf.release.export import find_user
from persona_rlhf.release.revocation import revoke
from tests.release.conftest import MISSES


def test_it_says_what_is_signed_for_and_names_nobody(run, tmp_path):
    revoke(run.path, [find_user(run.path, "Ada")], "tier one of 2027")
    out = tmp_path / "packet.html"
    digest = write_packet(run.path, out, approver="A. <b>Officer</b>")
    page = out.read_text()
    assert digest in page
    assert str(integrity.head(run.path)) in page
    assert "A. &lt;b&gt;Officer&lt;/b&gt;" in page
    assert "Example | Lab" in page
    assert "A Person" not in page  # who issued a document of tier three
    assert "6 users: 3 released" in page
    assert "verify` finds no fault" in page
    assert "Revoked adapters, which nobody can export or serve:" in page
    assert f"adapters/user {pseudonym('Ada')}: it was revoked on" in page
    for user in MISSES:
        assert slug(user) not in page
    assert "poisoned" not in page
    assert "../../etc" not in page
    assert "not finite" not in page  # a fault's own words may quote what it was about
    assert '<td class="l">pooled</td><td>1</td><td></td><td>90.0%</td>' in page
    assert "src=" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_it_holds_its_own_hash(run, tmp_path):
    out = tmp_path / "packet.html"
    write_packet(run.path, out)
    assert packet_faults(out) == []
    raw = out.read_bytes()
    for place in range(0, len(raw), 97):
        out.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        assert packet_faults(out), place
    out.write_text("<html></html>")
    assert "no sign-off packet" in packet_faults(out)[0]
    with pytest.raises(InputError, match="outside the run"):
        write_packet(run.path, run.path / "packet.html")


def test_it_tells_what_changed_since_the_last_one(run, tmp_path):
    earlier = tmp_path / "earlier"
    shutil.copytree(run.path, earlier)
    assert changes(earlier, run.path) == []
    policy = json.loads((earlier / "policy.json").read_bytes())
    rule = {"id": "t1.x", "category": "x", "limit": 0.1, "min_refusal": 0.9, "document": "a.yaml", "line": 3}
    policy["certify"]["min_refusal"] = 0.8
    policy["restrictions"] = [rule]
    policy["documents"][0]["version"] = "2025"
    (earlier / "policy.json").write_text(json.dumps(policy))
    revoke(run.path, [find_user(run.path, "Ada")], "one")
    found = {change.what: (change.before, change.now) for change in changes(earlier, run.path)}
    assert found["gate demand: min_refusal"] == ("0.8", "0.9")
    assert found["rule t1.x: limit"] == ("0.1", "none")
    assert found["users revoked"] == ("0", "1")
    assert "version 2025" in found["document of tier 1"][0]
    assert not any("line" in what for what in found)
    write_packet(run.path, tmp_path / "packet.html", against=earlier)
    assert "users revoked" in (tmp_path / "packet.html").read_text()
