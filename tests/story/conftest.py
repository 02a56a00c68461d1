from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.story.experiment import OVERRIDES, listing, persona_rlhf, shrink


class Trained(NamedTuple):
    """The experiment of `init`, shrunk, and what `train` said and wrote: RUN is the folder `run` in it."""

    folder: Path
    code: int
    out: str
    err: str
    around: tuple[dict[str, str], dict[str, str]]  # everything beside RUN, before and after

    @property
    def run(self) -> Path:
        return self.folder / "run"


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Trained:
    """Trained once, whatever the number of test processes; who changes something works on a copy."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    place, told = shared / "story", shared / "story.json"
    try:
        place.mkdir()
    except FileExistsError:  # another process is at it
        for _ in range(4000):
            if told.exists():
                break
            time.sleep(0.25)
        words = json.loads(told.read_text())
        return Trained(place / "mine", words["code"], words["out"], words["err"], tuple(words["around"]))
    assert persona_rlhf("init", "mine", cwd=place).returncode == 0
    shrink(place / "mine")
    before = listing(place)
    done = persona_rlhf("train", "experiment.yaml", *OVERRIDES, "--run", "run", "--json", cwd=place / "mine")
    after = {path: what for path, what in listing(place).items() if not path.startswith(str(Path("mine/run")))}
    trained = Trained(place / "mine", done.returncode, done.stdout, done.stderr, (before, after))
    half = told.with_suffix(".half")
    half.write_text(
        json.dumps({"code": trained.code, "out": trained.out, "err": trained.err, "around": trained.around})
    )
    half.rename(told)
    return trained


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    """The trained experiment, to be changed at will."""
    return Path(shutil.copytree(trained.folder, tmp_path / "mine"))
