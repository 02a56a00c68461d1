"""Links to the feedback page: one secret per link, which opens one user's page until it expires.

RUN/state/links.jsonl holds their hashes in rows with a `user_id`, so `forget` removes a user's rows.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import threading
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from persona_rlhf.common.files import pseudonym
from persona_rlhf.common.json_lines import read_json_lines
from persona_rlhf.data.erasure import DataSubject
from persona_rlhf.data.page_rows import LINKS, append_rows, remove_rows


class Link(NamedTuple):
    """A row of the file: the user, the link's name (`key`, 16 hex digits), the secret's sha256, the time it expires."""

    user_id: str
    key: str
    sha256: str
    expires: str  # ISO 8601, in UTC

    @property
    def expired(self) -> bool:
        """Whether it opens nothing any more."""
        return datetime.fromisoformat(self.expires) <= datetime.now(UTC)


class Session(NamedTuple):
    """A user with the secret of a link."""

    user_id: str
    token: str
    expires: str  # the day on which the link expires

    @property
    def form_token(self) -> str:
        """The CSRF token of the session's forms."""
        return form_token(self.token)


def make_links(run: Path, user_ids: Iterable[str], days: float) -> dict[str, str]:
    """New secrets by user, which expire after `days`; only their hashes are stored. Earlier links stay valid."""
    expires = (datetime.now(UTC) + timedelta(days=days)).isoformat(timespec="seconds")
    tokens: dict[str, str] = {}
    rows = b""
    for user_id in user_ids:
        key = secrets.token_hex(8)
        tokens[user_id] = f"{key}.{secrets.token_urlsafe(32)}"
        rows += json.dumps(Link(user_id, key, _hash(tokens[user_id]), expires)._asdict()).encode() + b"\n"
    append_rows(run, LINKS, rows)
    return tokens


def remove_links(run: Path, user_id: str) -> None:
    """Removes all links of a user."""
    remove_rows(run, LINKS, DataSubject(pseudonym(user_id)))


class Links:
    """The links of a run, read again whenever the file changed, so that removed ones open nothing."""

    def __init__(self, run: Path) -> None:
        self._file = run / LINKS
        self._stamp: tuple[int, ...] = ()
        self._links: dict[str, Link] = {}
        self._lock = threading.Lock()

    def of(self, token: str) -> Link | None:
        """The link of a secret, which may be expired; None for an unknown one. The time does not tell of the secret."""
        link = self._read().get(token.partition(".")[0], _NO_LINK)
        return link if hmac.compare_digest(_hash(token), link.sha256) else None

    def users(self) -> set[str]:
        """The users with a link that opens their page."""
        return {link.user_id for link in self._read().values() if not link.expired}

    def _read(self) -> dict[str, Link]:
        """The links by key. Raises InputError for a row that is none."""
        with self._lock:
            try:
                stat = self._file.stat()
            except FileNotFoundError:
                return {}
            stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if stamp != self._stamp:
                sentence = (
                    "a row holds the texts user_id, key, sha256 and expires; remove this one and make links again"
                )
                self._links = {link.key: link for link in read_json_lines(self._file, Link, sentence)}
                self._stamp = stamp
            return self._links


def form_token(token: str) -> str:
    """The CSRF token of the forms of a link's page: only the secret's holder can compute it."""
    return hmac.digest(token.encode("utf-8", "surrogatepass"), b"form", "sha256").hex()


def _hash(token: str) -> str:
    """A secret has 256 random bits, so a plain hash tells nothing of it."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


_NO_LINK = Link("", "", _hash(secrets.token_urlsafe(32)), "1970-01-01T00:00:00+00:00")
