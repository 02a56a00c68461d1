"""A released adapter leaves its run, as a copy; one that was held back does not."""

from __future__ import annotations

from pathlib import Path

from persona_rlhf.inputs.problems import InputError, Problem, did_you_mean
from persona_rlhf.release.admission import refusals_to_release
from persona_rlhf.release.folder import write_folder
from persona_rlhf.release.results import Result, RunResults

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

    Raises HeldBack where it may not leave (`refusals_to_release`), InputError for an unknown user or a folder that is
    taken.
    """
    result = find_user(run, user_id)
    if reasons := refusals_to_release(run, result):
        raise HeldBack(f"the adapter of `{user_id}` stays here: {'; '.join(reasons)}")
    assert result.path is not None
    source = run / result.path
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError([Problem(str(to), None, "--to", "something stands there already; name a new or empty folder")])
    if to.is_dir():
        to.rmdir()
    write_folder(to, {file.name: file.read_bytes() for file in sorted(source.iterdir())})
    return to
