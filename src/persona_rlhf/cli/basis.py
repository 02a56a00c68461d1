"""The commands of the group `basis`: a reward that users share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from persona_rlhf.cli.console import Json, command_group, note, print_json, progress_display, with_exit_codes
from persona_rlhf.common.files import find

basis_commands = command_group("The reward that consenting users share.")


@basis_commands.callback()
def basis_group() -> None:
    """Makes typer keep the group although it has one verb."""


@basis_commands.command("fit")
@with_exit_codes
def basis_fit(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Pairs of users who consent: a file or a folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new .safetensors file.")],
    base: Annotated[str, typer.Option("--base", help="The base whose answers set the scale.")] = "data/base",
    prompts: Annotated[
        Path, typer.Option("--prompts", metavar="FILE", help="JSON lines of ordinary prompts for the base.")
    ] = Path("data/basis/prompts.jsonl"),
    without: Annotated[
        list[str] | None, typer.Option("--without", metavar="USER", help="A user whose consent was withdrawn.")
    ] = None,
    heldout: Annotated[
        float,
        typer.Option("--heldout", min=0, max=0.99, help="Share of prompts held out, as users.heldout of the run."),
    ] = 0.25,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the base's answers and of the fit.")] = 0,
    as_json: Json = False,
) -> None:
    """Fit the reward that users share, from the training pairs of all of them; the file holds numbers alone."""
    from persona_rlhf.pipeline.fit_basis import basis_fit as fit
    from persona_rlhf.pipeline.fit_basis import read_basis_inputs

    inputs = read_basis_inputs(path, out, find(prompts), without or [], heldout)
    with progress_display() as display:
        fitted = fit(inputs, base, seed, display)
    if as_json:
        print_json(fitted.to_json())
    note(f"Basis: {out}, {fitted.directions} directions of {fitted.users:,} users, {fitted.pairs:,} pairs.")
