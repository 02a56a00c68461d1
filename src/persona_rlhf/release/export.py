"""May this adapter leave; copy it out."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from persona_rlhf.common.errors import InputError, Problem, did_you_mean
from persona_rlhf.common.files import need_vacant, write_folder
from persona_rlhf.release.results import Result, RunResults
from persona_rlhf.release.revocation import revoked
from persona_rlhf.release.verify import adapter_faults

# ----------------------------------------------------------------------------------------------------
# Whether a user's adapter may leave its run or be served: one answer, asked by whoever hands adapters out.
# ----------------------------------------------------------------------------------------------------


def refusals_to_release(run: Path, result: Result) -> list[str]:
    """Every reason why the adapter of this line may not leave `run` or be served; an empty list where it may.

    It was not released; its folder does not verify; it was revoked; its verdict has expired. Where the list of
    revocations cannot be read, nobody may: that is a reason too, and no error.
    """
    if result.status != "released" or result.path is None:
        return [f"it is not released ({result.status}): {result.reason}"]
    reasons = [f"it does not verify: {fault}" for fault in adapter_faults(run / result.path, result)]
    try:
        found = revoked(run).get(result.manifest_sha256 or "")
    except InputError as fault:
        return [*reasons, *map(str, fault.problems)]
    return [*reasons, *([found.sentence()] if found else [])]


# ----------------------------------------------------------------------------------------------------
# A released adapter leaves its run, as a copy; one that was held back does not.
# ----------------------------------------------------------------------------------------------------

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


def admitted(run: Path, result: Result) -> Path:
    """The folder of an adapter that may leave. Raises HeldBack, saying why, where it may not."""
    if reasons := refusals_to_release(run, result):
        raise HeldBack(f"the adapter of `{result.user_id}` stays here: {'; '.join(reasons)}")
    assert result.path is not None
    return run / result.path


class Exportable(NamedTuple):
    """Of all users of a run: the adapters that may leave, by user id, and why a judged one may not."""

    folders: dict[str, Path]
    held_back: list[str]


def exportable(run: Path) -> Exportable:
    """Everybody who may leave. Users whom the run did not train (skipped, failed) are in neither list."""
    folders, held_back = dict[str, Path](), list[str]()
    for result in RunResults(run):
        if result.status in ("released", "held_back"):
            try:
                folders[result.user_id] = admitted(run, result)
            except HeldBack as reason:
                held_back.append(str(reason))
    return Exportable(folders, held_back)


def export(run: Path, user_id: str, to: Path) -> Path:
    """Copies a released adapter, and nothing else of the run, to the folder `to`, which must be new or empty.

    Raises HeldBack where it may not leave (`refusals_to_release`), InputError for an unknown user or a folder that is
    taken.
    """
    source = admitted(run, find_user(run, user_id))
    need_vacant(to, "--to")
    write_folder(to, {file.name: file.read_bytes() for file in sorted(source.iterdir())})
    return to
