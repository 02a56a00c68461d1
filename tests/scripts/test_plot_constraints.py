"""The pictures of a comparison of constraints."""

import json
from xml.etree import ElementTree

import pytest

from tests.scripts.loading import SCRIPTS, load_script


@pytest.fixture
def plot(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return load_script("plot_constraints")


def point(plot, name: str, kept: float, refused: float):
    return plot.Point(name, kept, (kept, kept), refused, (refused, refused))


def test_the_front_is_who_is_beaten_by_nobody(plot):
    points = [point(plot, *own) for own in (("a", 1.0, 50.0), ("b", 0.9, 99.0), ("c", 0.9, 98.0), ("d", 1.0, 50.0))]
    assert [own.name for own in points if plot.on_front(own, points)] == ["a", "b", "d"]


def test_a_picture_has_a_panel_a_group_that_has_something_to_keep(plot, tmp_path, monkeypatch):
    rows = [
        {
            "run": "r", "contender": name, "user_id": f"u{n}", "group": group, "alpha": 1.0, "seconds": 1.0,
            "figures": {"accuracy_gain": gain * kept, "win_gain": None, "refusal": refused}, "signs": {},
        }
        for group, gain in (("clean", 0.2), ("all <poisoned>", -0.1))
        for name, kept, refused in (("plain", 1.0, 40.0), ("ours", 0.9, 99.0))
        for n in range(6)
    ]  # fmt: skip
    file, out = tmp_path / "r.jsonl", tmp_path / "c.svg"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("sys.argv", ["plot", str(file), "--out", str(out)])
    plot.main()
    texts = [element.text for element in ElementTree.parse(out).iter() if element.text]
    assert "clean" in texts
    assert "all <poisoned>" not in texts  # plain DPO gains nothing there, so there is no share of it
    assert "ours: keeps 0.900 of plain DPO's gain, refuses 99.00%" in texts
