"""The verbs of the command line about configs themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from persona_rlhf.boundary import bounded, say, verbs

config_verbs = verbs("Configs of experiments.")


@config_verbs.callback()
def options() -> None:
    """Keeps the group a group while it has one verb."""


@config_verbs.command("import")
@bounded
def config_import(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A DPO config of TRL or Axolotl (YAML).")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="A new file; else it is printed.")] = None,
) -> None:
    """Read a DPO config of TRL or Axolotl into ours, naming each key that has no counterpart."""
    from persona_rlhf.dialects import import_config, write_new

    found = import_config(source)
    if out is None:
        typer.echo(found.text, nl=False)
        return
    write_new(found.text, out)
    for line in found.left_out:
        say(line)
    say(f"Config: {out} (keys of {source} without a counterpart: {len(found.left_out)})")
