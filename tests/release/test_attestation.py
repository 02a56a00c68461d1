"""Signed exports: what the tools of third parties accept, and every change of a folder that they notice."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from in_toto_attestation.v1.statement import Statement
from jsonschema import Draft202012Validator
from model_signing import signing as model_signing
from model_signing import verifying
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import SSlibKey
from typer.testing import CliRunner

from persona_rlhf.cli.app import app
from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import slug
from persona_rlhf.release.attestation import CERTIFICATE, MODEL_SIGNATURE, PREDICATE_TYPE
from persona_rlhf.release.bom import BOM
from persona_rlhf.release.export import export
from persona_rlhf.release.manifest import MANIFEST
from persona_rlhf.release.signing import holds, make_key, public_bytes, read_signature, read_trust, sign_file
from persona_rlhf.release.verify import TrustedEvidence, verify

SCHEMA = Path(__file__).parents[2] / "docs/reference/refusal-certificate.schema.json"
WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"


@pytest.fixture
def key(tmp_path) -> Path:
    """A private key of kind p256; its public key lies beside it, and in keys.yaml as that of the releaser."""
    public = make_key(tmp_path / "key.pem", "p256")
    (tmp_path / "keys.yaml").write_text(f"releaser:\n  - {public}\n")
    return tmp_path / "key.pem"


@pytest.fixture
def folder(run, key, tmp_path) -> Path:
    return export(run.path, "ada", tmp_path / "out", key, bom=True)


def accepted(folder: Path, key: Path) -> None:
    """The check of model_signing, with the options that its command line has by default. Raises for a fault."""
    public = key.with_name("key.pem.pub")
    verifying.Config().use_elliptic_key_verifier(public_key=public).verify(folder, folder / MODEL_SIGNATURE)


def trusted(key: Path) -> TrustedEvidence:
    return TrustedEvidence(trust=read_trust(key.with_name("keys.yaml")))


def dsse(folder: Path) -> Envelope:
    return Envelope.from_dict(json.loads((folder / CERTIFICATE).read_bytes()))


def their_key(key: Path, name: str) -> SSlibKey:
    public = load_pem_public_key(key.with_name("key.pem.pub").read_bytes())
    return SSlibKey.from_crypto(public, keyid=name)


def test_a_signed_export_is_accepted_by_model_signing_and_by_us(folder, key):
    accepted(folder, key)
    assert verify(folder) == []
    assert verify(folder, trusted(key)) == []
    statement = json.loads(
        base64.b64decode(json.loads((folder / MODEL_SIGNATURE).read_bytes())["dsseEnvelope"]["payload"])
    )
    assert statement["subject"][0]["name"].startswith("adapter-"), "the folder's name may be a person's"


def test_the_command_line_of_model_signing_accepts_it(folder, key):
    from click.testing import CliRunner
    from model_signing._cli import main

    options = ["--signature", str(folder / MODEL_SIGNATURE), "--public_key", f"{key}.pub"]
    outcome = CliRunner().invoke(main, ["verify", "key", str(folder), *options])
    assert outcome.exit_code == 0, outcome.output
    (folder / CARD).write_text("another card")
    assert CliRunner().invoke(main, ["verify", "key", str(folder), *options]).exit_code == 1


def test_their_signature_of_the_same_folder_has_the_same_statement(folder, key, tmp_path):
    """Oracle: model_signing signs the folder itself; both payloads list the same files, digests and root."""
    theirs = tmp_path / "theirs.sig"
    ours = (folder / MODEL_SIGNATURE).read_bytes()
    config = model_signing.Config().use_elliptic_key_signer(private_key=key)
    config.set_hashing_config(_their_hashing(folder)).sign(folder, theirs)

    def statement(raw: bytes) -> tuple[dict, dict]:
        bundle = json.loads(raw)
        content = json.loads(base64.b64decode(bundle["dsseEnvelope"].pop("payload")))
        del bundle["dsseEnvelope"]["signatures"]
        return bundle, content

    (our_bundle, our_content), (their_bundle, their_content) = statement(ours), statement(theirs.read_bytes())
    assert our_bundle["verificationMaterial"]["publicKey"] == their_bundle["verificationMaterial"]["publicKey"]
    assert our_bundle["mediaType"] == their_bundle["mediaType"]
    assert our_content["subject"][0]["digest"] == their_content["subject"][0]["digest"]
    assert our_content["predicate"]["resources"] == their_content["predicate"]["resources"]
    assert our_content["predicateType"] == their_content["predicateType"]


def _their_hashing(folder: Path):
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[folder / MODEL_SIGNATURE])


def _flip(name: str, at: int) -> Callable[[Path, Path], object]:
    def tamper(folder: Path, other: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        raw[at] ^= 1
        (folder / name).write_bytes(raw)

    return tamper


def _edit(name: str, old: str, new: str) -> Callable[[Path, Path], object]:
    def tamper(folder: Path, other: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return tamper


def _edit_signature(change: Callable[[dict], object]) -> Callable[[Path, Path], object]:
    def tamper(folder: Path, other: Path) -> None:
        bundle = json.loads((folder / MODEL_SIGNATURE).read_bytes())
        change(bundle)
        (folder / MODEL_SIGNATURE).write_text(json.dumps(bundle))

    return tamper


def _edit_payload(change: Callable[[dict], object]) -> Callable[[Path, Path], object]:
    def edit(bundle: dict) -> None:
        content = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        change(content)
        bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(content).encode()).decode()

    return _edit_signature(edit)


def _symlink(folder: Path, other: Path) -> None:
    (folder / WEIGHTS).rename(other.parent / "weights")
    (folder / WEIGHTS).symlink_to(other.parent / "weights")


def _copy(name: str) -> Callable[[Path, Path], object]:
    return lambda folder, other: shutil.copy(other / name, folder / name)


def _exchange(folder: Path, other: Path) -> None:
    config, card = (folder / CONFIG).read_bytes(), (folder / CARD).read_bytes()
    (folder / CONFIG).write_bytes(card)
    (folder / CARD).write_bytes(config)


def _nest(folder: Path, other: Path) -> None:
    (folder / "deep").mkdir()
    (folder / CARD).rename(folder / "deep" / CARD)


def _sign_by_stranger(folder: Path, other: Path) -> None:
    make_key(other.parent / "stranger.pem", "p256")
    config = model_signing.Config().use_elliptic_key_signer(private_key=other.parent / "stranger.pem")
    config.set_hashing_config(_their_hashing(folder)).sign(folder, folder / MODEL_SIGNATURE)


def _drop_resource(content: dict) -> None:
    """Takes the card out of the list, with a root that fits again: only the signature shows it."""
    resources = [one for one in content["predicate"]["resources"] if one["name"] != CARD]
    root = sha256(b"".join(bytes.fromhex(one["digest"]) for one in resources)).hexdigest()
    content["predicate"]["resources"], content["subject"][0]["digest"]["sha256"] = resources, root


TAMPERINGS: dict[str, Callable[[Path, Path], object]] = {
    "one bit of the weights": _flip(WEIGHTS, -1),
    "one bit of the weights' header": _flip(WEIGHTS, 20),
    "weights cut short": lambda folder, _: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-4]),
    "weights made longer": lambda folder, _: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"\0"),
    "weights emptied": lambda folder, _: (folder / WEIGHTS).write_bytes(b""),
    "weights of another user": _copy(WEIGHTS),
    "another alpha in the config": _edit(CONFIG, '"lora_alpha": 8', '"lora_alpha": 80'),
    "another base in the config": _edit(CONFIG, "tiny-base", "evil-base"),
    "another verdict on the card": _edit(CARD, "tier one", "tier none"),
    "another count in the manifest": _edit(MANIFEST, '"refused": 158', '"refused": 160'),
    "the manifest of another user": _copy(MANIFEST),
    "another certificate": _copy(CERTIFICATE),
    "one bit of the certificate": _flip(CERTIFICATE, 40),
    "the bill removed": lambda folder, _: (folder / BOM).unlink(),
    "another base in the bill": _edit(BOM, "tiny-base", "evil-base"),
    "the certificate removed": lambda folder, _: (folder / CERTIFICATE).unlink(),
    "the manifest removed": lambda folder, _: (folder / MANIFEST).unlink(),
    "the card removed": lambda folder, _: (folder / CARD).unlink(),
    "the weights removed": lambda folder, _: (folder / WEIGHTS).unlink(),
    "weights renamed": lambda folder, _: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
    "a file added": lambda folder, _: (folder / "modeling.py").write_text("import os"),
    "a pickle added": lambda folder, _: (folder / "adapter_model.bin").write_bytes(b"\x80\x04."),
    "a hidden file added": lambda folder, _: (folder / ".env").write_text("X=1"),
    "a file moved into a folder": _nest,
    "two files exchanged": _exchange,
    "weights behind a symbolic link": _symlink,
    "the signature of another folder": _copy(MODEL_SIGNATURE),
    "the signature removed": lambda folder, _: (folder / MODEL_SIGNATURE).unlink(),
    "the signature emptied": lambda folder, _: (folder / MODEL_SIGNATURE).write_bytes(b"{}"),
    "signed anew by a stranger": _sign_by_stranger,
    "signature without signatures": _edit_signature(lambda bundle: bundle["dsseEnvelope"].update(signatures=[])),
    "another payload type": _edit_signature(lambda bundle: bundle["dsseEnvelope"].update(payloadType="text/plain")),
    "a digest changed in the signature": _edit_payload(
        lambda content: content["predicate"]["resources"][0].update(digest="0" * 64)
    ),
    "a file dropped from the signature": _edit_payload(_drop_resource),
    "symbolic links allowed in the signature": _edit_payload(
        lambda content: content["predicate"]["serialization"].update(allow_symlinks=True)
    ),
}


@pytest.fixture
def other(run, key, tmp_path) -> Path:
    """The signed export of another user of the same run."""
    return export(run.path, "Ada", tmp_path / "other" / "out", key)


def test_every_tampering_is_noticed_by_model_signing_and_by_us(folder, other, key, tmp_path):
    assert len(TAMPERINGS) >= 18
    for name, tamper in TAMPERINGS.items():
        copy = tmp_path / "tampered" / slug(name)
        shutil.copytree(folder, copy)
        tamper(copy, other)
        with pytest.raises(Exception) as caught:  # noqa: PT011 - their errors have many types
            accepted(copy, key)
        assert not isinstance(caught.value, AssertionError), name
        assert verify(copy, trusted(key)), name
    accepted(folder, key)


def test_what_model_signing_leaves_out_is_noticed_by_us(folder, key):
    """By default it ignores the files of git; the how-to says so."""
    (folder / ".gitattributes").write_text("* text")
    accepted(folder, key)
    assert verify(folder) == [f".gitattributes is not in {MANIFEST}"]


def test_the_certificate_is_an_in_toto_attestation(folder, key):
    envelope = dsse(folder)
    [name] = envelope.signatures
    envelope.verify([their_key(key, name)], 1)
    statement = Statement.copy_from_pb(_statement(envelope.payload))
    statement.validate()
    assert envelope.payload_type == "application/vnd.in-toto+json"
    content = json.loads(envelope.payload)
    assert content["predicateType"] == PREDICATE_TYPE
    for subject in content["subject"]:
        assert subject["digest"]["sha256"] == sha256((folder / subject["name"]).read_bytes()).hexdigest()
    predicate, manifest = content["predicate"], json.loads((folder / MANIFEST).read_bytes())
    assert predicate["refusals"]["pooled"] == manifest["verdict"]["pooled"]
    assert predicate["delta"] == manifest["verdict"]["delta"]
    assert predicate["base"] == manifest["base"]
    assert predicate["policy"]["hash"] == manifest["policy"]["hash"]
    assert "/home/someone" not in json.dumps(content)
    Draft202012Validator(json.loads(SCHEMA.read_bytes())).validate(predicate)


def _statement(payload: bytes):
    from google.protobuf.json_format import Parse
    from in_toto_attestation.v1 import statement_pb2

    return Parse(payload, statement_pb2.Statement())


def test_a_changed_certificate_is_noticed_by_securesystemslib(folder, key):
    envelope = dsse(folder)
    [name] = envelope.signatures
    envelope.payload = envelope.payload.replace(b'"refused": 158', b'"refused": 160')
    with pytest.raises(VerificationError):
        envelope.verify([their_key(key, name)], 1)


def test_a_certificate_signed_anew_with_another_verdict_does_not_state_the_manifest(folder, key):
    """A releaser's key alone does not make a better verdict: it must be the manifest's."""
    from persona_rlhf.release.attestation import certificate, model_signature
    from persona_rlhf.release.signing import signing_key

    manifest = json.loads((folder / MANIFEST).read_bytes())
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    del files[MODEL_SIGNATURE], files[CERTIFICATE]
    manifest["verdict"]["delta"] = 0.01
    files[CERTIFICATE] = certificate(manifest, files, signing_key(key))
    files[MODEL_SIGNATURE] = model_signature("adapter", files, signing_key(key))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    accepted(folder, key)
    assert verify(folder, trusted(key)) == [f"{CERTIFICATE} does not state the verdict of the manifest"]


@pytest.mark.parametrize("name", [MODEL_SIGNATURE, CERTIFICATE])
@pytest.mark.parametrize("text", ["", "{}", "[]", "3", '{"dsseEnvelope": 3, "payload": 3}', "[" * 100_000])
def test_a_broken_paper_is_one_fault_and_no_crash(folder, key, name, text):
    (folder / name).write_text(text)
    faults = verify(folder, trusted(key))
    assert any(fault.startswith(f"{name} cannot be read") for fault in faults)
    assert f"{name}: no trusted key of a releaser signed it" in faults


def test_another_signed_statement_is_no_signature_of_the_model(folder, key):
    envelope = json.loads((folder / CERTIFICATE).read_bytes())
    (folder / MODEL_SIGNATURE).write_text(json.dumps({"dsseEnvelope": envelope}))
    assert verify(folder, trusted(key)) == [f"{MODEL_SIGNATURE} is no signature of a model"]


@pytest.mark.parametrize("name", [MODEL_SIGNATURE, CERTIFICATE])
def test_a_paper_without_a_signature_is_a_fault_without_keys_too(folder, name):
    content = json.loads((folder / name).read_bytes())
    content.get("dsseEnvelope", content)["signatures"] = []
    (folder / name).write_text(json.dumps(content))
    assert f"{name} holds no signature" in verify(folder)


def test_verify_says_which_signatures_it_did_not_check(folder, key):
    plain = CliRunner().invoke(app, ["verify", str(folder), "--json"])
    notes = json.loads(plain.stdout)["notes"]
    for name in (MODEL_SIGNATURE, CERTIFICATE):
        assert f"{name}: its signature was not checked; give trusted keys (--trust)" in notes
    keys = str(key.with_name("keys.yaml"))
    checked = CliRunner().invoke(app, ["verify", str(folder), "--json", "--trust", keys])
    assert (plain.exit_code, checked.exit_code) == (0, 0)
    assert "not checked" not in checked.stdout


def test_a_stranger_is_no_releaser(run, key, tmp_path):
    make_key(tmp_path / "stranger.pem", "p256")
    folder = export(run.path, "ada", tmp_path / "out", tmp_path / "stranger.pem")
    assert verify(folder) == []
    assert verify(folder, trusted(key)) == [
        f"{name}: no trusted key of a releaser signed it" for name in (MODEL_SIGNATURE, CERTIFICATE)
    ]


def test_a_key_that_model_signing_does_not_take_is_refused(run, tmp_path):
    make_key(tmp_path / "old.pem")
    with pytest.raises(InputError, match="--type p256"):
        export(run.path, "ada", tmp_path / "out", tmp_path / "old.pem")
    assert not (tmp_path / "out").exists()


def test_a_p256_key_also_signs_documents_and_manifests(run, key, tmp_path):
    document = tmp_path / "one.yaml"
    document.write_bytes(b"tier: one\n")
    signature = read_signature(sign_file(document, key))
    [line] = key.with_name("keys.yaml").read_text().splitlines()[1:]
    public = public_bytes(line.removeprefix("  - "))
    assert len(public) == 33
    assert holds(public, signature, b"tier: one\n")
    assert not holds(public, signature, b"tier: two\n")
    folder = run.path / "adapters" / slug("ada")
    sign_file(folder / MANIFEST, key)
    assert verify(folder, trusted(key)) == []
    before = key.read_bytes()
    key.unlink()
    with pytest.raises(InputError, match="name a new file"):
        make_key(key, "p256")  # its public key lies there
    assert not key.exists()
    make_key(tmp_path / "old.pem")
    with pytest.raises(InputError, match="name a new file"):
        make_key(tmp_path / "old.pem", "p256")
    assert not (tmp_path / "old.pem.pub").exists(), "it would be the public key of another private key"
    assert before.startswith(b"-----BEGIN PRIVATE KEY-----")


def test_a_text_that_is_no_point_of_the_curve_is_no_key(key):
    with pytest.raises(ValueError, match="p256"):
        public_bytes("p256:" + base64.b64encode(b"\x02" + b"\xff" * 32).decode())
    with pytest.raises(ValueError, match="p256"):
        public_bytes("ed25519:" + base64.b64encode(b"\x02" * 33).decode())
