"""Whether an adapter may be exported or served, and the copy of an exportable one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from persona_rlhf.common.errors import InputError, Problem, did_you_mean
from persona_rlhf.common.files import need_vacant, write_folder
from persona_rlhf.common.run_lock import locks_run
from persona_rlhf.release.attestation import (
    CERTIFICATE,
    MODEL_SIGNATURE,
    attestation_key,
    certificate,
    model_signature,
)
from persona_rlhf.release.bom import BOM, bill_of_materials
from persona_rlhf.release.lifetimes import lapse_sentences
from persona_rlhf.release.manifest import MANIFEST
from persona_rlhf.release.results import Result, RunResults
from persona_rlhf.release.revocation import revoked
from persona_rlhf.release.verify import adapter_faults


def refusals_to_release(run: Path, result: Result) -> list[str]:
    """Every reason why the adapter of this line may not be exported or served; an empty list if it may.

    Reasons: it was not released, its folder does not verify, it was revoked, its certificate lapsed, or its verdict has
    expired. An unreadable list of revocations, or evidence of a lapse, is a reason too, and no error.
    """
    if not result.has_adapter or result.path is None:
        return [f"it is not released ({result.status}): {result.reason}"]
    reasons = [f"it does not verify: {fault}" for fault in adapter_faults(run / result.path, result)]
    try:
        revocation = revoked(run).get(result.manifest_sha256 or "")
        lapse = lapse_sentences(run, result.slug, result.manifest_sha256)
    except InputError as fault:
        return [*reasons, *map(str, fault.problems)]
    return [*reasons, *([revocation.sentence()] if revocation else lapse)]


ADAPTERS = "adapters"


class HeldBack(Exception):  # noqa: N818 - it is a result, not an error: the CLI exits 3
    """The user's adapter may not be exported; the message says why."""


def find_user(run: Path, user_id: str) -> Result:
    """A user's line. Raises InputError if the run has no such user."""
    for result in RunResults(run):
        if result.user_id == user_id:
            return result
    hint = did_you_mean(user_id, (result.user_id for result in RunResults(run)))
    raise InputError([Problem(str(run), None, "--user", f"no user `{user_id}` in this run{hint}")])


def admitted(run: Path, result: Result) -> Path:
    """The folder of an exportable adapter. Raises HeldBack with every reason if it may not be exported."""
    if reasons := refusals_to_release(run, result):
        raise HeldBack(f"the adapter of `{result.user_id}` is not exported: {'; '.join(reasons)}")
    assert result.path is not None
    return run / result.path


class Exportable(NamedTuple):
    """The exportable adapters of a run by user id, and why the other judged ones may not be exported."""

    folders: dict[str, Path]
    held_back: list[str]


def exportable(run: Path) -> Exportable:
    """All adapters that may be exported, and why the others may not. Skipped and failed users are in neither list."""
    folders, held_back = dict[str, Path](), list[str]()
    for result in RunResults(run):
        if result.judged:
            try:
                folders[result.user_id] = admitted(run, result)
            except HeldBack as reason:
                held_back.append(str(reason))
    return Exportable(folders, held_back)


@locks_run("export", shared=True)
def export(run: Path, user_id: str, to: Path, sign: Path | None = None, bom: bool = False) -> Path:
    """Copies a released adapter, and nothing else of the run, to the new or empty folder `to`.

    With `sign`, a private key of kind p256, the certificate and a signature of the folder are written beside its files;
    with `bom`, a bill of materials. Raises HeldBack if it may not be exported (`refusals_to_release`), InputError for
    an unknown user, an occupied folder or a key of another kind.
    """
    key = None if sign is None else attestation_key(sign)
    source = admitted(run, find_user(run, user_id))
    need_vacant(to, "--to")
    files = {file.name: file.read_bytes() for file in sorted(source.iterdir())}
    manifest = json.loads(files[MANIFEST])
    if bom:
        files[BOM] = bill_of_materials(manifest, files)
    if key is not None:
        files[CERTIFICATE] = certificate(manifest, files, key)
        files[MODEL_SIGNATURE] = model_signature(f"adapter-{manifest['user'][:16]}", files, key)
    write_folder(to, files)
    return to
