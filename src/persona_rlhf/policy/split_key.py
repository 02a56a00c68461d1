"""Split keys: a file whose last line splits the public probes that are not in `train` anew."""

from __future__ import annotations

import hashlib
from pathlib import Path

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write
from persona_rlhf.policy.private_banks import KEY, ROTATE, need_outside

_SHORTEST_KEY, _FEWEST_CHARACTERS = 16, 8
"""Length of a split key, and its different characters. Manifests have a hash of it, by which a short one is guessed."""


def read_split_key(file: Path) -> bytes:
    """The key in force: 32 bytes from the last line of the file. Raises InputError where it is missing or too short."""
    return read_split_keys(file)[-1]


def key_hash(key: bytes) -> str:
    """A hash that names a split key and shows nothing of it."""
    return hashlib.blake2b(b"persona-rlhf split key", key=key, digest_size=16).hexdigest()


def read_split_keys(file: Path) -> list[bytes]:
    """The keys of a file from the first to the one in force. Raises InputError where there is none, or a weak one."""
    return list(map(key_bytes, _key_lines(file)))


def _key_lines(file: Path) -> list[str]:
    need_outside(file, KEY)
    try:
        lines = [line.strip() for line in file.expanduser().read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as fault:
        why = fault.strerror if isinstance(fault, OSError) else "it is no text"
        sentence = f"the key cannot be read ({why}); name a text file, or a new one, and {ROTATE} makes a key"
        raise InputError([Problem(str(file), None, KEY, sentence)]) from None
    if not any(lines):
        raise InputError([Problem(str(file), None, KEY, f"there is no key in this file; {ROTATE} appends one")])
    weak = [number for number, line in enumerate(lines, 1) if line and not _is_strong(line)]
    if weak:
        sentence = (
            f"a key has at least {_SHORTEST_KEY} printable characters, {_FEWEST_CHARACTERS} of them different: "
            "manifests have its hash, by which a weaker one can be guessed; take the line out, and "
            f"{ROTATE} appends a random key"
        )
        raise InputError([Problem(str(file), number, KEY, sentence) for number in weak])
    return list(filter(None, lines))


def _is_strong(key: str) -> bool:
    return len(key) >= _SHORTEST_KEY and len(set(key)) >= _FEWEST_CHARACTERS and key.isprintable()


def key_bytes(key: str) -> bytes:
    """The 32 bytes of a line of a key file."""
    return hashlib.sha256(key.encode()).digest()


def is_blank(file: Path) -> bool:
    """Whether a file of split keys is missing, or is a regular file without a key."""
    place = file.expanduser()
    return not place.exists() or (place.is_file() and not place.read_bytes().strip())


def append_split_key(file: Path, key: str) -> None:
    """Appends a split key to its file, which may be new; it is in force from then on.

    Raises InputError where there is no folder for it, or something that is no file of keys.
    """
    place = file.expanduser()
    if not place.parent.is_dir():
        sentence = "the folder of this file does not exist; make it, or name another file"
        raise InputError([Problem(str(file), None, KEY, sentence)])
    lines = [] if is_blank(file) else _key_lines(file)
    atomic_write(place, (f"{line}\n" for line in (*lines, key)), private=True)
