"""A released adapter leaves its run, as a copy; one that was held back does not."""

from __future__ import annotations

from pathlib import Path

from persona_rlhf.inputs.problems import InputError, Problem, did_you_mean
from persona_rlhf.release.folder import write_folder
from persona_rlhf.release.results import Result, RunResults
from persona_rlhf.release.verify import adapter_faults

ADAPTERS = "adapters"


class HeldBack(Exception):  # noqa: N818 - it is a result, not an error: the CLI exits 3
    """The user's adapter may not leave; the message says why."""


def find_user(run: Path, user_id: str) -> Result:
    """A user's line. Raises InputError where the run does not know him."""
    for result in RunResults(run):
        if result.user_id == user_id:
            return result
    hint = did_you_mean(user_id, (result.user_id for result in RunResults(run)))
    raise InputError([Problem(str(run), None, "--user", f"no user `{user_id}` in this run{hint}")])


def export(run: Path, user_id: str, to: Path) -> Path:
    """Copies a released adapter, and nothing else of the run, to the folder `to`, which must be new or empty.

    Raises HeldBack where the user was not released or his folder does not verify, InputError for an unknown user or a
    folder that is taken.
    """
    result = find_user(run, user_id)
    if result.status != "released" or result.path is None:
        raise HeldBack(f"`{user_id}` is not released ({result.status}): {result.reason}")
    source = run / result.path
    faults = adapter_faults(source, result)
    if faults:
        raise HeldBack(f"the adapter of `{user_id}` does not verify: {'; '.join(faults)}")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError([Problem(str(to), None, "--to", "something stands there already; name a new or empty folder")])
    if to.is_dir():
        to.rmdir()
    write_folder(to, {file.name: file.read_bytes() for file in sorted(source.iterdir())})
    return to
