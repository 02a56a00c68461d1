"""What a user is called on disk and in papers: opaque, safe, distinct names, whatever the id."""

from __future__ import annotations

import hashlib
import re
import unicodedata

_READABLE = 24  # characters kept of the id, so that a person can find a folder
_DIGEST = 12  # hex digits: with a million users, two share all 48 bits with a chance of 0.2%


def slug(user_id: str) -> str:
    """A folder name for a user: the id's readable ASCII part, and a hash that sets apart ids that look the same.

    Only `a-z`, `0-9` and single dashes, never at the ends: no separator, dot or drive, and no name that any system
    reserves (`con-...` is not `CON`).
    """
    plain = unicodedata.normalize("NFKD", user_id).encode("ascii", "ignore").decode().casefold()
    readable = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:_READABLE].strip("-") or "user"
    digest = hashlib.sha256(user_id.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{readable}-{digest[:_DIGEST]}"


def pseudonym(user_id: str) -> str:
    """What papers that outlive a user call him: 32 hex digits of the id's sha256, nothing readable.

    Whoever knows the id can find his lines again; nobody can read the id off them.
    """
    return hashlib.sha256(user_id.encode("utf-8", "surrogatepass")).hexdigest()[:32]
