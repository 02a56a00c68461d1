"""Admission to a server: which adapters may be served, how much a user may request, and bearer tokens."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write
from persona_rlhf.common.json_lines import read_json_lines
from persona_rlhf.config.training import LoraSettings
from persona_rlhf.release.compatibility import WEIGHTS
from persona_rlhf.release.export import refusals_to_release
from persona_rlhf.release.manifest import MANIFEST, read_manifest, rendered, uncertified
from persona_rlhf.release.results import RESULTS, Result, RunResults
from persona_rlhf.serving.openai_api import AdmittedAdapter, APIError, TextGenerator

RECHECK_SECONDS = 10.0
"""Age at which an admission is checked again: an edited or revoked adapter is served for this long at most."""


class AdapterAccess:
    """The users of a run, by slug, whose adapters fit one base and these LoRA settings.

    `weights_hash` is the hash of the base's weights. `log` receives the reasons why an adapter is not served; the
    user is told only that it is not.
    """

    def __init__(
        self,
        run: Path,
        weights_hash: str,
        lora: LoraSettings,
        log: Callable[[str], None],
        only: Collection[str] | None = None,
        running: Mapping[str, str] | None = None,
    ) -> None:
        """Keeps the users in `only`, or all. Raises InputError if the run has no results.

        `running` is the computation of the engine, where it is known. `log` hears once of each other computation that
        an adapter was certified in.
        """
        self._running, self._other_conditions = running, set[str]()
        self.run, self.weights_hash, self._lora, self._log = run, weights_hash, lora.model_dump(mode="json"), log
        self._only, self._stamp = only, (0, 0)
        self.results: dict[str, Result] = {}
        self._checks: dict[str, tuple[float, AdmittedAdapter | None]] = {}  # time of the check, and its result
        self._withheld: dict[str | None, str] = {}  # by the hash of the manifest
        self._refusal_hooks: list[Callable[[str], None]] = []
        self._lock = threading.RLock()  # `admit` holds it while it refreshes
        self.refresh()

    def refresh(self) -> None:
        """Reads the results again where `add` replaced them; adapters are then checked anew."""
        lines, stat = RunResults(self.run), (self.run / RESULTS).stat()
        if (stamp := (stat.st_mtime_ns, stat.st_ino)) != self._stamp:
            results = {one.slug: one for one in lines if self._only is None or one.slug in self._only}
            with self._lock:
                self.results, self._stamp = results, stamp
                self._checks.clear()

    def admit(self, slug: str) -> AdmittedAdapter:
        """The one check of a request: its adapter, verified at most RECHECK_SECONDS ago.

        Results that `add` replaced since are read first. Raises APIError (403) if the adapter may not be served.
        """
        with self._lock:
            checked_at, adapter = self._checks.get(slug, (-math.inf, None))
            if time.monotonic() - checked_at >= RECHECK_SECONDS:
                with suppress(InputError, OSError):  # results that cannot be read: those before are verified
                    self.refresh()
                adapter, reasons = self._verify(slug)
                self._checks[slug] = (time.monotonic(), adapter)
                if reasons:
                    self._log(f"{slug} is not served: {'; '.join(reasons)}")
        if adapter is None:
            for hook in self._refusal_hooks:
                hook(slug)
            raise APIError(403, "The adapter behind this model may not be served at present.", "adapter_not_served")
        return adapter

    def withhold(self, slug: str, reason: str) -> None:
        """Refuses an adapter from now on, for a reason that its files do not show. Other weights are not refused."""
        with self._lock:
            self._withheld[self.results[slug].manifest_sha256] = reason
            self._checks.pop(slug, None)

    def recheck(self, slug: str) -> None:
        """Checks an adapter anew at its next request, however recent the last check."""
        with self._lock:
            self._checks.pop(slug, None)

    def on_refusal(self, hook: Callable[[str], None]) -> None:
        """Calls `hook` with the slug of every adapter that is refused, so that caches can drop it."""
        self._refusal_hooks.append(hook)

    def folder(self, slug: str) -> Path:
        """The folder of a released user's adapter."""
        path = self.results[slug].path
        assert path is not None, f"{slug} is not released"
        return self.run / path

    def admitted(self, slug: str) -> AdmittedAdapter | None:
        """A user's adapter, verified now; None if it may not be served."""
        return self._verify(slug)[0]

    def reasons(self, slug: str) -> list[str]:
        """All reasons why a user's adapter may not be served; empty if it may."""
        return self._verify(slug)[1]

    def _verify(self, slug: str) -> tuple[AdmittedAdapter | None, list[str]]:
        result = self.results.get(slug)
        if result is None:
            return None, ["the run has no such user"]
        if result.manifest_sha256 in self._withheld:
            return None, [self._withheld[result.manifest_sha256]]
        if reasons := refusals_to_release(self.run, result):
            return None, reasons
        manifest, faults = read_manifest(self.folder(slug) / MANIFEST)
        if manifest is None:
            return None, faults
        if reasons := self._mismatches(manifest, result):
            return None, reasons
        if self._running is not None and (difference := uncertified(manifest, self._running)) is not None:
            if difference not in self._other_conditions:
                self._log(f"{slug}, and others like it: {difference}")
            self._other_conditions.add(difference)
        return AdmittedAdapter(result, self.folder(slug), manifest["files"][WEIGHTS]["sha256"]), []

    def _mismatches(self, manifest: dict[str, Any], result: Result) -> list[str]:
        reasons = []
        if hashlib.sha256(rendered(manifest)).hexdigest() != result.manifest_sha256:
            reasons.append("its manifest changed during the check")
        if manifest["base"]["weights_sha256"] != self.weights_hash:
            reasons.append("it was released for another base: the hash of the weights is not that of this one")
        if {"products": "float32"} | manifest["settings"]["lora"] != self._lora:  # earlier versions had no such key
            reasons.append("it was trained with other LoRA settings than those of this run's config")
        return reasons


class ServedRun(NamedTuple):
    """A text generator, the access to the adapters that it may use, and the engine's gauges by name."""

    generator: TextGenerator
    access: AdapterAccess
    figures: Callable[[], Mapping[str, float]] = dict


class Limits(NamedTuple):
    """The limits of a server.

    `body` is in bytes, `tokens` counts an answer's, and `rate` a user's requests per minute. `concurrent` answers are
    generated at the same time for all users, `concurrent_each` for one.
    """

    body: int = 1 << 20
    tokens: int = 512
    rate: int = 60
    concurrent: int = 32
    concurrent_each: int = 4


class RateLimiter:
    """A token bucket of requests per user (one minute's worth at most), and slots for concurrent answers."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._buckets: dict[str, tuple[float, float]] = {}  # requests left, at this time
        self._running: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, slug: str) -> None:
        """Counts one request of a user. Raises APIError (429), with the seconds to wait, above the rate."""
        with self._lock:
            now, rate = self._clock(), self._limits.rate
            left, updated = self._buckets.get(slug, (float(rate), now))
            left = min(float(rate), left + (now - updated) * rate / 60)
            accepted = left >= 1
            self._buckets[slug] = (left - accepted, now)
        if not accepted:
            wait = math.ceil((1 - left) * 60 / rate)
            raise APIError(429, f"At most {rate} requests a minute.", "rate_limit_exceeded", retry_after=max(1, wait))

    @contextmanager
    def slot(self, slug: str) -> Iterator[None]:
        """Holds a slot while an answer is generated. Raises APIError (429) if none is free."""
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
                self._running += Counter()  # removes the users at zero


_PREFIX = "prlhf"


class TokenEntry(NamedTuple):
    """A line of the token file: the user's slug, the token's name (`key`, 16 hex digits) and the token's sha256."""

    slug: str
    key: str
    sha256: str


class Tokens:
    """The bearer tokens of a file, as hashes; each opens one user's adapter."""

    def __init__(self, entries: Iterable[TokenEntry]) -> None:
        self._entries = {entry.key: entry for entry in entries}

    @property
    def slugs(self) -> set[str]:
        """The users with a token."""
        return {entry.slug for entry in self._entries.values()}

    def holder(self, token: str) -> str | None:
        """The slug of a token's user, or None for an unknown token. The time does not depend on the secret."""
        key = token.split("_")[1] if token.count("_") >= 2 else ""
        entry = self._entries.get(key, _NO_USER)
        return entry.slug if hmac.compare_digest(_hash(token), entry.sha256) else None


METRICS_READER = "metrics"
"""Holder of the token that opens `/metrics` and nothing else; a user's slug ends with a hash, so it differs."""


def pseudonym(token: str) -> str:
    """The name of a token's holder in figures: only the token file says whose it is (`key`, a random number)."""
    return _hash(token.split("_")[1])[:12]


def read_tokens(file: Path) -> Tokens:
    """The tokens of a file. Raises InputError if it is missing, or naming every line that is not an entry."""
    if not file.is_file():
        remedy = "make one with `persona-rlhf serve RUN --tokens FILE --make-tokens`"
        raise InputError([Problem(str(file), None, "--tokens", f"there is no such file; {remedy}")])
    return Tokens(_read(file))


def make_tokens(file: Path, slugs: Iterable[str]) -> dict[str, str]:
    """Makes tokens for those users who have none in the file, and adds their hashes to it.

    Returns the new tokens by slug; they are stored nowhere. Raises InputError if the file is not a token file.
    """
    entries = _read(file) if file.exists() else []
    holders = {entry.slug for entry in entries}
    tokens: dict[str, str] = {}
    for slug in dict.fromkeys(slugs):
        if slug not in holders:
            key = secrets.token_hex(8)
            tokens[slug] = f"{_PREFIX}_{key}_{secrets.token_urlsafe(32)}"
            entries.append(TokenEntry(slug, key, _hash(tokens[slug])))
    if tokens:
        _write(file, entries)
    return tokens


def _hash(token: str) -> str:
    """A token has 256 random bits, so a plain hash reveals nothing of it."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _read(file: Path) -> list[TokenEntry]:
    sentence = 'a line reads {"slug": ..., "key": ..., "sha256": ...}; remove this line and make tokens again'
    return read_json_lines(file, TokenEntry, sentence)


def _write(file: Path, entries: Iterable[TokenEntry]) -> None:
    atomic_write(file, (json.dumps(entry._asdict()) + "\n" for entry in entries), private=True)


_NO_USER = TokenEntry("", "", _hash(secrets.token_urlsafe(32)))
