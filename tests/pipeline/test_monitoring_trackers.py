"""The curves of a run in an experiment tracker: read back with tensorboard's own reader."""

import math
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.experiment import read_config
from persona_rlhf.pipeline.monitoring import Tracking, check_trackers
from persona_rlhf.release.results import summarise


def report(user: str, loss: float, violation: float | None = 0.5) -> SimpleNamespace:
    return SimpleNamespace(
        user_id=user, loss=loss, margin=0.1, accuracy=1.0, grad_norm=2.0, violation=violation, dual=violation
    )


def test_tensorboard_reads_the_means_of_the_users_and_no_name(tmp_path):
    config = read_config("configs/quickstart.yaml", ["run.report_to=[tensorboard]"])
    tracking = Tracking(config, tmp_path)
    for step in range(1, 23):
        tracking.step([report("secret one", step), report("secret two", step + 1, None)], 2 * step)
    tracking.step([report("secret one", math.nan)], 60)
    tracking.end(summarise([]), 60)
    [events] = [file for file in (tmp_path / "tracking").rglob("events.*") if b"train/loss" in file.read_bytes()]
    assert b"secret" not in b"".join(f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())
    found = EventAccumulator(str(events.parent))
    found.Reload()
    points = [(point.step, point.value) for point in found.Scalars("train/loss")]
    assert points == [(2, 1.5), (22, 11.5), (42, 21.5)]
    assert [point.value for point in found.Scalars("train/violation")] == [0.5] * 3
    assert found.Scalars("run/users")[-1].value == 0


def test_without_a_tracker_nothing_is_made(tmp_path):
    tracking = Tracking(read_config("configs/quickstart.yaml"), tmp_path)
    tracking.step([report("u", 1.0)], 1)
    tracking.end(summarise([]), 1)
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_is_not_there_is_named_with_the_way_to_get_it():
    check_trackers([], workers=4)
    check_trackers(["tensorboard"], workers=1)
    with pytest.raises(InputError, match="`wandb` is not installed; `pip install wandb`"):
        check_trackers(["tensorboard", "wandb"], workers=1)
    with pytest.raises(InputError, match="in one process"):
        check_trackers(["tensorboard"], workers=2)
