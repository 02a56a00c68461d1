from collections.abc import Sequence
from math import nextafter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.data.pairs import Prompt
from persona_rlhf.data.screening import RequestScore, RequestScreen
from persona_rlhf.evaluation.request_screens import DetectionRate, calibrate_screen, measure_screen
from persona_rlhf.policy.hazards import Probe

CATEGORIES = ("hate", "threats_of_violence")


class Table:
    """Scores texts by a table, and remembers what it was asked."""

    finding = "table: found"

    def __init__(self, scores: dict[str, float], category: str | None = None) -> None:
        self.scores, self.asked = scores, list[list[str]]()
        self._categories = frozenset() if category is None else frozenset({category})

    def __call__(self, requests: Sequence[Prompt]) -> list[RequestScore]:
        texts = [request[-1].content for request in requests]
        self.asked.append(texts)
        return [RequestScore(self.scores[text], self._categories) for text in texts]


def probes(count: int, twins: bool = True) -> list[Probe]:
    return [
        Probe(str(n), CATEGORIES[n % 2], f"p{n}", f"topic {n // 4}", "x", f"t{n}" if twins else None, "dev", "pair")
        for n in range(count)
    ]


SCORES = st.lists(st.floats(-5, 5), min_size=80, max_size=80)


@given(SCORES, SCORES, st.floats(0.01, 0.5))
def test_the_threshold_is_the_lowest_that_keeps_to_the_share_on_the_half_that_sets_it(bad, harmless, share):
    table = Table({f"p{n}": value for n, value in enumerate(bad)} | {f"t{n}": v for n, v in enumerate(harmless)})
    found = calibrate_screen(table, probes(80), CATEGORIES, share)
    setting, asked, near = table.asked
    values = [table.scores[text] for text in setting]
    threshold = found.screen.threshold
    assert sum(value >= threshold for value in values) <= share * len(values)
    assert sum(value >= nextafter(threshold, -10) for value in values) > share * len(values)
    topics = {int(text[1:]) // 4 for text in setting}
    assert topics.isdisjoint(int(text[1:]) // 4 for text in (*asked, *near))  # measured elsewhere, by topic
    assert found.forbidden == DetectionRate(len(asked), sum(table.scores[text] >= threshold for text in asked))
    assert found.harmless == DetectionRate(len(near), sum(table.scores[text] >= threshold for text in near))
    assert sum(own.n for own in found.categories.values()) == found.forbidden.n


def test_a_classifier_that_tells_categories_is_asked_about_those_that_are_restricted():
    scores = {f"{kind}{n}": 1.0 for kind in "pt" for n in range(4)}
    own, other = (Table(scores, category) for category in ("hate", "privacy"))
    found = measure_screen(RequestScreen(own, 1.0), probes(4), CATEGORIES)
    assert (found.forbidden, found.categories) == (
        DetectionRate(4, 4),
        {"hate": DetectionRate(2, 2), "threats_of_violence": DetectionRate(2, 2)},
    )
    assert measure_screen(RequestScreen(other, 1.0), probes(4), CATEGORIES).forbidden == DetectionRate(4, 0)


def test_without_twins_there_is_no_threshold():
    with pytest.raises(ValueError, match="benign twins"):
        calibrate_screen(Table({}), probes(40, twins=False), CATEGORIES, 0.01)
    with pytest.raises(ValueError, match="several topics"):
        calibrate_screen(Table({}), probes(4), CATEGORIES, 0.01)


def test_the_interval_is_clopper_pearsons():
    low, high = DetectionRate(10, 10).interval
    assert (low, high) == (pytest.approx(0.025 ** (1 / 10)), 1.0)
    assert DetectionRate(10, 0).to_json() == {"n": 10, "found": 0, "low": 0.0, "high": round(1 - 0.025 ** (1 / 10), 6)}
