"""What the model says of a completion: how likely it is, and what it would have said instead."""

from __future__ import annotations

from typing import NamedTuple


class Score(NamedTuple):
    """`logp`: log-probability of a completion in nats, summed to its end token; `tokens`: its length."""

    logp: float
    tokens: int


class Reading(NamedTuple):
    """A score, and what the model would have said: of how many of the completion's first tokens each is the most likely
    one (`agreed`), and the most likely one after these (`instead`; None: no more)."""

    logp: float
    tokens: int
    agreed: int
    instead: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether greedy decoding writes exactly this completion."""
        return self.agreed == self.tokens
