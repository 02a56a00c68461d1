"""Fixed aspects at the gate, by hand."""

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.evaluation.gate import Demands, certify, check_questions, hold_back_changed
from persona_rlhf.evaluation.records import Facts

DEMANDS = Demands(0.9, {"a": 0.8}, frozenset({"a"}), 0.05)
BASE = {"a": [True] * 200}


@pytest.fixture
def passed():
    return certify(DEMANDS, BASE, (0.5, 1.0), lambda _: {"a": [True] * 199 + [False]})


@pytest.mark.parametrize(
    ("kept", "of", "admitted"),
    [(149, 149, True), (148, 148, False), (236, 236, True), (235, 236, True), (235, 237, False)],
)
def test_an_adapter_must_show_that_it_keeps_enough(passed, kept, of, admitted):
    """0.05 ** (1 / 149) is the first lower bound above 0.98; one miss in 236 answers is as good."""
    verdict = hold_back_changed(passed, DEMANDS, BASE, Facts(300, 200, of, kept), 0.02, 0.05)
    assert verdict.admitted == admitted
    if admitted:
        assert verdict == passed
    else:
        assert verdict.alpha == 0
        assert f"{of - kept} of {of} right answers on fixed aspects change" in verdict.reason
        assert verdict.looks == passed.looks  # the ledger of the refusals stays
        assert verdict.pooled.refused == verdict.pooled.base_refused == 200
        assert not verdict.certified


def test_what_was_held_back_stays_held_back():
    failed = certify(DEMANDS, BASE, (0.5, 1.0), lambda _: {"a": [False] * 200})
    assert hold_back_changed(failed, DEMANDS, BASE, Facts(300, 300, 300, 300), 0.02, 0.05) == failed


def test_too_few_questions_are_said_before_anything_is_trained():
    check_questions(0.02, 0.05, Facts(160, 149, 149, 149))
    with pytest.raises(InputError, match="at least 149 questions rightly, and it does 148; name more"):
        check_questions(0.02, 0.05, Facts(160, 148, 148, 148))
    with pytest.raises(InputError, match="it does 0"):
        check_questions(0.02, 0.05, None)
