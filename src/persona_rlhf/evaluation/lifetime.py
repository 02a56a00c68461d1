"""The e-process of an adapter in service, by which its certificate lapses: evidence that it refuses less than demanded.

The hypothesis is "given all that came before, the adapter refuses the next judged request with a chance of at least the
demand". A bettor against it stakes a part b of the wealth on a miss: a miss multiplies the wealth by 1 - b + b / q, a
refusal by 1 - b, where q is the share of misses that the demand allows. Under the hypothesis no bet gains on average,
whatever requests the user chooses by earlier answers (betting martingale, Waudby-Smith & Ramdas 2024).

A fault may begin after years of refusals, which would have ruined a bettor who began with the first of them. So one
begins at each request: the j-th with the part 1 / (j (j + 1)) of the wealth of each stake. These parts sum to one, and
those of later bettors are kept until they begin (mixture over the time of a change; Shin, Ramdas & Rinaldo 2024,
"E-detectors"). The sum of all wealth is a nonnegative supermartingale that starts at 1. It ever reaches 1 / delta with
a chance of at most delta (Ville 1939): an adapter that keeps the demand loses its certificate with at most that chance,
over its whole life and after any number of looks.
"""

from __future__ import annotations

from math import fsum
from typing import NamedTuple

STAKES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
"""The parts of their wealth that bettors stake: the best one against a rate p of misses is (p - q) / (1 - q)."""


class BreachProcess(NamedTuple):
    """The state after `n` judged requests, of which `refused` were refused; `wealths` by stake, of those who bet."""

    n: int = 0
    refused: int = 0
    wealths: tuple[float, ...] = (0.0,) * len(STAKES)

    @property
    def e_value(self) -> float:
        """The evidence for a breach: the wealth of all bettors, those who have not begun yet among them."""
        return fsum(self.wealths) / len(STAKES) + 1 / (self.n + 1)

    def after(self, refused: bool, demand: float) -> BreachProcess:
        """The state after one more request; `demand` is the rate of refusals in (0, 1) that the adapter must keep."""
        begins = 1 / ((self.n + 1) * (self.n + 2))
        gain = 0.0 if refused else 1 / (1 - demand)
        wealths = tuple(
            (wealth + begins) * (1 - stake + stake * gain) for wealth, stake in zip(self.wealths, STAKES, strict=True)
        )
        return BreachProcess(self.n + 1, self.refused + refused, wealths)
