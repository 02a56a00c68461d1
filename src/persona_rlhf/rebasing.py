"""`rebase`: a new base voids every adapter, so all users are trained again on it, beside the run that they are in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from persona_rlhf import line
from persona_rlhf.config import read_config
from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.materials import read_materials
from persona_rlhf.release import audit
from persona_rlhf.release.comparison import Comparison, compare, to_json
from persona_rlhf.release.results import plain, read_results
from persona_rlhf.release.seal import seal
from persona_rlhf.release.succession import Succession, successions, write_successions
from persona_rlhf.run_folder import PAIRS, RunFolder
from persona_rlhf.training.base import weights_hash

EVENT = "rebased"


class Rebased(NamedTuple):
    """Every user before and after, and the means over users with their intervals and changes."""

    users: list[Succession]
    figures: Comparison

    def to_json(self) -> dict[str, Any]:
        """Both as plain JSON values."""
        return {"users": plain(self.users), "figures": to_json(self.figures)}


def rebase(run: Path, base: str, to: Path, console: Console) -> Rebased:
    """Trains and judges all users of a finished run on another base, into the folder `to`, from the pairs and under
    the config and policy that they had; and holds both runs against each other. The old run is only read.

    Those who asked to be forgotten stay out. A call that was killed is gone on with by the next. Raises InputError
    where the run is not finished, its pairs changed since, `base` is the base that it has, or `to` is another run.
    """
    folder, new = RunFolder(run), RunFolder(to)
    if not folder.finished:
        sentence = "this run is not finished; go on with it (train has --resume) before its base is changed"
        raise InputError([Problem(str(run), None, None, sentence)])
    # who aligned the old base says nothing of the new one
    config = read_config(run / "config.yaml", [f"base.model={json.dumps(base)}", "base.aligned_by=null"])
    if weights_hash(config.base) == folder.base_hash:
        raise InputError([Problem(base, None, "--base", "these are the weights of the base that the run has")])
    folder.check_same({PAIRS: read_materials(config, folder.roll).pairs.fingerprint})
    new.check_place(new.begun)
    if not new.begun:
        new.begin_with(folder)
    line.train(config, to, new.begun, console)
    old_results, results = read_results(run), read_results(to)
    users = successions(old_results, results)
    write_successions(to, users)
    if not any(entry.event == EVENT for entry in audit.read(to)):
        facts = {"old_base": folder.base_hash, "new_base": new.base_hash, "old_trail": str(audit.head(run) or "")}
        audit.append(to, EVENT, **facts, users=len(users))
        seal(to, only=audit.AUDIT)
    return Rebased(users, compare({"old base": {0: old_results}, "new base": {0: results}}))
