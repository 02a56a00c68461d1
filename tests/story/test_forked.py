"""A forked command ends and prints as one that an interpreter of its own runs."""

from __future__ import annotations

import os
import subprocess
from importlib.util import find_spec

import pytest

from tests.story.experiment import command, environment
from tests.story.forked import COMMAND, IMPORTED, run_forked


@pytest.mark.parametrize("words", [["--version"], ["verify", "nowhere"], ["policy", "no such command"]])
def test_it_is_the_same_command(tmp_path, words):
    (tmp_path / "nowhere").mkdir()
    settings = {"cwd": tmp_path, "env": environment(), "capture_output": True, "text": True, "check": False}
    plain = subprocess.run(command(*words), **settings)
    forked = run_forked([COMMAND, *words], tmp_path, environment(), timeout=60)
    assert (forked.returncode, forked.stdout, forked.stderr) == (plain.returncode, plain.stdout, plain.stderr)


def test_it_sees_the_environment_that_is_given_to_it(tmp_path):
    shown = [
        run_forked([COMMAND, "--help"], tmp_path, {**environment(), "COLUMNS": columns}, timeout=60).stdout
        for columns in ("60", "120")
    ]
    assert shown[0] != shown[1]
    assert run_forked([COMMAND, "--help"], tmp_path, os.environ | environment(), timeout=60).returncode == 0


def test_all_that_is_imported_beforehand_exists():
    """The server passes over a module that it cannot import."""
    assert all(find_spec(name) for name in IMPORTED)
