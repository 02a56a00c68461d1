"""How a program opens a run: what another one began to change in it, and was cut short in, is finished first."""

from __future__ import annotations

from pathlib import Path

from persona_rlhf.boundary import say
from persona_rlhf.release.forgotten import pending
from persona_rlhf.replacement import finish_replacement
from persona_rlhf.run_folder import RunFolder


def open_run(run: Path) -> None:
    """Finishes the additions, deletions and replacements that were begun.

    Raises InputError where one cannot be finished, OSError where the disk is full.
    """
    if finish_replacement(run):
        say(f"A replacement that was cut short is finished: {run}")
    if RunFolder(run).joining.is_file():
        from persona_rlhf.joining import join

        join(run)
        say(f"An addition that was cut short is finished: {run}")
    if pending(run):
        from persona_rlhf.deletion import finish

        for done in finish(run):
            say(f"A deletion that was cut short is finished: {done.proof}")
