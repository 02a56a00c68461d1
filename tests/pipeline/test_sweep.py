"""`sweep`: arms and seeds as runs of their own, resumed, compared, and paid for at the gate."""

import json
import math
from itertools import product
from statistics import fmean

import pytest
from typer.testing import CliRunner

from persona_rlhf.cli import app
from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import find
from persona_rlhf.config.experiment import scaffold
from persona_rlhf.config.loader import read_section, read_yaml
from persona_rlhf.pipeline import train
from persona_rlhf.pipeline.sweep import SweepSettings, arm_runs, sweep
from persona_rlhf.release.comparison import FIGURES, comparison_table
from persona_rlhf.release.results import read_results
from tests.story.experiment import OVERRIDES, UNMEASURED, shrink, write_yaml


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "experiment"
    scaffold(folder)
    shrink(folder, ("Ann", "bob"))
    return folder


@pytest.fixture
def asked(place, monkeypatch):
    monkeypatch.chdir(place)

    def written(**more):
        content = {"name": "tiny", "config": "experiment.yaml", "grid": {"dpo.beta": [0.1, 0.5]}, "seeds": [0, 1]}
        return write_yaml(place / "sweep.yaml", content | more)

    return written


def settings(**more):
    return SweepSettings(name="x", config=more.pop("config", "experiment.yaml"), **more)


def test_every_point_of_the_grid_under_every_arm_and_seed(asked):
    arms = {"on": {}, "off": {"constraint.enabled": False, "gate.enabled": False}}
    runs = arm_runs(
        settings(grid={"dpo.beta": [0.1, 0.5], "lora.rank": [4]}, arms=arms, seeds=[3, 4]), ["dpo.epochs=2"]
    )
    assert [run.arm for run in runs[::2]] == [
        "on beta=0.1 rank=4", "on beta=0.5 rank=4", "off beta=0.1 rank=4", "off beta=0.5 rank=4",
    ]  # fmt: skip
    assert [run.seed for run in runs[:2]] == [3, 4]
    last = runs[-1].config
    assert (last.dpo.beta, last.dpo.epochs, last.lora.rank, last.constraint.enabled, last.seed) == (0.5, 2, 4, False, 4)
    assert len({run.folder for run in runs}) == 8


def test_the_shipped_sweep_reads():
    shipped = read_section(SweepSettings, read_yaml(find("configs/sweeps/paper-poison.yaml")))
    runs = arm_runs(shipped, ["users.path=data/users/poisoned.jsonl", "screening.quarantine=false"])
    assert len(runs) == 20
    kinds = {(run.config.constraint.enabled, run.config.gate.enabled) for run in runs}
    assert kinds == set(product((True, False), repeat=2))


def test_mistakes_of_all_arms_are_said_before_anything_is_written(asked, place):
    file = asked(grid={"dpo.beta": [0.1, -1]}, arms={"a": {"lora.rnak": 3}, "b": {}})
    with pytest.raises(InputError) as caught:
        sweep(file, [], place / "out-wrong", False)
    said = " ".join(str(problem) for problem in caught.value.problems)
    assert "lora.rnak" in said
    assert "must be more than 0" in said
    assert not (place / "out-wrong").exists()


def test_a_sweep_is_trained_killed_resumed_and_compared(asked, place, monkeypatch):
    out, file = place / "out", asked()
    trained = []

    def once(*arguments, **named):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(arguments[1])
        return real(*arguments, **named)

    real = train.train_share
    monkeypatch.setattr(train, "train_share", once)
    with pytest.raises(KeyboardInterrupt):
        sweep(file, OVERRIDES, out, False)
    monkeypatch.setattr(train, "train_share", real)
    with pytest.raises(InputError, match="not empty"):
        sweep(file, OVERRIDES, out, False)
    with pytest.raises(InputError, match="changed since it began"):
        sweep(file, [*OVERRIDES, "dpo.loss=ipo"], out, True)
    before = (trained[0] / "results.jsonl").stat().st_mtime_ns
    found = sweep(file, OVERRIDES, out, True)
    assert (trained[0] / "results.jsonl").stat().st_mtime_ns == before

    folders = sorted((out / "runs").iterdir())
    assert len(folders) == 4
    assert list(found) == ["beta=0.1", "beta=0.5"]
    own = [result for folder in folders[:2] for result in read_results(folder)]
    first, second = found.values()
    assert first.runs == 4
    figure, seconds = first.figures["seconds of training"], second.figures["seconds of training"]
    assert figure.users == 2  # a seed is no user
    assert figure.mean == pytest.approx(fmean(result.seconds for result in own))
    assert figure.change is None
    assert seconds.change == pytest.approx(seconds.mean - figure.mean)

    config = json.loads((out / "arms.json").read_text())[0]["config"]
    assert config["gate"]["ledger"] == str(out / "looks.jsonl")  # the best of four may be kept
    spent = [result.spending for folder in folders for result in read_results(folder)][::2]
    assert [one.look for one in spent] == [1, 2, 3, 4]
    assert len({one.share for one in spent}) == 1
    assert spent[-1].spent == pytest.approx(0.005 + 0.045 * sum(6 / (math.pi * k) ** 2 for k in (1, 2, 3, 4)))
    assert len(list((out / "cache").glob("bank-*.json"))) == 2  # one a seed, whatever the arm
    assert set(json.loads((out / "sweep.json").read_text())) == set(found)
    page = (out / "report.html").read_text()
    assert "beta=0.5" in page
    assert all(title in page for title in FIGURES)
    assert comparison_table(found).row_count == 2


def test_the_verb(asked, place):
    file = asked(grid={}, seeds=[0])
    words = ["sweep", str(file), *OVERRIDES, *UNMEASURED, "--run", str(place / "out-verb"), "--json"]
    ended = CliRunner().invoke(app.app, words)
    assert ended.exit_code == 0, ended.stderr
    assert list(json.loads(ended.stdout)) == ["as it is"]
    assert CliRunner().invoke(app.app, ["sweep", str(file), "--run", str(place / "none"), "--resume"]).exit_code == 2
