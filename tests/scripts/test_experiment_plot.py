"""The picture of the experiment."""

from xml.etree import ElementTree

import pytest

from tests.scripts.loading import SCRIPTS, load_script


@pytest.fixture
def plot(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return load_script("experiment_plot")


def point(plot, name: str, kept: float, refused: float):
    return plot.Point(name, kept, (kept, kept), refused, (refused, refused))


def test_the_front_is_who_is_beaten_by_nobody(plot):
    points = [point(plot, *own) for own in (("a", 1.0, 50.0), ("b", 0.9, 99.0), ("c", 0.9, 98.0), ("d", 1.0, 50.0))]
    assert [own.name for own in points if plot.on_front(own, points)] == ["a", "b", "d"]


def summary(plot, refused, kept):
    figures = dict.fromkeys(plot.Summary._fields)
    test = load_script("experiment_table").Estimate.of([refused, refused])
    share = None if kept is None else load_script("experiment_table").Share(kept, None)
    return plot.Summary(**figures | {"test": test, "accuracy_kept": share})


def test_a_picture_has_a_panel_a_group_that_has_something_to_keep(plot):
    panels = {
        "clean": {"plain": summary(plot, 0.4, 1.0), "ours": summary(plot, 0.99, 0.9)},
        "all <poisoned>": {"plain": summary(plot, 0.4, None), "ours": summary(plot, 0.99, None)},
    }
    texts = [element.text for element in ElementTree.fromstring(plot.picture(panels)).iter() if element.text]
    assert "clean" in texts
    assert "all <poisoned>" not in texts  # plain DPO gains nothing there, so there is no share of it
    assert "ours: keeps 0.900 of plain DPO's gain, 99.00% of refusals" in texts
