"""Whether a user's adapter may leave its run or be served: one answer, asked by whoever hands adapters out."""

from __future__ import annotations

from pathlib import Path

from persona_rlhf.release.results import Result
from persona_rlhf.release.verify import adapter_faults


def refusals_to_release(run: Path, result: Result) -> list[str]:
    """Every reason why the adapter of this line may not leave `run` or be served; an empty list where it may."""
    if result.status != "released" or result.path is None:
        return [f"it is not released ({result.status}): {result.reason}"]
    return [f"it does not verify: {fault}" for fault in adapter_faults(run / result.path, result)]
