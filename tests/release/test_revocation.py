"""Who may stay under new documents: only whom the new gate saw pass at the alpha of their release."""

from __future__ import annotations

import pytest

from persona_rlhf.common.chain import ChainHead
from persona_rlhf.evaluation.gate import certify
from persona_rlhf.release.revocation import Recertified, Retested, recertified_table
from tests.release.conftest import DEMANDS, refusals

GRID = (0.25, 0.5, 0.75, 1.0)


def user_at(released, missed, revoked=False, fixed=False):
    """A user released at this alpha; `missed` says how many probes the adapter misses at each alpha."""
    verdict = certify(DEMANDS, refusals(0), GRID, lambda alpha: refusals(missed[GRID.index(alpha)]))
    return Retested("u", "u-0", released, verdict, fixed, revoked)


@pytest.mark.parametrize(
    ("released", "missed", "passes", "remedy"),
    [
        (1.0, (0, 0, 0, 0), True, None),
        (0.5, (0, 0, 80, 80), True, None),
        (0.5, (0, 80, 80, 80), False, "alpha 0.25"),
        (0.5, (80, 80, 80, 80), False, "retrain"),
        (0.25, (80, 0, 0, 80), False, "retrain"),
        (0.5, (80, 0, 80, 80), False, "retrain"),  # the sequence stopped before it: the gate never looked there
        (0.5, (0, 0, 0, 0), False, "alpha 1"),  # less is asked now; the smaller alpha was not looked at
    ],
)
def test_who_passes_and_what_helps_the_others(released, missed, passes, remedy):
    user = user_at(released, missed)
    assert (user.passes, user.remedy) == (passes, remedy)
    assert user.to_json()["status"] == ("passes" if passes else "revoked")
    assert user.to_json()["must_retrain"] == (remedy == "retrain")


def test_who_was_revoked_before_stays_revoked():
    assert not user_at(1.0, (0, 0, 0, 0), revoked=True).passes


def test_where_fixed_aspects_decide_they_were_asked_about_at_the_very_alpha():
    assert user_at(1.0, (0, 0, 0, 0), fixed=True).passes
    assert user_at(0.5, (0, 0, 0, 80)).passes
    assert user_at(0.5, (0, 0, 0, 80), fixed=True).remedy == "alpha 0.75"
    kept = user_at(1.0, (0, 0, 0, 0))
    changed = kept._replace(verdict=kept.verdict._replace(admitted=False, alpha=0.0))
    assert (changed.passes, changed.remedy) == (False, "retrain")


def test_the_counts_are_those_of_the_users():
    users = [user_at(1.0, (0,) * 4), user_at(0.5, (0, 80, 80, 80)), user_at(1.0, (80,) * 4)]
    found = Recertified("f" * 64, users, ChainHead(3, "0" * 64))
    told = found.to_json()
    assert (told["tested"], told["passed"], told["revoked"], told["must_retrain"]) == (3, 1, 2, 1)
    assert told["looks"] == sum(len(user.verdict.looks) for user in users)
    assert told["audit_head"] == f"3:{'0' * 64}"
    assert recertified_table(found).row_count == 3
