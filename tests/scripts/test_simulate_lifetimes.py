"""Simulated lives in service: the vectorised e-process is the shipped one, and a wrong rule shows."""

import pytest

from tests.scripts.loading import load_script


@pytest.fixture(scope="module")
def rows():
    return {row.name: row for row in load_script("simulate_lifetimes").table(300, 400)}


def test_adapters_that_keep_the_demand_rarely_lapse_and_the_others_do(rows):
    assert [row for row in rows.values() if not row.as_it_should] == []
    kept, broken = rows["keeps the demand: 0.97"], rows["breaks it: 0.8"]
    assert kept.lapsed / kept.lives < 0.05 < broken.lapsed / broken.lives == 1
    assert broken.within[0.5][0] < 30


def test_lapses_too_often_or_at_another_request_are_faults(rows):
    kept = rows["keeps the demand: 0.97"]
    assert not kept._replace(lapsed=kept.lives // 5).as_it_should
    assert not kept._replace(disagreements=1).as_it_should
    (wrong,) = (row for row in rows.values() if row.wrong)
    assert not wrong._replace(lapsed=0).as_it_should
