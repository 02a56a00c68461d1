"""The tests on a pretended GPU, each file in a process of its own: torch is patched for good there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.pretended_cuda import obstacle

HERE = Path(__file__).parent
FILES = sorted(file.name for file in HERE.glob("pretended_*.py") if file.stem != "pretended_cuda")


@pytest.mark.slow
@pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", FILES)
def test_on_a_pretended_gpu(name):
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(HERE / name)],
        env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
