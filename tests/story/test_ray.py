"""A run on a local Ray cluster is the run of one process, also where a worker or the driver is killed."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.story.experiment import OVERRIDES, UNMEASURED, command, environment, persona_rlhf
from tests.story.test_scale import same

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'persona-rlhf[ray]'"),
]

WORDS = ("train", "experiment.yaml", *OVERRIDES, *UNMEASURED, "fleet.chunk=2", "gate.still_base=null")
ON_RAY = (*WORDS, "--ray", "local", "fleet.shards=3")


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory) -> Path:
    """The experiment, and its run in one process: RUN is the folder `one` in it."""
    place = tmp_path_factory.mktemp("ray") / "mine"
    shutil.copytree(trained.folder, place)
    assert persona_rlhf(*WORDS, "--run", "one", cwd=place).returncode in (0, 3)
    return place


def start(folder: Path, run: str) -> subprocess.Popen[bytes]:
    with (folder / f"{run}.log").open("wb") as log:
        return subprocess.Popen(command(*ON_RAY, "--run", run), cwd=folder, env=environment(), stdout=log, stderr=log)


def wait_for_a_step(folder: Path, run: str, driver: subprocess.Popen[bytes]) -> None:
    while not any((folder / run / "state").glob("metrics-*.jsonl")):
        assert driver.poll() is None, (folder / f"{run}.log").read_text()
        time.sleep(0.05)


def workers(driver: subprocess.Popen[bytes]) -> list[int]:
    """Processes that train a shard; Ray names them after the task."""
    found = subprocess.run(["pgrep", "-f", "ray::train_shard"], capture_output=True, text=True, check=False)
    assert driver.poll() is None
    return [int(line) for line in found.stdout.split()]


def test_a_killed_worker_changes_no_bit(folder):
    driver = start(folder, "worker")
    wait_for_a_step(folder, "worker", driver)
    [victim, *_] = workers(driver)
    subprocess.run(["kill", "-9", str(victim)], check=True)
    assert driver.wait(timeout=600) in (0, 3), (folder / "worker.log").read_text()
    assert same(folder / "worker", folder / "one")
    assert persona_rlhf("verify", "worker", cwd=folder).returncode == 0


def test_a_killed_driver_is_resumed_to_the_same_bits(folder):
    driver = start(folder, "driver")
    wait_for_a_step(folder, "driver", driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    done = persona_rlhf(*ON_RAY, "--run", "driver", "--resume", cwd=folder)
    assert done.returncode in (0, 3), done.stderr
    assert same(folder / "driver", folder / "one")
