"""Bearer tokens, one a user: the file holds hashes only, and a token opens one user's adapter and no other."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from persona_rlhf.inputs.problems import InputError, Problem

_PREFIX = "prlhf"


class Entry(NamedTuple):
    """A line of the file: whose token it is (slug), its name (`key`, 16 hex digits), and the sha256 of all of it."""

    slug: str
    key: str
    sha256: str


class Tokens:
    """The tokens of a file."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries = {entry.key: entry for entry in entries}

    @property
    def slugs(self) -> set[str]:
        """The users who have a token."""
        return {entry.slug for entry in self._entries.values()}

    def holder(self, token: str) -> str | None:
        """Whose token this is (slug); None where it is nobody's. The time it takes does not depend on the secret."""
        key = token.split("_")[1] if token.count("_") >= 2 else ""
        entry = self._entries.get(key, _NOBODY)
        return entry.slug if hmac.compare_digest(_hash(token), entry.sha256) else None


def read_tokens(file: Path) -> Tokens:
    """The tokens of a file. Raises InputError where there is none, naming every line that is no entry."""
    try:
        return Tokens(_read(file))
    except OSError as fault:
        remedy = "make one with `persona-rlhf serve RUN --tokens FILE --make-tokens`"
        raise InputError(
            [Problem(str(file), None, "--tokens", f"cannot be read ({fault.strerror}); {remedy}")]
        ) from fault


def make_tokens(file: Path, slugs: Iterable[str]) -> dict[str, str]:
    """Makes tokens for those of these users who have none in the file yet, and adds their hashes to it.

    Returns the new tokens by slug: they are nowhere else. Raises InputError where the file is no file of tokens.
    """
    entries = _read(file) if file.exists() else []
    known = {entry.slug for entry in entries}
    made: dict[str, str] = {}
    for slug in dict.fromkeys(slugs):
        if slug not in known:
            key = secrets.token_hex(8)
            made[slug] = f"{_PREFIX}_{key}_{secrets.token_urlsafe(32)}"
            entries.append(Entry(slug, key, _hash(made[slug])))
    if made:
        _write(file, entries)
    return made


def _hash(token: str) -> str:
    """A token has 256 random bits: a plain hash of it tells nothing."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _read(file: Path) -> list[Entry]:
    entries, problems = list[Entry](), list[Problem]()
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            entries.append(_ENTRY.validate_json(line))
        except ValidationError:
            sentence = 'a line reads {"slug": ..., "key": ..., "sha256": ...}; take this one out and make tokens anew'
            problems.append(Problem(str(file), number, None, sentence))
    if problems:
        raise InputError(problems)
    return entries


def _write(file: Path, entries: Iterable[Entry]) -> None:
    """Whole or not at all, and for its owner's eyes only from the first byte."""
    half = file.with_name(f".{file.name}.half")
    half.unlink(missing_ok=True)
    with os.fdopen(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.writelines(json.dumps(entry._asdict()) + "\n" for entry in entries)
        stream.flush()
        os.fsync(stream.fileno())
    half.replace(file)


_NOBODY = Entry("", "", _hash(secrets.token_urlsafe(32)))
_ENTRY = TypeAdapter(Entry)
