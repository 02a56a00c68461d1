"""The command `train`: check the input before torch is imported, launch processes, handle Ctrl-C."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from persona_rlhf.cli.console import note, open_run, progress_display
from persona_rlhf.common.errors import visible
from persona_rlhf.config.experiment import Config, read_config
from persona_rlhf.pipeline import distributed
from persona_rlhf.pipeline.distributed import work_share_of
from persona_rlhf.pipeline.inputs import RunInputs, read_inputs
from persona_rlhf.pipeline.run_dir import RunDir
from persona_rlhf.policy.policy import out_of_force

if TYPE_CHECKING:
    from persona_rlhf.release.results import RunResults


def start(
    config: Path,
    overrides: Sequence[str],
    run: Path | None,
    resume: bool,
    shard: str | None,
    as_json: bool,
    wait: float,
    ray: str | None = None,
) -> tuple[Path, RunResults | None]:
    """Trains in this process, in several that it launches, or in shards on the Ray cluster at an address.

    Returns the run's folder, and the results if all shards are done. Raises typer.Exit with the exit code of the
    launched processes, or with 130 after Ctrl-C.
    """
    share = work_share_of(shard)
    settings = read_config(config, overrides)
    folder = run or settings.run_dir
    words = [str(config), *overrides, "--run", str(folder)]
    run_dir = RunDir(folder, share)
    with open_run(folder, "train", wait, part=run_dir.part):
        run_dir.check_place(resume)
        inputs = read_inputs(settings, run_dir.selection)
        if share.rank == 0:
            for sentence in out_of_force(inputs.policy.written):
                note(visible(sentence))
        if ray is None and (settings.fleet.processes == 1 or share.world > 1):
            return folder, _train(settings, run_dir, resume, inputs, words, shard)
    if ray is not None:
        again = f"persona-rlhf train {shlex.join([*words, '--ray', ray, '--resume'])}"
        with open_run(folder, "train", wait, part="driver"):  # no second driver, with other shards
            _train_on_ray(settings, run_dir, resume, inputs.pairs.users, ray, again)
        return folder, _train(settings, run_dir, True, inputs, words, shard)
    flags = [*["--resume"] * resume, *(["--shard", shard] if shard else []), *["--json"] * as_json]
    words += [*flags, "--wait", f"{wait:g}"]
    raise typer.Exit(distributed.launch(["train", *words], settings.fleet.processes, note))


def _train_on_ray(settings: Config, run_dir: RunDir, resume: bool, users: int, address: str, again: str) -> None:
    """Trains all shards on a Ray cluster; says how to go on (`again`) after Ctrl-C and after a shard that failed."""
    from persona_rlhf.pipeline.ray_shards import FailedShardsError, ray_tasks, train_shards

    try:
        with (
            progress_display() as display,
            ray_tasks(address, settings) as tasks,
            distributed.ended_as_by_ctrl_c(),  # after Ray, which takes the signal for itself
        ):
            train_shards(settings, run_dir.path, users, tasks, resume=resume, on_progress=display)
    except FailedShardsError as fault:
        note(visible(str(fault)))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        note(f"Interrupted; continue with: {again}")
        raise typer.Exit(130) from None


def _train(
    settings: Config, run_dir: RunDir, resume: bool, inputs: RunInputs, words: Sequence[str], shard: str | None
) -> RunResults | None:
    """Trains the users of this process; says how to go on after Ctrl-C, and after one of several shards."""
    from persona_rlhf.pipeline import train

    share = run_dir.share
    try:
        with distributed.ended_as_by_ctrl_c(), progress_display(share) as display:
            results = train.train_share(
                settings, run_dir.path, resume=resume, on_progress=display, inputs=inputs, share=share
            )
    except KeyboardInterrupt:
        if share.rank == 0:
            note(f"Interrupted; continue with: persona-rlhf train {shlex.join([*words, '--resume'])}")
        raise typer.Exit(130) from None
    if results is None and share.rank == 0:
        command = shlex.join([*words, "--resume"])
        note(f"Shard {shard} is done. When all are, merge them with: persona-rlhf train {command}")
    return results
