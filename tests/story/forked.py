"""The command line, or a script, in a process of its own that is forked where torch and the package are imported.

To start Python and import torch takes longer than most commands do. The processes of one server share the seed of
hashes; `tests.story.experiment.command` starts an interpreter of its own where that or the start matters.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from runpy import run_path
from subprocess import CompletedProcess, TimeoutExpired, run
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch

IMPORTED = (
    "persona_rlhf.cli.app",
    "persona_rlhf.cli.train",
    "persona_rlhf.pipeline.reevaluate",
    "persona_rlhf.pipeline.train",
    "persona_rlhf.pipeline.update_run",
    "persona_rlhf.release.hub",
    "rich.progress",
    "transformers.models.llama.modeling_llama",
)
"""Modules that the server imports before it forks; a command imports the others."""


COMMAND = "persona-rlhf"

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(list(IMPORTED))


def run_forked(argv: Sequence[str], cwd: Path, environment: Mapping[str, str], timeout: float) -> CompletedProcess[str]:
    """Runs COMMAND or a Python file, with its arguments, in CWD under ENVIRONMENT; returns what `subprocess.run` would.

    Where CUDA is available the process starts an interpreter of its own, for one that was forked cannot use it.
    """
    if torch.cuda.is_available():
        program = ["-m", "persona_rlhf"] if argv[0] == COMMAND else [argv[0]]
        command = [sys.executable, *program, *argv[1:]]
        return run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    with TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        child = _server.Process(target=_run, args=(argv, cwd, environment, out, err))
        with patch.dict(os.environ, environment, clear=True):  # the first child starts the server
            child.start()
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
            child.join()
            raise TimeoutExpired(argv, timeout, out.read_bytes(), err.read_bytes())
        return CompletedProcess(argv, child.exitcode, *(file.read_text(encoding="utf-8") for file in (out, err)))


def _run(argv: list[str], cwd: Path, environment: Mapping[str, str], out: Path, err: Path) -> None:
    for file, stream in ((out, 1), (err, 2)):
        written = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(written, stream)
        os.close(written)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = argv
    try:
        if argv[0] == COMMAND:
            from persona_rlhf.cli.app import main

            main()
        else:
            sys.path.insert(0, str(Path(argv[0]).parent))
            run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
