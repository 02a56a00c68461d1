"""How `train` begins: input that is wrong is said before torch is loaded, processes are launched, Ctrl-C is met."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from persona_rlhf.cli.console import open_run, progress_display, say
from persona_rlhf.common.errors import visible
from persona_rlhf.config.experiment import read_config
from persona_rlhf.pipeline import distributed
from persona_rlhf.pipeline.distributed import work_share_of
from persona_rlhf.pipeline.inputs import read_inputs
from persona_rlhf.pipeline.run_dir import RunDir
from persona_rlhf.policy.policy import out_of_force

if TYPE_CHECKING:
    from persona_rlhf.release.results import RunResults


def start(
    config: Path, overrides: Sequence[str], run: Path | None, resume: bool, shard: str | None, as_json: bool
) -> tuple[Path, RunResults | None]:
    """Trains in this process, or in several that are launched here; the folder, and the results where they are whole.

    Raises typer.Exit with the code of the launched processes, or with 130 where it was interrupted.
    """
    share = work_share_of(shard)
    settings = read_config(config, overrides)
    folder = run or settings.run_dir
    words = [str(config), *overrides, "--run", str(folder)]
    open_run(folder)
    RunDir(folder, share).check_place(resume)
    inputs = read_inputs(settings, RunDir(folder).selection)
    if share.rank == 0:
        for sentence in out_of_force(inputs.policy.written):
            say(visible(sentence))
    if settings.fleet.processes > 1 and share.world == 1:
        flags = [*["--resume"] * resume, *(["--shard", shard] if shard else []), *["--json"] * as_json]
        raise typer.Exit(distributed.launch(["train", *words, *flags], settings.fleet.processes, say))
    from persona_rlhf.pipeline import train

    try:
        with distributed.ended_as_by_ctrl_c(), progress_display(share) as display:
            results = train.train_share(
                settings, folder, resume=resume, on_progress=display, inputs=inputs, share=share
            )
    except KeyboardInterrupt:
        if share.rank == 0:
            say(f"Interrupted; go on with: persona-rlhf train {shlex.join([*words, '--resume'])}")
        raise typer.Exit(130) from None
    if results is None and share.rank == 0:
        together = shlex.join([*words, "--resume"])
        say(f"Shard {shard} is done. When all are, put them together with: persona-rlhf train {together}")
    return folder, results
