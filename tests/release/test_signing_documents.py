"""The run's copies of its policy documents: a byte that changed in one, or in its original, is found and named."""

from __future__ import annotations

from hashlib import sha256

import pytest

from persona_rlhf.policy.rules import DocumentInfo
from persona_rlhf.release.signing import document_faults, keep_documents

TEXT = b"tier: one\nversion: '1'\nrules: []\n"


@pytest.fixture
def kept(tmp_path):
    """A run that keeps one document of each tier: the run, and the documents as policy.json lists them."""
    run = tmp_path / "run"
    run.mkdir()
    infos = []
    for tier, name in enumerate(("one", "two", "three"), 1):
        file = tmp_path / f"{name}.yaml"
        file.write_bytes(TEXT.replace(b"one", name.encode()))
        infos.append(DocumentInfo(str(file), tier, f"Issuer {tier}", "1", sha256(file.read_bytes()).hexdigest()))
    keep_documents(run, infos)
    return run, [info._asdict() for info in infos]


def test_copies_are_the_documents_and_those_of_end_users_are_not_kept(kept):
    run, documents = kept
    assert document_faults(run, documents, ()) == []
    assert {file.stem for file in (run / "policy").iterdir()} == {d["sha256"] for d in documents[:2]}


@pytest.mark.parametrize("place", range(0, len(TEXT), 3))
def test_a_byte_that_changed_in_a_copy_is_found_with_its_line(kept, place):
    run, documents = kept
    copy = run / "policy" / f"{documents[0]['sha256']}.yaml"
    copy.write_bytes(TEXT[:place] + bytes([TEXT[place] ^ 1]) + TEXT[place + 1 :])
    [fault] = document_faults(run, documents, ())
    assert f"policy/{copy.name}" in fault
    assert "one.yaml (tier 1, Issuer 1), was changed" in fault
    line = TEXT[:place].count(b"\n") + 1
    assert f"on line {line}" in fault


def test_an_original_that_changed_is_found_until_the_run_is_recertified_by_it(kept, tmp_path):
    run, documents = kept
    changed = TEXT.replace(b"'1'", b"'2'")
    (tmp_path / "one.yaml").write_bytes(changed)
    [fault] = document_faults(run, documents, ())
    assert "one.yaml (tier 1, Issuer 1) was changed on line 2 since this run was judged by it" in fault
    assert document_faults(run, documents, {sha256(changed).hexdigest()}) == []
    (tmp_path / "one.yaml").unlink()
    assert document_faults(run, documents, ()) == []


def test_missing_and_foreign_copies_are_found_and_older_runs_have_none(kept):
    run, documents = kept
    copy = run / "policy" / f"{documents[1]['sha256']}.yaml"
    copy.rename(run / "policy" / "notes.txt")
    assert [fault.split(",")[0] for fault in document_faults(run, documents, ())] == [
        f"policy/{copy.name}",
        "policy/notes.txt is no document of policy.json",
    ]
    assert document_faults(run.parent, documents, ()) == []
