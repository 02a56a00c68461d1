"""Whose line carries an alarm: what the screen found of a user decides, not what became of the pairs."""

from persona_rlhf.data.pairs import Message, PreferencePair
from persona_rlhf.data.screening import Dropped
from persona_rlhf.pipeline.prepare import Chunk
from persona_rlhf.release.results import PairCounts, untrained


def pair(user):
    return PreferencePair(user, (Message("user", "p"),), "a", "b", "p", None, None, 1.0, "train", None, "f", 1)


def test_only_pairs_against_the_policy_count():
    found = [("mal", "quarantined"), ("mal", "flagged"), ("mal", "dropped"), ("ann", "dropped")]
    chunk = Chunk(4, [], [Dropped(pair(user), "probe: x", action) for user, action in found], {})
    assert chunk.against_policy("mal") == 2
    assert chunk.against_policy("ann") == 0


def test_a_user_without_a_pair_left_is_in_alarm_too():
    """All pairs of the user were quarantined: the user is skipped, and the officer should hear of it."""
    assert untrained("mal", PairCounts(0, 0, 3), None, 3).alarm
    assert not untrained("ann", PairCounts(0, 0, 3), None).alarm
