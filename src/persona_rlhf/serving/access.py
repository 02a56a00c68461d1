"""Bearer tokens, rate limits, which adapters may be served."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write
from persona_rlhf.config.training import LoraSettings
from persona_rlhf.release.export import refusals_to_release
from persona_rlhf.release.manifest import MANIFEST, read_manifest
from persona_rlhf.release.results import Result, RunResults
from persona_rlhf.serving.openai_api import APIError

# ----------------------------------------------------------------------------------------------------
# Which adapters of a run may be served at this moment: asked again and again, since a day may change the answer.
# ----------------------------------------------------------------------------------------------------

RECHECK_SECONDS = 10.0
"""How old an answer may be: an edited file or a revocation stops an adapter that is in use after this at the latest."""


class AdapterAccess:
    """The users of a run, by slug, whose adapters fit a base (by the hash of its weights) and these LoRA settings.

    `tell` hears why an adapter is not served, for the people who run the server; its user hears only that it is not.
    """

    def __init__(
        self,
        run: Path,
        weights_hash: str,
        lora: LoraSettings,
        tell: Callable[[str], None],
        only: Collection[str] | None = None,
    ) -> None:
        """`only` these users are kept, of a run of many. Raises InputError where the run has no results."""
        self.run, self._base, self._lora, self._tell = run, weights_hash, lora.model_dump(mode="json"), tell
        self.results = {one.slug: one for one in RunResults(run) if only is None or one.slug in only}
        self._checked: dict[str, tuple[float, bool]] = {}
        self._lock = threading.Lock()

    def check(self, slug: str, again: bool = False) -> Result:
        """The line of a user who may be served, looked at anew where the last look is old, or `again` is asked.

        Raises Declined where he may not.
        """
        with self._lock:
            moment, fine = self._checked.get(slug, (-RECHECK_SECONDS, False))
            if again or time.monotonic() - moment >= RECHECK_SECONDS:
                reasons = self.reasons(slug)
                fine = not reasons
                self._checked[slug] = (time.monotonic(), fine)
                if reasons:
                    self._tell(f"{slug} is not served: {'; '.join(reasons)}")
        if not fine:
            raise APIError(403, "The adapter behind this model may not be served at present.", "adapter_not_served")
        return self.results[slug]

    def folder(self, slug: str) -> Path:
        """Where the adapter of a released user lies."""
        path = self.results[slug].path
        assert path is not None, f"{slug} is not released"
        return self.run / path

    def reasons(self, slug: str) -> list[str]:
        """Why a user's adapter may not be served; an empty list where it may."""
        result = self.results.get(slug)
        if result is None:
            return ["the run has no such user"]
        reasons = refusals_to_release(self.run, result)
        if reasons:
            return reasons
        manifest, faults = read_manifest(self.folder(slug) / MANIFEST)
        return faults if manifest is None else self._misfits(manifest)

    def _misfits(self, manifest: dict[str, Any]) -> list[str]:
        reasons = []
        if manifest["base"]["weights_sha256"] != self._base:
            reasons.append("it was released for another base: the hash of the weights is not that of this one")
        if manifest["settings"]["lora"] != self._lora:
            reasons.append("it was trained with other LoRA settings than those of this run's config")
        return reasons


# ----------------------------------------------------------------------------------------------------
# How much one user, and all together, may ask of a server.
# ----------------------------------------------------------------------------------------------------


class Limits(NamedTuple):
    """`body` in bytes, `tokens` of an answer, requests of one user a minute (`rate`), and answers written at the same
    time, of all users (`concurrent`) and of one (`concurrent_each`)."""

    body: int = 1 << 20
    tokens: int = 512
    rate: int = 60
    concurrent: int = 32
    concurrent_each: int = 4


class RateLimiter:
    """Lets requests in, as far as the limits go. The rate is a bucket: a minute's worth at once, then as it refills."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._buckets: dict[str, tuple[float, float]] = {}  # requests left, at this moment
        self._running: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, slug: str) -> None:
        """One more request of a user. Raises Declined (429), with the seconds to wait, where he asks too often."""
        with self._lock:
            now, rate = self._clock(), self._limits.rate
            left, moment = self._buckets.get(slug, (float(rate), now))
            left = min(float(rate), left + (now - moment) * rate / 60)
            fine = left >= 1
            self._buckets[slug] = (left - fine, now)
        if not fine:
            wait = math.ceil((1 - left) * 60 / rate)
            raise APIError(429, f"At most {rate} requests a minute.", "rate_limit_exceeded", retry_after=max(1, wait))

    @contextmanager
    def inside(self, slug: str) -> Iterator[None]:
        """Holds a place while an answer is written. Raises Declined (429) where there is none."""
        with self._lock:
            if self._running[slug] >= self._limits.concurrent_each:
                sentence = f"At most {self._limits.concurrent_each} requests of one user at a time."
                raise APIError(429, sentence, "rate_limit_exceeded", retry_after=1)
            if self._running.total() >= self._limits.concurrent:
                raise APIError(429, "The server is busy.", "rate_limit_exceeded", retry_after=1)
            self._running[slug] += 1
        try:
            yield
        finally:
            with self._lock:
                self._running[slug] -= 1
                self._running += Counter()  # those who have left are forgotten


# ----------------------------------------------------------------------------------------------------
# Bearer tokens, one a user: the file holds hashes only, and a token opens one user's adapter and no other.
# ----------------------------------------------------------------------------------------------------

_PREFIX = "prlhf"


class TokenEntry(NamedTuple):
    """A line of the file: whose token it is (slug), its name (`key`, 16 hex digits), and the sha256 of all of it."""

    slug: str
    key: str
    sha256: str


class Tokens:
    """The tokens of a file."""

    def __init__(self, entries: Iterable[TokenEntry]) -> None:
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
            entries.append(TokenEntry(slug, key, _hash(made[slug])))
    if made:
        _write(file, entries)
    return made


def _hash(token: str) -> str:
    """A token has 256 random bits: a plain hash of it tells nothing."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _read(file: Path) -> list[TokenEntry]:
    entries, problems = list[TokenEntry](), list[Problem]()
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            entries.append(_ENTRY.validate_json(line))
        except ValidationError:
            sentence = 'a line reads {"slug": ..., "key": ..., "sha256": ...}; take this one out and make tokens anew'
            problems.append(Problem(str(file), number, None, sentence))
    if problems:
        raise InputError(problems)
    return entries


def _write(file: Path, entries: Iterable[TokenEntry]) -> None:
    atomic_write(file, (json.dumps(entry._asdict()) + "\n" for entry in entries), private=True)


_NOBODY = TokenEntry("", "", _hash(secrets.token_urlsafe(32)))
_ENTRY = TypeAdapter(TokenEntry)
