"""Proofs over the audit trail, by what a reader of the proof alone can find out."""

from __future__ import annotations

import hashlib
import json

import pytest
from typer.testing import CliRunner

from persona_rlhf.cli.app import app
from persona_rlhf.common.chain import Chain
from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import pseudonym
from persona_rlhf.common.merkle import TreeHead
from persona_rlhf.release.audit_proof import merkle_root, proof_faults, prove_growth, prove_user
from persona_rlhf.release.integrity import AUDIT

USERS = ("ada", "bob", "eve")


@pytest.fixture
def run(tmp_path):
    """A folder with an audit trail alone: two lines of each user between those of the run; Bob is forgotten."""
    path = tmp_path / "run"
    path.mkdir()
    of_users = [(event, {"user": pseudonym(user)}) for event in ("judged", "released") for user in USERS]
    events = [("begun", {"share": "1/1"}), *of_users, ("forgotten", {"user": pseudonym("bob"), "proof": "0" * 64})]
    Chain(path / AUDIT).append(events)
    return path


def test_a_user_s_lines_are_proved_without_the_others(run, tmp_path):
    root = prove_user(run, "bob", tmp_path / "bob.json")
    assert proof_faults(tmp_path / "bob.json", [root]) == []
    text = (tmp_path / "bob.json").read_text()
    assert [json.loads(entry["line"])["event"] for entry in json.loads(text)["entries"]] == [
        "judged",
        "released",
        "forgotten",
    ]
    assert not [user for user in ("ada", "eve") if pseudonym(user) in text]
    [fault] = proof_faults(tmp_path / "bob.json", [])
    assert "none of those given by --root" in fault


def test_the_root_of_two_lines_by_hand(tmp_path):
    Chain(tmp_path / AUDIT).append([("one", {}), ("two", {})])
    leaves = [hashlib.sha256(b"\0" + line).digest() for line in (tmp_path / AUDIT).read_bytes().splitlines(True)]
    assert merkle_root(tmp_path) == TreeHead(2, hashlib.sha256(b"\1" + b"".join(leaves)).hexdigest())


@pytest.mark.parametrize("kept", [10, -1])
def test_a_root_taken_while_the_last_line_is_half_written_holds_later(run, tmp_path, kept):
    """A kill leaves the beginning of a line, or a line without its newline; the next writer removes or completes it."""
    before, whole = merkle_root(run), (run / AUDIT).read_bytes()
    Chain(run / AUDIT).append([("signed", {"key": "k"})])
    torn = (run / AUDIT).read_bytes()[len(whole) :][:kept]
    (run / AUDIT).write_bytes(whole + torn)
    root = merkle_root(run)
    assert root == before
    Chain(run / AUDIT).append([("exported", {})])
    after = prove_growth(run, root, tmp_path / "grown.json")
    assert proof_faults(tmp_path / "grown.json", [root, after]) == []


def test_a_trail_of_a_half_written_line_alone_has_no_root(tmp_path):
    (tmp_path / AUDIT).write_bytes(b'{"event": "be')
    with pytest.raises(InputError, match="there is no audit trail here"):
        merkle_root(tmp_path)


@pytest.mark.parametrize(
    "forge",
    [
        lambda entry: entry.update(line=entry["line"].replace("judged", "signed")),
        lambda entry: entry.update(index=entry["index"] + 1),
        lambda entry: entry.update(path=entry["path"][::-1]),
        lambda entry: entry.update(path=entry["path"][:-1]),
        lambda entry: entry.update(path=["x"]),
        lambda entry: entry.pop("path"),
    ],
)
def test_a_forged_proof_is_noticed(run, tmp_path, forge):
    root = prove_user(run, "ada", tmp_path / "proof.json")
    content = json.loads((tmp_path / "proof.json").read_text())
    forge(content["entries"][0])
    (tmp_path / "proof.json").write_text(json.dumps(content))
    assert proof_faults(tmp_path / "proof.json", [root])


def test_a_proof_of_nothing_is_none(run, tmp_path):
    root = prove_user(run, "ada", tmp_path / "proof.json")
    content = json.loads((tmp_path / "proof.json").read_text()) | {"entries": []}
    (tmp_path / "proof.json").write_text(json.dumps(content))
    assert proof_faults(tmp_path / "proof.json", [root]) == ["it holds no line"]


def test_another_user_s_line_is_no_line_of_this_user(run, tmp_path):
    root = prove_user(run, "ada", tmp_path / "proof.json")
    content = json.loads((tmp_path / "proof.json").read_text())
    content["user"] = pseudonym("eve")
    (tmp_path / "proof.json").write_text(json.dumps(content))
    assert "not a line of this user" in proof_faults(tmp_path / "proof.json", [root])[0]


def test_growth_is_proved_and_a_rewritten_trail_has_no_proof(run, tmp_path):
    before = merkle_root(run)
    Chain(run / AUDIT).append([("revoked", {"user": pseudonym("eve")})])
    after = prove_growth(run, before, tmp_path / "growth.json")
    assert after.size == before.size + 1
    assert proof_faults(tmp_path / "growth.json", [before, after]) == []
    assert len(proof_faults(tmp_path / "growth.json", [after])) == 1
    content = json.loads((tmp_path / "growth.json").read_text())
    content["proof"] = content["proof"][:-1]
    (tmp_path / "growth.json").write_text(json.dumps(content))
    assert "does not show" in proof_faults(tmp_path / "growth.json", [before, after])[0]

    (run / AUDIT).unlink()
    Chain(run / AUDIT).append([("begun", {"share": "another"})] * 12)
    with pytest.raises(InputError, match="do not have this root"):
        prove_growth(run, before, tmp_path / "new.json")
    with pytest.raises(InputError, match="do not have this root"):
        prove_growth(run, TreeHead(99, before.root), tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()


def test_as_it_is_typed(run, tmp_path):
    def type_in(*words):
        return CliRunner().invoke(app, [str(word) for word in words])

    (run / "config.yaml").write_text("name: x\n")
    root = type_in("audit", run, "--root").stdout.strip()
    assert root == str(merkle_root(run))
    proof = tmp_path / "proof.json"
    assert type_in("audit", run, "--user", "ada", "--out", proof).stdout.strip() == root
    assert type_in("verify", proof, "--root", root).exit_code == 0
    assert type_in("verify", proof, "--root", "8:" + "0" * 64).exit_code == 3
    assert type_in("verify", proof, "--root", "no root").exit_code == 2
    assert type_in("verify", run, "--root", root).exit_code == 2
    assert type_in("audit", run, "--user", "ada", "--out", proof).exit_code == 2  # it exists
    assert type_in("audit", run, "--user", "nobody", "--out", tmp_path / "n.json").exit_code == 2
    assert type_in("audit", run, "--user", "ada").exit_code == 2
    assert type_in("audit", run, "--user", "ada", "--since", root).exit_code == 2
    assert type_in("audit", run, "--out", tmp_path / "n.json").exit_code == 2
    assert type_in("audit", run, "--since", root, "--out", tmp_path / "growth.json").exit_code == 0
    assert type_in("verify", tmp_path / "growth.json", "--root", root).exit_code == 0
