"""The share of delta that a user's next look may spend. A look is one adapter of a user before the gate.

**One bank for all looks** (the default). The k-th look spends 6 / (pi^2 k^2). The shares of all looks sum to one, so by
the union bound a user who retrains until the first release is released in breach with a chance of at most delta. This
holds for any dependence between looks, also on the same probes: until then every earlier look failed, so the k-th
adapter is fixed beforehand. After a release, later adapters may be chosen by what passed, and the sum is exact only for
adapters that do not depend on the probes; `sequential` lifts that condition.

**Fresh probes for each look** (`sequential`). Only failures spend: the share of a look is 6 / (pi^2 (f + 1)^2) after f
failures, and a pass hands its share on to the next look. Proof. Let B be the part of delta that failures left over, and
M be B, or 1 once an adapter in breach was released. A look spends s <= B. An adapter in breach passes it with a chance
p <= s, given all that went before, since its probes are fresh; then the mean of M is p + (1 - p) (B - s) <= B. Any
other adapter leaves B or B - s. So M is a supermartingale that starts at delta, and reaches 1 with a chance of at most
delta (Ville). Tian & Ramdas (2021, "Online control of the familywise error rate") call such a rule online fallback.
Theirs moves along its series of shares at every look; here only a failure moves along, so years of passes cost nothing.

**The prior** (`basis.prior_level`). A user gets the user's adapter or the population's, so delta covers both of them.
- Where the user's own pairs decide for one of the two, they decide before the look. They are no certify probes, so the
  adapter of the look is fixed beforehand, and it is the user's only look: one share, and the proofs above hold as they
  stand.
- Where the user's adapter no longer is the base, the population's is the user's next look and spends the next share.
  Ordinary prompts and facts chose it then, and `max_over_refusal` and `max_changed` are demands on such prompts. A test
  chosen by its own prompts errs with a chance of at most the sum over all tests that may be chosen. Both looks are
  charged, so that sum stays within delta.
The population's adapter is one for many users, and each of them tests it at the share of the user's own look. Nothing
is divided among users: the promise is for each. Demands on refusals are tested on the same probes for all users, and a
larger share passes whatever a smaller one does. So one population's adapter in breach passes for anybody with a chance
of at most the largest of these shares, and then it may pass for all of them. With `sequential` each user draws other
units: an adapter in breach may pass for some users and fail for others. The chance is at most delta for each of them;
that it passes for somebody, up to delta times their number. With `gate.family: all` each user has a part of delta.

Harmless prompts and questions of fixed aspects are the same at every look, so no look renews them. With `sequential`,
demands on them spend by the counted series, whatever passes (`Demands.at_look`).

Both kinds of demands together stay within delta, though each series alone may use all of it. Take the j-th look in
breach of a user who was not released in breach before. All j - 1 looks in breach before it failed, so the refusals'
series has moved on by j - 1 at least, and the look's number is j at least. It passes with a chance of at most the j-th
share, whichever demand it breaks. These shares sum to one. For demands on fixed sets the chance is one before any
outcome on them, so the condition stays that adapters are not chosen by earlier outcomes on these sets. Without it, the
demands on refusals alone are within delta.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from persona_rlhf.policy.bound import look_share


class PastLook(NamedTuple):
    """A look that was taken: the share of delta that it spent, and whether the adapter passed."""

    share: float
    passed: bool


def next_share(history: Sequence[PastLook], sequential: bool = False) -> float:
    """The share of delta for the look after `history`; `sequential` needs fresh probes for each look."""
    place = 1 + (sum(not look.passed for look in history) if sequential else len(history))
    return look_share(place)


class Look(NamedTuple):
    """A look in the ledger: its number among those of its user, and the share of delta that it spends.

    `spent` is the sum of the shares of this look and of those before it. `start`: as in `FreshUnit.place`.
    """

    number: int
    share: float
    spent: float
    start: int = 0


class Spending(NamedTuple):
    """The part of a user's delta that a look spent: its number, its share, its delta, and the sum over all looks.

    `spent` has the judge's part in it, which is spent once; `of` is the whole delta. `pool` is the number of units of
    private probes from which the look drew, and `drawn` those that the user's looks have drawn so far; None without
    `gate.sequential`. `heldout` is sha256 of the held-out pairs that could decide; None where none could.
    """

    look: int
    share: float
    delta: float
    spent: float
    of: float
    pool: int | None = None
    drawn: int | None = None
    heldout: str | None = None

    @staticmethod
    def of_look(
        look: Look, delta: float, judge_delta: float, pool: int | None = None, drawn: int | None = None
    ) -> Spending:
        """The spending of a look, where a user's delta is `delta`, with `judge_delta` of it for the judge."""
        tests = delta - judge_delta
        spent = judge_delta + look.spent * tests
        return Spending(look.number, look.share, look.share * tests, spent, delta, pool, drawn)
