"""Whether a user's adapter may leave its run or be served: one answer, asked by whoever hands adapters out."""

from __future__ import annotations

from pathlib import Path

from persona_rlhf.inputs.problems import InputError
from persona_rlhf.release.results import Result
from persona_rlhf.release.revocation import revoked
from persona_rlhf.release.verify import adapter_faults


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
