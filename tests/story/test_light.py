"""What needs no tokenizer does not wait for torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from persona_rlhf.cli import app

# Runs a verb in a fresh interpreter; says what it imported and the CPU seconds it took, start of Python included.
SPY = """
import sys, time
from persona_rlhf.cli.app import app
code = 0
try:
    app(sys.argv[1:], prog_name="persona-rlhf")
except SystemExit as end:
    code = end.code or 0
heavy = [name for name in ("torch", "transformers", "peft", "trl", "datasets") if name in sys.modules]
print("HEAVY", ",".join(heavy) or "none", time.process_time(), file=sys.stderr)
sys.exit(code)
"""
LIMIT = 3.0  # CPU seconds; one is asked for on an idle machine


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("light")
    assert CliRunner().invoke(app.app, ["init", str(folder / "mine")]).exit_code == 0
    (folder / "mine/bad.jsonl").write_text('{"user_id": "u", "prompt": "p", "accepted": "a", "rejected": "b"}\n')
    (folder / "mine/bad.yaml").write_text("tier: three\nissuer: {role: end_user, name: x}\nrules: []\n")
    (folder / "mine/taken").mkdir()
    (folder / "mine/taken/file").write_text("")
    return folder / "mine"


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (0, ["--help"]),
        (0, ["train", "--help"]),
        (0, ["data", "check", "users"]),
        (0, ["policy", "check", "policy"]),
        (0, ["policy", "show", "experiment.yaml"]),
        (2, ["train", "experiment.yaml", "dpo.btea=1"]),
        (2, ["train", "experiment.yaml", "users.path=bad.jsonl"]),
        (2, ["train", "experiment.yaml", "policy.documents=[bad.yaml]"]),
        (2, ["train", "experiment.yaml", "--run", "taken"]),
        (2, ["train", "experiment.yaml", "--resume"]),
        (2, ["export", "nowhere", "--user", "u", "--to", "out"]),
        (2, ["verify", "nowhere"]),
        (2, ["report", "nowhere"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_torch_is_not_loaded(experiment, code, arguments):
    done = subprocess.run(
        [sys.executable, "-c", SPY, *arguments],
        cwd=experiment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    *_, last = done.stderr.splitlines()
    _, heavy, seconds = last.split()
    print(f"{float(seconds):.2f} s of CPU")
    assert done.returncode == code, done.stderr
    assert heavy == "none"
    assert float(seconds) < LIMIT
