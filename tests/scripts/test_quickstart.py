"""`scripts/quickstart` on a stand-in for the toolkit, which notes its arguments."""

import os
import shutil
import subprocess

import pytest

from tests.scripts.loading import SCRIPTS

TOOL = """#!/usr/bin/env bash
echo "$*" >>calls
if [ "$1" = base ]; then mkdir -p "$4"; fi
if [ "$1" = train ]; then mkdir -p "$4/state"; touch "$4/state/identity.json"; exit "${TRAIN:-0}"; fi
"""
BASE = "base get smollm2-135m models/smollm2-aligned --aligned"
TRAIN = "train configs/smollm2.yaml --run runs/smollm2"


@pytest.fixture
def place(tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPTS / "quickstart", tmp_path / "scripts")
    (tmp_path / "scripts/environment.sh").write_text("install_checkout() { :; }\n")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    tool = tmp_path / ".venv/bin/persona-rlhf"
    tool.write_text(TOOL)
    tool.chmod(0o755)
    return tmp_path


def quickstart(place, *arguments, code="0", flags="sse avx512f"):
    """The exit code, and the calls of the toolkit."""
    (place / "calls").write_text("")
    (place / "cpuinfo").write_text(f"flags\t\t: {flags}\n")
    command = ["bash", str(place / "scripts/quickstart"), *arguments]
    environment = os.environ | {"TRAIN": code, "CPUINFO": str(place / "cpuinfo")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, (place / "calls").read_text().splitlines()


def test_a_real_run_begins_and_goes_on_after_a_kill(place):
    assert quickstart(place, "--real", code="137") == (137, [BASE, "plan configs/smollm2.yaml", TRAIN])
    assert quickstart(place, "--real", code="3") == (0, [f"{TRAIN} --resume"])  # users held back are no failure
    users = "users.path=data/users_smollm2"
    plan = f"plan configs/smollm2.yaml {users}"
    assert quickstart(place, "--users", "24", "--real") == (0, [plan, f"{TRAIN}-24 {users}"])
    assert quickstart(place, "--real", "--users", "24") == (0, [f"{TRAIN}-24 {users} --resume"])


def test_a_processor_that_multiplies_bfloat16_does_so(place):
    _, [_, plan, train] = quickstart(place, "--real", flags="sse avx512_bf16 avx")
    assert plan == "plan configs/smollm2.yaml base.dtype=bfloat16"
    assert train == f"{TRAIN} base.dtype=bfloat16"
    _, [_, resumed] = quickstart(place, "--real", "--users", "24", flags="amx_bf16")
    assert resumed == f"{TRAIN}-24 base.dtype=bfloat16 users.path=data/users_smollm2"


def test_the_tiny_run_begins_anew(place):
    for _ in range(2):
        assert quickstart(place) == (0, ["train configs/quickstart_basis.yaml --run runs/quickstart"])


@pytest.mark.parametrize("arguments", [["--users", "8"], ["--real", "--users", "9"], ["--real", "--users"], ["--help"]])
def test_other_arguments_run_nothing(place, arguments):
    assert quickstart(place, *arguments) == (2, [])
