"""The audit trail's events on a user's looks: their order, and whose adapter each was at."""

import pytest

from persona_rlhf.evaluation.gate import Verdict
from persona_rlhf.evaluation.statistics import Count
from persona_rlhf.pipeline.release import JudgedUser, judgements
from persona_rlhf.release.integrity import retested
from persona_rlhf.training.engine import TrainedUser

COUNT = Count(10, 10, 10, 0.9, 0.8)
OF_USER, OF_POPULATION = (Verdict(alpha, True, "why", [], COUNT, {}) for alpha in (0.25, 1.0))


@pytest.mark.parametrize(
    ("verdict", "other", "prior", "events"),
    [
        (OF_USER, None, False, [(0.25, None)]),
        (OF_POPULATION, None, True, [(1.0, "population")]),
        (OF_POPULATION, OF_USER, True, [(0.25, None), (1.0, "population")]),
        (OF_USER, OF_POPULATION, False, [(0.25, None), (1.0, "population")]),
    ],
    ids=["user's", "population's", "second look decides", "both looks failed"],
)
def test_looks_stand_in_their_order_and_name_the_population(verdict, other, prior, events):
    user = JudgedUser(TrainedUser("ann", None, "trained", "", 0, 0.0, 0, {}), verdict=verdict, prior=prior, other=other)
    assert [(facts["alpha"], facts.get("adapter")) for _, facts in judgements(user)] == events


def test_a_test_by_other_documents_names_the_population_too():
    events = [retested("ann", OF_USER, "a" * 64, population)[1] for population in (False, True)]
    assert [facts.get("adapter") for facts in events] == [None, "population"]
