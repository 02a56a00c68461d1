"""A run takes the place of another: two renames, and a mark from which they are finished if a kill comes between."""

from __future__ import annotations

import json
from pathlib import Path

from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.release.folder import write_file

_MARK = Path("state") / "replaced.json"


def before(run: Path) -> Path:
    """Where a run goes whose place another one takes."""
    return run.with_name(f"{run.name}.before")


def check_replacement(run: Path, by: Path) -> None:
    """Raises InputError where a run could not take the place of another by renaming both."""
    if by.resolve().parent != run.resolve().parent:
        sentence = f"only a run beside {run} can take its place; name a folder in {run.parent} with --run"
        raise InputError([Problem(str(by), None, "--replace", sentence)])
    if before(run).exists():
        sentence = "an older run was put there already; move it away first"
        raise InputError([Problem(str(before(run)), None, "--replace", sentence)])


def replace_run(run: Path, by: Path) -> None:
    """Puts a run away and another in its place: from the mark on, `finish_replacement` does it at any later start."""
    check_replacement(run, by)
    write_file(run / _MARK, json.dumps({"by": by.name}).encode())
    finish_replacement(run)


def finish_replacement(run: Path) -> bool:
    """Puts a run away that is marked, and the other in its place; whether there was anything to do."""
    old = run if (run / _MARK).is_file() else before(run)
    if not (old / _MARK).is_file():
        return False
    by = run.with_name(json.loads((old / _MARK).read_bytes())["by"])
    if old == run:
        run.rename(before(run))
    if by.exists() and not run.exists():
        by.rename(run)
    (before(run) / _MARK).unlink()
    return True
