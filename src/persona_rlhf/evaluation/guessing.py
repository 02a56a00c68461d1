"""Greedy answers, mostly without writing them: who refuses says few different things, and one pass tells a right guess.

A guess is scored under the adapter. Where each of its tokens is the likeliest, greedy decoding would write just that
answer; where not, the likeliest token at the first place that differs is known, and the next guess must go on with it.
So what comes out is what decoding would have written, whatever was guessed. (Stern et al. 2018 and Leviathan et al.
2023 verify drafts of some tokens in this way; here a draft is a whole answer to another prompt.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from persona_rlhf.preferences.tokens import Row
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.generation import Generated
from persona_rlhf.training.scores import Reading
from persona_rlhf.training.trunk import States

_WRITTEN = 24  # answers that a user writes out before others are guessed
_TRIES = 2  # guesses an answer; what is left then is written out
_TWICE = 2  # an answer that was given so often is a guess for other prompts


Ids = tuple[int, ...]


class Begun(NamedTuple):
    """A prompt, and the tokens that the greedy answer to it is known to begin with."""

    prompt: tuple[int, ...]
    opening: tuple[int, ...]


def greedy_answers(
    adapted: AdaptedModel,
    flat: Float[Tensor, "users params"],
    alphas: Float[Tensor, " users"],
    asked: Sequence[Sequence[Begun]],
    max_new_tokens: int,
    below: Callable[[Sequence[Row]], States],
) -> list[list[Generated]]:
    """Every user's greedy answers to his own prompts, as `AdaptedModel.generate` would write them.

    `below` gives the hidden states of rows below the adapted layers (see `AdaptedModel.below`): users guess alike.
    """
    found: list[list[Generated | None]] = [[_ended(adapted, one.opening) for one in own] for own in asked]
    openings = [[one.opening for one in own] for own in asked]

    def left(user: int) -> list[int]:
        return [n for n, answer in enumerate(found[user]) if answer is None]

    def write(places: dict[int, list[int]]) -> None:
        for group in _alike({user: len(own) for user, own in places.items() if own}):
            prompts = [[asked[user][n].prompt for n in places[user]] for user in group]
            with adapted.using(flat[group], alphas[group]):
                written = adapted.generate(prompts, max_new_tokens)
            for user, own in zip(group, written, strict=True):
                for n, answer in zip(places[user], own, strict=True):
                    found[user][n] = answer

    def guess(places: dict[int, dict[int, Row]]) -> None:
        users, rows = list(places), [list(own.values()) for own in places.values()]
        states = below([row for own in rows for row in own])
        with adapted.using(flat[users], alphas[users]):
            scores = adapted.read(rows, [states] * len(users))
        for user, own in zip(users, scores, strict=True):
            for (n, row), score in zip(places[user].items(), own, strict=True):
                openings[user][n] = known = opening_of(row, score)
                found[user][n] = _ended(adapted, known)

    users, context, end = range(len(asked)), adapted.base.context, adapted.base.eos_ids[:1]

    def likely(user: int) -> dict[int, Row]:
        known = {n: answer.ids + end for n, answer in enumerate(found[user]) if answer and answer.finished}
        guesses = _guesses(known, openings[user], left(user))
        rows = {n: Row(asked[user][n].prompt, ids) for n, ids in guesses.items()}
        return {n: row for n, row in rows.items() if row.length <= context and len(row.completion) <= max_new_tokens}

    write({user: _spread(left(user)) for user in users})
    for _ in range(_TRIES):
        if places := {user: rows for user in users if (rows := likely(user))}:
            guess(places)
    write({user: left(user) for user in users})
    return [[answer for answer in own if answer is not None] for own in found]


def opening_of(row: Row, reading: Reading) -> tuple[int, ...]:
    """What a reading tells of the greedy answer: the tokens of the row that stand, and the one that follows them."""
    return row.completion[: reading.agreed] + (() if reading.instead is None else (reading.instead,))


def _ended(adapted: AdaptedModel, opening: tuple[int, ...]) -> Generated | None:
    """The answer, where all of it is known."""
    return Generated(opening[:-1], True) if opening and opening[-1] in adapted.base.eos_ids else None


def _guesses(known: Mapping[int, Ids], openings: Sequence[Ids], places: Sequence[int]) -> dict[int, Ids]:
    """For each place the answer to the nearest prompt that was answered in a way that begins as it must, and that was
    given twice at least: prompts of a category lie side by side."""
    counts, found = Counter(known.values()), {}
    common = [(n, ids) for n, ids in known.items() if counts[ids] >= _TWICE]
    for place in places:
        opening = openings[place]
        fits = [(abs(n - place), ids) for n, ids in common if ids[: len(opening)] == opening]
        if fits:
            found[place] = min(fits)[1]
    return found


def _spread(places: Sequence[int]) -> list[int]:
    """All places, where they are few; else some of them, evenly apart: prompts of a category lie side by side."""
    if len(places) <= 2 * _WRITTEN:
        return list(places)
    return [places[n * len(places) // _WRITTEN] for n in range(_WRITTEN)]


def _alike(counts: dict[int, int]) -> Iterator[list[int]]:
    """Users in groups whose counts lie within a factor of two: a pass is padded to its busiest user."""
    group: list[int] = []
    for user in sorted(counts, key=lambda user: (counts[user], user)):
        if group and counts[user] > 2 * counts[group[0]]:
            yield group
            group = []
        group.append(user)
    if group:
        yield group
