"""The experiment's cells: their order, and what a kill between two of them costs."""

import json
from argparse import Namespace

import pytest

from tests.scripts.loading import SCRIPTS, load_script


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    experiment = load_script("experiment")
    monkeypatch.setattr(experiment, "base_hash", lambda _: "0" * 64)
    monkeypatch.setattr(experiment, "prepared", lambda _, cell: (cell.seed, cell.layers))
    monkeypatch.setattr(experiment.time, "process_time", lambda: 0.0)
    return experiment


class Measured:
    """Stands in for training: figures that follow from the cell, and a kill before the `last`-th cell."""

    def __init__(self, last=None):
        self.cells, self.last = [], last

    def __call__(self, shared, cell, sizes):
        if len(self.cells) == self.last:
            raise KeyboardInterrupt
        assert shared == (cell.seed, cell.layers)
        self.cells.append(cell)
        users = [{"user_id": f"{cell.population}-{n:05d}", "alpha": cell.seed} for n in range(sizes.users)]
        return {"users": users, "untrained": [], "training_cpu_seconds": 1.0}


def experiment_in(script, folder, **sizes):
    return script.Experiment(folder, "configs/quickstart.yaml", "data/base", script.QUICK._replace(**sizes), True)


def run(script, monkeypatch, folder, measured, cells, **sizes):
    monkeypatch.setattr(script, "measure_cell", measured)
    script.run(experiment_in(script, folder, **sizes), cells, lambda _: None)
    return (folder / script.CELLS).read_bytes()


def test_a_killed_experiment_goes_on_to_the_same_file(script, monkeypatch, tmp_path):
    cells = script.cells_in_order([0, 1])[:9]
    whole, killed, rest = Measured(), Measured(last=4), Measured()
    expected = run(script, monkeypatch, tmp_path / "whole", whole, cells)
    with pytest.raises(KeyboardInterrupt):
        run(script, monkeypatch, tmp_path / "killed", killed, cells)
    assert len(script.read_lines(tmp_path / "killed" / script.CELLS)) == 4
    assert run(script, monkeypatch, tmp_path / "killed", rest, cells) == expected
    assert killed.cells + rest.cells == whole.cells == cells
    nothing = Measured(last=0)
    assert run(script, monkeypatch, tmp_path / "killed", nothing, cells) == expected


def test_a_changed_setting_is_another_cell(script, monkeypatch, tmp_path):
    cells, again = script.cells_in_order()[:2], Measured()
    first = run(script, monkeypatch, tmp_path, Measured(), cells)
    both = run(script, monkeypatch, tmp_path, again, cells, users=5)
    assert again.cells == cells
    assert both.startswith(first)
    users = [json.loads(line)["settings"]["users"] for line in both.splitlines()]
    assert users == [3, 3, 5, 5]


def test_the_cells_that_decide_come_first_and_none_comes_twice(script):
    cells = script.cells_in_order([0, 1])
    assert len(set(cells)) == len(cells)
    decide = [(name, method) for name in ("clean", "hostile", "flipped-30") for method in ("plain", "ours")]
    assert [(cell.population, cell.method) for cell in cells[:6]] == decide
    assert {(cell.layers, cell.quarantine, cell.seed) for cell in cells[:6]} == {("all", False, 0)}
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)


def test_every_method_of_a_cell_stands_beside_plain_dpo_of_the_same_users(script):
    cells = set(script.cells_in_order())
    assert all(cell._replace(method="plain") in cells for cell in cells)
    assert {cell.population for cell in cells} == set(script.POPULATIONS)
    assert {cell.method for cell in cells} == set(script.CONTENDERS)


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ({"quick": True}, 6),
        ({"quick": True, "methods": ["mix"]}, 3),
        ({"populations": ["clean"], "layers": ["upper"]}, 2),
        ({"methods": ["primal"]}, 3),
    ],
)
def test_words_choose_cells(script, words, count):
    options = Namespace(**{"quick": False, "populations": None, "methods": None, "layers": None} | words)
    cells = [cell for cell in script.cells_in_order([3]) if script.wanted(cell, options)]
    assert len(cells) == count
    assert {cell.method for cell in cells} == set(words.get("methods", ["plain", "ours"]))


def test_a_cell_whose_users_were_all_screened_out_is_computed_once(script, monkeypatch, tmp_path):
    cells, computed = script.cells_in_order()[:1], []

    def screened_out(shared, cell, sizes):
        computed.append(cell)
        return {"users": [], "untrained": ["a"], "training_cpu_seconds": 0.0}

    first = run(script, monkeypatch, tmp_path, screened_out, cells)
    assert run(script, monkeypatch, tmp_path, screened_out, cells) == first
    assert computed == cells
    assert json.loads(first)["untrained"] == ["a"]
