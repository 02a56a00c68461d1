"""Keys, detached signatures, and whose signature counts for what."""

from __future__ import annotations

import json
import stat
import sys
from hashlib import sha256

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import slug
from persona_rlhf.policy.rules import DocumentInfo
from persona_rlhf.release.manifest import MANIFEST
from persona_rlhf.release.signing import (
    holds,
    keep_documents,
    make_key,
    public_bytes,
    read_signature,
    read_trust,
    sign_file,
    signature_of,
    signer,
    untrusted_documents,
)
from persona_rlhf.release.verify import TrustedEvidence, verify


@pytest.fixture
def keys(tmp_path):
    """Private key files by role, and a file of trusted keys that names each for its role alone."""
    roles = ("model_provider", "application_provider", "releaser")
    public = {role: make_key(tmp_path / f"{role}.pem") for role in roles}
    trusted = tmp_path / "keys.yaml"
    trusted.write_text("".join(f"{role}:\n  - {text}\n" for role, text in public.items()))
    return {role: tmp_path / f"{role}.pem" for role in roles} | {"trust": trusted}


def test_a_key_is_its_owners_alone_and_never_overwritten(tmp_path):
    file = tmp_path / "key.pem"
    public = make_key(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    assert len(public_bytes(public)) == 32
    assert make_key(tmp_path / "other.pem") != public
    before = file.read_bytes()
    with pytest.raises(InputError, match="name a new file"):
        make_key(file)
    assert file.read_bytes() == before
    with pytest.raises(InputError, match="No such file"):
        make_key(tmp_path / "none" / "key.pem")


def test_a_signature_is_over_every_byte(tmp_path):
    public = public_bytes(make_key(tmp_path / "key.pem"))
    document = tmp_path / "one.yaml"
    document.write_bytes(b"tier: one\n")
    signature = sign_file(document, tmp_path / "key.pem")
    assert signature == tmp_path / "one.yaml.sig"
    assert set(json.loads(signature.read_text())) == {"algorithm", "key", "signature"}
    found = read_signature(signature)
    assert holds(public, found, b"tier: one\n")
    assert not holds(public, found, b"tier: two\n")
    assert not holds(public_bytes(make_key(tmp_path / "other.pem")), found, b"tier: one\n")


def test_what_is_no_key_is_said(tmp_path):
    (tmp_path / "bad.pem").write_text("nothing")
    for file in ("bad.pem", "none.pem"):
        with pytest.raises(InputError, match="policy keygen"):
            signer(tmp_path / file)
    make_key(tmp_path / "key.pem")
    with pytest.raises(InputError, match="cannot be read"):
        sign_file(tmp_path / "none.yaml", tmp_path / "key.pem")
    (tmp_path / "keys.yaml").write_text("model_provider: [ed25519:abc, x]\nreleaser: []\n")
    with pytest.raises(InputError) as caught:
        read_trust(tmp_path / "keys.yaml")
    assert [problem.key for problem in caught.value.problems] == ["model_provider[0]", "model_provider[1]"]
    (tmp_path / "keys.yaml").write_text("model_providers: []\n")
    with pytest.raises(InputError, match="did you mean `model_provider`"):
        read_trust(tmp_path / "keys.yaml")


def test_without_the_package_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(InputError, match=r"persona-rlhf\[sign\]"):
        make_key(tmp_path / "key.pem")


def test_each_role_signs_its_own_tier(keys, tmp_path):
    run, trust = tmp_path / "run", read_trust(keys["trust"])
    run.mkdir()

    def documents(**signed_by):
        infos = []
        for tier, name in ((1, "one"), (2, "two")):
            file = tmp_path / f"{name}.yaml"
            file.write_text(f"tier: {name}\n")
            signature_of(file).unlink(missing_ok=True)
            if name in signed_by:
                sign_file(file, keys[signed_by[name]])
            digest = sha256(file.read_bytes()).hexdigest()
            infos.append(DocumentInfo(str(file), tier, "Lab", "1", digest))
        for copy in (run / "policy").glob("*"):
            copy.unlink()
        keep_documents(run, infos)
        return [info._asdict() for info in infos]

    assert untrusted_documents(run, documents(one="model_provider", two="application_provider"), trust) == []
    [fault] = untrusted_documents(run, documents(one="model_provider"), trust)
    assert "two.yaml (tier 2, Lab): no application_provider has signed it" in fault
    [fault] = untrusted_documents(run, documents(one="application_provider", two="application_provider"), trust)
    assert "which is not a trusted key of any model_provider" in fault
    told = documents(one="model_provider", two="application_provider")
    copy = run / "policy" / f"{told[0]['sha256']}.yaml"
    copy.write_text("tier: One\n")
    assert "does not match this content" in untrusted_documents(run, told, trust)[0]
    signature_of(copy).write_text("{}")
    assert "its signature cannot be read" in untrusted_documents(run, told, trust)[0]


def test_a_manifest_is_its_releasers(run, keys):
    trust = TrustedEvidence(trust=read_trust(keys["trust"]))
    folder = run.path / "adapters" / slug("Ada")
    assert verify(folder, trust) == [f"{MANIFEST}: no releaser has signed it"]
    assert len([fault for fault in verify(run.path, trust) if "no releaser has signed it" in fault]) == 3
    sign_file(folder / MANIFEST, keys["releaser"])
    assert verify(folder, trust) == []
    assert verify(folder) == verify(run.path) == []
    sign_file(folder / MANIFEST, keys["model_provider"])
    assert "not a trusted key of any releaser" in verify(folder, trust)[0]
