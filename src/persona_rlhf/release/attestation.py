"""Signatures of an exported folder in formats that other tools verify.

`model.sig` is an OpenSSF Model Signing v1.0 signature, a sigstore bundle v0.3. `certificate.intoto.json` is the verdict
as an in-toto attestation: Statement v1 in a DSSE v1.0 envelope.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import sha256_of
from persona_rlhf.release.bom import BOM, bom_faults
from persona_rlhf.release.manifest import MANIFEST
from persona_rlhf.release.signing import (
    Signature,
    SigningKey,
    Trust,
    holds,
    key_id,
    signature_of,
    signing_key,
    untrusted_adapter,
)

MODEL_SIGNATURE, CERTIFICATE = "model.sig", "certificate.intoto.json"
PAPERS = (MODEL_SIGNATURE, CERTIFICATE, BOM)
"""Files that `export` may write beside those of a manifest."""

PREDICATE_TYPE = "urn:persona-rlhf:refusal-certificate:v1"
_STATEMENT, _PAYLOAD = "https://in-toto.io/Statement/v1", "application/vnd.in-toto+json"
_MODEL_SIGNING = "https://model_signing/signature/v1.0"
_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"


def attestation_key(file: Path) -> SigningKey:
    """The private key in a file. Raises InputError if it holds none, or one that model_signing does not accept."""
    key = signing_key(file)
    if key.kind != "p256":
        sentence = "OpenSSF Model Signing takes no Ed25519 key; make one with `policy keygen --type p256`"
        raise InputError([Problem(str(file), None, "--sign", sentence)])
    return key


def model_signature(name: str, files: Mapping[str, bytes], key: SigningKey) -> bytes:
    """`model.sig` over all files of a folder; `name` names the model in it.

    The subject's digest is the sha256 over the files' digests in the order of their names (model_signing 1.1,
    `_signing/signing.py`).
    """
    digests = {file: hashlib.sha256(files[file]) for file in sorted(files)}
    root = hashlib.sha256(b"".join(digest.digest() for digest in digests.values())).hexdigest()
    predicate = {
        "serialization": {
            "method": "files",
            "hash_type": "sha256",
            "allow_symlinks": False,
            "ignore_paths": [MODEL_SIGNATURE],
        },
        "resources": [
            {"name": file, "algorithm": "sha256", "digest": digest.hexdigest()} for file, digest in digests.items()
        ],
    }
    statement = _statement([(name, root)], _MODEL_SIGNING, predicate)
    bundle = {
        "mediaType": _BUNDLE,
        "verificationMaterial": {
            "publicKey": {"hint": hashlib.sha256(key.public_pem).hexdigest()},
            "tlogEntries": [],
        },
        "dsseEnvelope": _envelope(statement, key, ""),
    }
    return _rendered(bundle)


def certificate(manifest: Mapping[str, Any], files: Mapping[str, bytes], key: SigningKey) -> bytes:
    """`certificate.intoto.json`: the verdict in a manifest as an attestation about these files of its folder."""
    subjects = [(file, hashlib.sha256(files[file]).hexdigest()) for file in sorted(files)]
    statement = _statement(subjects, PREDICATE_TYPE, certificate_predicate(manifest))
    return _rendered(_envelope(statement, key, key_id(key.public)))


def certificate_predicate(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The predicate of a certificate: the guarantee of a manifest, its evidence and its conditions.

    docs/reference/refusal-certificate.md describes the entries.
    """
    verdict, gate, policy = manifest["verdict"], manifest["settings"].get("gate") or {}, manifest["policy"]
    return {
        "toolkit": manifest["toolkit"],
        "manifestHash": manifest["manifest_hash"],
        "base": manifest["base"],
        "policy": {key: policy[key] for key in ("hash", "tier_one_hash", "documents")},
        "bank": policy.get("bank"),
        "adapter": manifest.get("adapter"),
        "certified": verdict["certified"],
        "alpha": manifest["alpha"],
        "delta": verdict["delta"],
        "confidence": verdict["confidence"],
        "refusals": {"pooled": verdict["pooled"], "categories": verdict["categories"]},
        "counted": verdict.get("counted"),
        "pooledOver": verdict["pooled_over"],
        "looks": verdict["looks"],
        "spending": verdict.get("spending"),
        "judge": {
            "kind": gate.get("judge"),
            "model": gate.get("judge_model"),
            "error": verdict.get("judge_error"),
            "calibration": gate.get("judge_calibration"),
        },
        "conditions": manifest.get("conditions"),
        "validUntil": verdict.get("valid_until"),
        "auditHead": manifest.get("audit"),
    } | ({"certifiedWith": manifest["certified_with"]} if "certified_with" in manifest else {})


def paper_faults(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Papers of a folder that do not describe its files and its manifest, or hold no signature.

    Signatures are not checked: that needs trusted keys (`untrusted_export`).
    """
    faults = list[str]()
    for name, check in ((BOM, _bom_faults), (CERTIFICATE, _certificate_faults), (MODEL_SIGNATURE, _model_faults)):
        if (folder / name).is_file():
            try:
                faults += check(folder, manifest)
                if name != BOM and not _read_envelope(folder / name)["signatures"]:
                    faults.append(f"{name} holds no signature")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
                faults.append(f"{name} cannot be read ({type(fault).__name__}: {fault})")
    return faults


def _bom_faults(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    digests = {file.name: sha256_of(file) for file in folder.iterdir() if file.name not in PAPERS}
    return bom_faults((folder / BOM).read_bytes(), manifest, digests)


def _certificate_faults(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    statement = _payload(folder / CERTIFICATE)
    subjects = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
    faults = _subject_faults(folder, CERTIFICATE, {MODEL_SIGNATURE, CERTIFICATE}, subjects)
    if statement["predicateType"] != PREDICATE_TYPE or statement["predicate"] != certificate_predicate(manifest):
        faults.append(f"{CERTIFICATE} does not state the verdict of the manifest")
    return faults


def _model_faults(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    statement = _payload(folder / MODEL_SIGNATURE)
    if statement["predicateType"] != _MODEL_SIGNING:
        return [f"{MODEL_SIGNATURE} is no signature of a model"]
    digests = {resource["name"]: resource["digest"] for resource in statement["predicate"]["resources"]}
    return _subject_faults(folder, MODEL_SIGNATURE, {MODEL_SIGNATURE}, digests)


def untrusted_export(folder: Path, trust: Trust) -> list[str]:
    """The reasons why an adapter's folder has no valid signature of a releaser; an empty list if it has one.

    A signed `model.sig` stands for the signature of the manifest, which it covers (`paper_faults`).
    """
    keys = list(trust.keys["releaser"].values())
    present = [name for name in (MODEL_SIGNATURE, CERTIFICATE) if (folder / name).is_file()]
    faults = [f"{name}: no trusted key of a releaser signed it" for name in present if not _signed(folder / name, keys)]
    covered = MODEL_SIGNATURE in present and not signature_of(folder / MANIFEST).exists()
    return faults if covered else [*untrusted_adapter(folder, trust), *faults]


def unchecked_signatures(folder: Path) -> list[str]:
    """A sentence for each signed paper of an adapter's folder, for a reader who has no trusted keys."""
    present = [name for name in (MODEL_SIGNATURE, CERTIFICATE) if (folder / name).is_file()]
    return [f"{name}: its signature was not checked; give trusted keys (--trust)" for name in present]


def _signed(file: Path, keys: Iterable[bytes]) -> bool:
    try:
        envelope = _read_envelope(file)
        raw = [base64.b64decode(entry["sig"], validate=True) for entry in envelope["signatures"]]
        content = _pae(str(envelope["payloadType"]), base64.b64decode(envelope["payload"], validate=True))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return any(holds(public, Signature("", one), content) for public in keys for one in raw)


def _subject_faults(folder: Path, paper: str, later: set[str], digests: Mapping[str, str]) -> list[str]:
    """Differences of a paper's list of files from a folder; `later` are the papers that it cannot list."""
    names = {file.name for file in folder.iterdir()} - later
    faults = [f"{paper} does not cover {name}" for name in sorted(names - set(digests))]
    for name in sorted(digests):
        if name not in names:
            faults.append(f"{paper} covers {name}, which is not in this folder")
        elif sha256_of(folder / name) != digests[name]:
            faults.append(f"{name} is not the file that {paper} covers")
    return faults


def _payload(file: Path) -> dict[str, Any]:
    envelope = _read_envelope(file)
    content = json.loads(base64.b64decode(envelope["payload"], validate=True))
    if envelope["payloadType"] != _PAYLOAD or content["_type"] != _STATEMENT:
        raise ValueError(f"{file.name} holds no in-toto Statement v1")
    return dict(content)


def _read_envelope(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_bytes())
    return dict(content["dsseEnvelope"] if file.name == MODEL_SIGNATURE else content)


def _statement(subjects: Iterable[tuple[str, str]], predicate_type: str, predicate: Mapping[str, Any]) -> bytes:
    """An in-toto Statement v1 about files or models with these sha256."""
    content = {
        "_type": _STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in subjects],
        "predicateType": predicate_type,
        "predicate": predicate,
    }
    return json.dumps(content, sort_keys=True, allow_nan=False).encode()


def _envelope(payload: bytes, key: SigningKey, key_name: str) -> dict[str, Any]:
    """A DSSE envelope (v1.0, envelope.md) with one signature."""
    raw = key.sign(_pae(_PAYLOAD, payload))
    return {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": _PAYLOAD,
        "signatures": [{"keyid": key_name, "sig": base64.b64encode(raw).decode()}],
    }


def _pae(payload_type: str, payload: bytes) -> bytes:
    """The pre-authentication encoding of DSSE (v1.0, protocol.md)."""
    return b"DSSEv1 %d %s %d %s" % (len(payload_type.encode()), payload_type.encode(), len(payload), payload)


def _rendered(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
