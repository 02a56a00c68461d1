"""The verbs of the command line about the shared base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from persona_rlhf.boundary import Json, bounded, print_json, print_table, say, verbs

base_verbs = verbs("The shared base model.")

Out = Annotated[Path, typer.Argument(metavar="OUT", help="A new or empty folder.")]


@base_verbs.command("build")
@bounded
def base_build(
    out: Out, seed: Annotated[int | None, typer.Option(help="Seed of corpus, initial weights and order.")] = None
) -> None:
    """Rebuild the bundled tiny base from its own corpus (an hour or so on two cores)."""
    from persona_rlhf.training.pretrain import SEED, Progress, build_base

    def progress(now: Progress) -> None:
        say(f"step {now.step}: {now.tokens:,} of {now.of_tokens:,} completion tokens, loss {now.loss:.3f}")

    build_base(out, SEED if seed is None else seed, progress=progress)
    say(f"Base: {out}")


@base_verbs.command("align")
@bounded
def base_align(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A transformers folder or a hub id.")],
    out: Out,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Settings, as in YAML (docs/how-to/align.md).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make any causal LM the safety-aligned base: SFT and DPO by TRL, measured before and after."""
    from persona_rlhf.alignment_inputs import read_alignment

    asked = read_alignment(model, out, overrides or [])  # what is wrong so far is said before torch is loaded
    from persona_rlhf import base_align as alignment

    found = alignment.base_align(asked, say)
    print_json(found.to_json()) if as_json else print_table(alignment.render(found))
    say(f"Base: {out}")
