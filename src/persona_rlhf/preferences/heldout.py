"""Which pairs of a user are held out: by prompt, by a keyed hash, never by chance or by row order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from persona_rlhf.preferences.messages import Prompt

_KEY = b"persona-rlhf held-out prompts 1"
_DECIDING_KEY = b"persona-rlhf deciding prompts 1"
_FEW = 4  # prompts; a user with fewer is not forced to give one up


def position(user_id: str, prompt: Prompt, key: bytes = _KEY) -> float:
    """A number in [0, 1) that depends on nothing but the key, the user and the prompt's text."""
    text = "\x1e".join((user_id, *(f"{role}\x1f{content}" for role, content in prompt)))
    digest = hashlib.blake2b(text.encode(), key=key, digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def held_out(user_id: str, prompts: Iterable[Prompt], share: float) -> set[Prompt]:
    """The user's prompts that are held out: those whose position is below `share`.

    Two exceptions keep a small user useful: somebody with 4 prompts or more has at least one held out (the first by
    position), and nobody has all of them held out (the last by position is trained). A share of 0 holds out nothing.
    """
    if share == 0:
        return set()
    ranked = sorted((position(user_id, prompt), prompt) for prompt in set(prompts))
    count = sum(place < share for place, _ in ranked)
    if len(ranked) >= _FEW:
        count = max(count, 1)
    return {prompt for _, prompt in ranked[: min(count, len(ranked) - 1)]}


def deciding(user_id: str, prompts: Iterable[Prompt]) -> set[Prompt]:
    """Half of a user's held-out prompts, rounded down: they may decide when his training stops, and so are no evidence.

    The other half is. A user with one held-out prompt has none that decides.
    """
    ranked = sorted((position(user_id, prompt, _DECIDING_KEY), prompt) for prompt in set(prompts))
    return {prompt for _, prompt in ranked[: len(ranked) // 2]}
