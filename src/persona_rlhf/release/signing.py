"""Signatures (Ed25519, or ECDSA with P-256), trusted keys (keys.yaml), and the policy documents kept in RUN/policy.

A run keeps its documents of tiers one and two byte for byte, named by the sha256 in policy.json, with their signatures.
Documents of tier three hold a user's own text and are not kept. A signature is a small JSON file over all bytes of the
file beside it; `Trust` maps keys to roles. Without trusted keys, roles are self-declared. Only this module imports
`cryptography` (extra [sign]).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write, find
from persona_rlhf.config.loader import Section, dotted, in_order, read_section, read_yaml
from persona_rlhf.policy.rules import DocumentInfo
from persona_rlhf.release.manifest import MANIFEST, read_manifest

POLICY = "policy"
SIGNATURE = ".sig"  # suffix of a detached signature


def keep_documents(run: Path, documents: Sequence[DocumentInfo]) -> None:
    """Copies the documents of tiers one and two into the run, with their signatures."""
    (run / POLICY).mkdir(exist_ok=True)
    for document in documents:
        if document.tier < 3:
            source, copy = find(document.path), copy_of(run, document.sha256)
            atomic_write(copy, source.read_bytes())
            signature = signature_of(source)
            if signature.is_file():
                atomic_write(signature_of(copy), signature.read_bytes())


def copy_of(run: Path, digest: str) -> Path:
    """The run's copy of the document with this sha256."""
    return run / POLICY / f"{digest}.yaml"


def signature_of(file: Path) -> Path:
    """The path of a file's detached signature."""
    return file.with_name(file.name + SIGNATURE)


def document_faults(run: Path, documents: Sequence[Mapping[str, Any]], accepted: Collection[str]) -> list[str]:
    """Kept copies that are not the documents of policy.json, and documents changed since the run.

    `documents` as policy.json lists them; `accepted` are the sha256 of documents that the run was recertified by. Runs
    of early versions keep no copies and have no such faults.
    """
    if not (run / POLICY).is_dir():
        return []
    faults, names = list[str](), set[str]()
    for document in documents:
        if document["tier"] > 2:
            continue
        copy = copy_of(run, document["sha256"])
        names |= {copy.name, signature_of(copy).name}
        name = f"{document['path']} (tier {document['tier']}, {document['issuer']})"
        kept, original = _bytes(copy), _original(document["path"])
        if kept is None:
            faults.append(f"{POLICY}/{copy.name}, the run's copy of {name}, is missing")
        elif sha256(kept).hexdigest() != document["sha256"]:
            unchanged = original is not None and sha256(original).hexdigest() == document["sha256"]
            place = _place(kept, original) if original is not None and unchanged else ""
            faults.append(f"{POLICY}/{copy.name}, the run's copy of {name}, was changed{place}")
        elif original is not None and sha256(original).hexdigest() not in (document["sha256"], *accepted):
            faults.append(
                f"{name} was changed{_place(original, kept)} since this run was judged by it: restore it, or test the "
                "adapters again with `recertify`"
            )
    extra = {file.name for file in (run / POLICY).iterdir()} - names
    return faults + [f"{POLICY}/{name} is no document of policy.json" for name in sorted(extra)]


def _bytes(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _original(path: str) -> bytes | None:
    """The content of a document at its original path; None if there is no such file here."""
    try:
        return _bytes(find(path))
    except InputError:
        return None


def _place(changed: bytes, original: bytes) -> str:
    """` on line 7`: the first line in which two texts differ."""
    pairs = enumerate(zip_longest(changed.splitlines(True), original.splitlines(True)), 1)
    return next((f" on line {number}" for number, (one, other) in pairs if one != other), "")


Signer = Callable[[bytes], bytes]
"""From bytes to the content of their signature file."""

KeyKind = Literal["ed25519", "p256"]
_LENGTHS: dict[int, KeyKind] = {32: "ed25519", 33: "p256"}
"""The kind of a public key by its length in bytes: a point of Ed25519, a compressed point of P-256."""

PUBLIC = ".pub"  # suffix of the public key (PEM) beside a private key of kind p256


class Signature(NamedTuple):
    """A detached signature: the id of the key that made it, and its bytes (64 of Ed25519; DER of P-256)."""

    key: str
    raw: bytes


def make_key(out: Path, kind: KeyKind = "ed25519") -> str:
    """Writes a new private key to `out` (PEM, mode 0600); returns the public key as text.

    Of a key of kind p256, the public key (PEM) is written beside it, for tools of third parties. Raises InputError if
    a file exists: a key is never overwritten.
    """
    ed25519, ec, serialization = _library()
    private = ed25519.Ed25519PrivateKey.generate() if kind == "ed25519" else ec.generate_private_key(ec.SECP256R1())
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = out.with_name(out.name + PUBLIC)
    if kind == "p256" and not out.exists():
        _write_new(public, _pem(private.public_key()), 0o644)
    _write_new(out, pem, 0o600)
    return public_text(_public(private))


def _write_new(file: Path, content: bytes, mode: int) -> None:
    try:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except OSError as fault:
        sentence = f"the key cannot be written here ({fault.strerror}); name a new file in a folder that exists"
        raise InputError([Problem(str(file), None, None, sentence)]) from fault
    with os.fdopen(handle, "wb") as stream:
        stream.write(content)


class SigningKey(NamedTuple):
    """A private key in use: the bytes of its public key, the public key as PEM, and the signature of bytes."""

    public: bytes
    public_pem: bytes
    sign: Callable[[bytes], bytes]

    @property
    def kind(self) -> KeyKind:
        """The kind of this key."""
        return _LENGTHS[len(self.public)]


def signing_key(file: Path) -> SigningKey:
    """The private key in a file. Raises InputError if it holds none."""
    private = _private(file)
    public = _public(private)
    if _LENGTHS[len(public)] == "ed25519":
        return SigningKey(public, _pem(private.public_key()), private.sign)
    return SigningKey(public, _pem(private.public_key()), lambda content: private.sign(content, _ecdsa()))


def signer(key: Path) -> Signer:
    """A signer with the private key in a file. Raises InputError if it holds none."""
    private = signing_key(key)

    def sign(content: bytes) -> bytes:
        raw = base64.b64encode(private.sign(content)).decode()
        entry = {"algorithm": private.kind, "key": key_id(private.public), "signature": raw}
        return (json.dumps(entry, indent=2) + "\n").encode()

    return sign


def sign_file(file: Path, key: Path) -> Path:
    """Writes the detached signature of a file. Raises InputError if file or key cannot be read."""
    sign = signer(key)
    try:
        content = file.read_bytes()
    except OSError as fault:
        raise InputError([Problem(str(file), None, None, f"it cannot be read ({fault.strerror})")]) from fault
    atomic_write(signature_of(file), sign(content))
    return signature_of(file)


def read_signature(file: Path) -> Signature:
    """Reads a signature file. Raises ValueError if it is not in the form that `signer` writes."""
    content = json.loads(file.read_bytes())
    if not isinstance(content, dict) or content.get("algorithm") not in _LENGTHS.values():
        raise ValueError(f"no signature by {' or '.join(_LENGTHS.values())}")
    return Signature(str(content["key"]), base64.b64decode(content["signature"], validate=True))


def holds(public: bytes, signature: Signature, content: bytes) -> bool:
    """Whether the owner of a public key (32 or 33 bytes) signed this content."""
    from cryptography.exceptions import InvalidSignature

    ed25519, ec, _ = _library()
    try:
        if _LENGTHS[len(public)] == "ed25519":
            ed25519.Ed25519PublicKey.from_public_bytes(public).verify(signature.raw, content)
        else:
            point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), public)
            point.verify(signature.raw, content, _ecdsa())
    except InvalidSignature:
        return False
    return True


def key_id(public: bytes) -> str:
    """The id of a key in signatures: the first 16 hex digits of the public key's sha256."""
    return hashlib.sha256(public).hexdigest()[:16]


def public_text(public: bytes) -> str:
    """A public key as text in a file of trusted keys: `ed25519:` or `p256:`, and base64."""
    return f"{_LENGTHS[len(public)]}:{base64.b64encode(public).decode()}"


def public_bytes(text: str) -> bytes:
    """The 32 or 33 bytes of a public key. Raises ValueError if the text is none."""
    kind, _, encoded = text.partition(":")
    try:
        raw = base64.b64decode(encoded, validate=True)
        if _LENGTHS.get(len(raw)) == "p256":
            _, ec, _ = _library()
            ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), raw)
    except ValueError:
        raw = b""
    if _LENGTHS.get(len(raw)) != kind:
        sentence = "a public key reads `ed25519:` or `p256:` and 44 letters of base64, as `policy keygen` prints it"
        raise ValueError(sentence)
    return raw


def _private(key: Path) -> Any:
    ed25519, ec, serialization = _library()
    try:
        private = serialization.load_pem_private_key(key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as fault:
        sentence = f"no private key can be read from it ({type(fault).__name__}); make one with `policy keygen`"
        raise InputError([Problem(str(key), None, None, sentence)]) from fault
    of_p256 = isinstance(private, ec.EllipticCurvePrivateKey) and isinstance(private.curve, ec.SECP256R1)
    if not (of_p256 or isinstance(private, ed25519.Ed25519PrivateKey)):
        raise InputError(
            [Problem(str(key), None, None, "this is a key of another kind; make one with `policy keygen`")]
        )
    return private


def _public(private: Any) -> bytes:
    """The public key of a private one: 32 bytes of Ed25519, or the compressed point (33 bytes) of P-256."""
    ed25519, _, serialization = _library()
    public = private.public_key()
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return bytes(public.public_bytes_raw())
    return bytes(public.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint))


def _pem(public: Any) -> bytes:
    _, _, serialization = _library()
    return bytes(public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))


def _ecdsa() -> Any:
    from cryptography.hazmat.primitives.hashes import SHA256

    _, ec, _ = _library()
    return ec.ECDSA(SHA256())


def _library() -> tuple[Any, Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    except ImportError as fault:
        sentence = "signatures need the package `cryptography`: pip install 'persona-rlhf[sign]'"
        raise InputError([Problem("signing", None, None, sentence)]) from fault
    return ed25519, ec, serialization


Role = Literal["model_provider", "application_provider", "releaser"]
_ISSUER: dict[int, Role] = {1: "model_provider", 2: "application_provider"}
SELF_DECLARED = "roles are self-declared: no keys were given to check signatures by (--trust)"


class _Keys(Section):
    """A file of trusted keys: for each role, the public keys as `policy keygen` prints them."""

    model_provider: list[str] = Field([], description="Who may sign documents of tier one.")
    application_provider: list[str] = Field([], description="Who may sign documents of tier two.")
    releaser: list[str] = Field([], description="Who may sign the manifests of adapters.")


class Trust(NamedTuple):
    """The trusted public keys (32 or 33 bytes) of every role, by key id."""

    keys: Mapping[Role, Mapping[str, bytes]]

    def fault(self, file: Path, role: Role) -> str | None:
        """The reason why a file has no valid signature of this role; None if it has one."""
        try:
            signature, content = read_signature(signature_of(file)), file.read_bytes()
        except FileNotFoundError:
            return f"no {role} has signed it"
        except (OSError, ValueError, KeyError, TypeError) as fault:
            return f"its signature cannot be read ({type(fault).__name__})"
        public = self.keys[role].get(signature.key)
        if public is None:
            return f"it is signed with the key {signature.key[:64]}, which is not a trusted key of any {role}"
        return (
            None
            if holds(public, signature, content)
            else f"the signature of the {role} does not match this content: the file was changed after it was signed"
        )


def read_trust(file: Path) -> Trust:
    """Reads a file of trusted keys. Raises InputError with every problem in it."""
    document = read_yaml(file)
    section = read_section(_Keys, document)
    keys: dict[Role, dict[str, bytes]] = {"model_provider": {}, "application_provider": {}, "releaser": {}}
    problems = list[Problem]()
    for role, keys_of_role in keys.items():
        for number, text in enumerate(getattr(section, role)):
            try:
                public = public_bytes(text)
                keys_of_role[key_id(public)] = public
            except ValueError as fault:
                place = document.place((role, number))
                problems.append(Problem(place.file, place.line, dotted((role, number)), str(fault)))
    if problems:
        raise InputError(in_order(problems))
    return Trust(keys)


def untrusted_documents(run: Path, documents: Sequence[Mapping[str, Any]], trust: Trust) -> list[str]:
    """The documents of tiers one and two without a valid signature of the issuer's role."""
    faults = []
    for document in documents:
        role = _ISSUER.get(document["tier"])
        if role is not None and (fault := trust.fault(copy_of(run, document["sha256"]), role)) is not None:
            faults.append(f"{document['path']} (tier {document['tier']}, {document['issuer']}): {fault}")
    return faults


def untrusted_adapters(
    run: Path, folders: Iterable[str], documents: Sequence[Mapping[str, Any]], trust: Trust
) -> list[str]:
    """The adapters of a run without a valid signature of a releaser, or with other documents than policy.json."""
    digests = {document["sha256"] for document in documents if document["tier"] in _ISSUER}
    faults = []
    for path in folders:
        faults += [f"{path}: {fault}" for fault in untrusted_adapter(run / path, trust)]
        manifest, _ = read_manifest(run / path / MANIFEST)
        listed = (manifest or {}).get("policy", {}).get("documents", [])
        if {document["sha256"] for document in listed} != digests:
            faults.append(f"{path}: {MANIFEST} names other policy documents than policy.json")
    return faults


def untrusted_adapter(folder: Path, trust: Trust) -> list[str]:
    """The reason why an adapter's manifest has no valid signature of a releaser; an empty list if it has one."""
    fault = trust.fault(folder / MANIFEST, "releaser")
    return [] if fault is None else [f"{MANIFEST}: {fault}"]
