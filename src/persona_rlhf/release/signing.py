"""Ed25519 keys and detached signatures, by `cryptography` (extra [sign]), which no other module imports.

A signature is a small JSON file beside what it signs, over all its bytes. Whose key it is, `trust` says.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.release.documents import signature_of
from persona_rlhf.release.folder import write_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

Signer = Callable[[bytes], bytes]
"""Bytes in, the content of their signature file out."""

_ALGORITHM = "ed25519"


class Signature(NamedTuple):
    """A detached signature: the id of the key that made it, and its 64 bytes."""

    key: str
    raw: bytes


def make_key(out: Path) -> str:
    """Writes a new private key to `out` (PEM, for its owner's eyes only: mode 0600); returns the public key as text.

    Raises InputError where something stands there already: a key is never overwritten.
    """
    ed25519, serialization = _library()
    private = ed25519.Ed25519PrivateKey.generate()
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as fault:
        sentence = f"the key cannot be written here ({fault.strerror}); name a new file in a folder that exists"
        raise InputError([Problem(str(out), None, None, sentence)]) from fault
    with os.fdopen(handle, "wb") as stream:
        stream.write(pem)
    return public_text(private.public_key().public_bytes_raw())


def signer(key: Path) -> Signer:
    """What signs with the private key in a file. Raises InputError where there is none in it."""
    private = _private(key)
    own = key_id(private.public_key().public_bytes_raw())

    def sign(content: bytes) -> bytes:
        raw = base64.b64encode(private.sign(content)).decode()
        return (json.dumps({"algorithm": _ALGORITHM, "key": own, "signature": raw}, indent=2) + "\n").encode()

    return sign


def sign_file(file: Path, key: Path) -> Path:
    """Writes the detached signature of a file beside it. Raises InputError where file or key cannot be read."""
    sign = signer(key)
    try:
        content = file.read_bytes()
    except OSError as fault:
        raise InputError([Problem(str(file), None, None, f"it cannot be read ({fault.strerror})")]) from fault
    write_file(signature_of(file), sign(content))
    return signature_of(file)


def read_signature(file: Path) -> Signature:
    """Reads a signature file. Raises ValueError where it is not as `signer` writes it."""
    content = json.loads(file.read_bytes())
    if not isinstance(content, dict) or content.get("algorithm") != _ALGORITHM:
        raise ValueError(f"no signature by {_ALGORITHM}")
    return Signature(str(content["key"]), base64.b64decode(content["signature"], validate=True))


def holds(public: bytes, signature: Signature, content: bytes) -> bool:
    """Whether the owner of a public key (32 bytes) signed this content."""
    from cryptography.exceptions import InvalidSignature

    ed25519, _ = _library()
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public).verify(signature.raw, content)
    except InvalidSignature:
        return False
    return True


def key_id(public: bytes) -> str:
    """What signatures call a key: the first 16 hex digits of the public key's sha256."""
    return hashlib.sha256(public).hexdigest()[:16]


def public_text(public: bytes) -> str:
    """A public key as it stands in a file of trusted keys: `ed25519:` and base64."""
    return f"{_ALGORITHM}:{base64.b64encode(public).decode()}"


def public_bytes(text: str) -> bytes:
    """The 32 bytes of a public key. Raises ValueError where the text is none."""
    algorithm, _, encoded = text.partition(":")
    try:
        raw = base64.b64decode(encoded, validate=True)
    except ValueError:
        raw = b""
    if algorithm != _ALGORITHM or len(raw) != 32:
        raise ValueError("a public key reads `ed25519:` and 44 letters of base64, as `policy keygen` prints it")
    return raw


def _private(key: Path) -> Ed25519PrivateKey:
    ed25519, serialization = _library()
    try:
        found = serialization.load_pem_private_key(key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as fault:
        sentence = f"no private key can be read from it ({type(fault).__name__}); make one with `policy keygen`"
        raise InputError([Problem(str(key), None, None, sentence)]) from fault
    if not isinstance(found, ed25519.Ed25519PrivateKey):
        raise InputError(
            [Problem(str(key), None, None, "this is a key of another kind; make one with `policy keygen`")]
        )
    private: Ed25519PrivateKey = found
    return private


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as fault:
        sentence = "signatures need the package `cryptography`: pip install 'persona-rlhf[sign]'"
        raise InputError([Problem("signing", None, None, sentence)]) from fault
    return ed25519, serialization
