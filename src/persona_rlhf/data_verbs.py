"""The verbs of the command line about preference files, and other people's files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from persona_rlhf.boundary import Json, bounded, print_json, say, verbs

data_verbs = verbs("Preference files.")

_FORMATS = "cragc25; or probes: advbench, ailuminate, harmbench, simplesafetytests, strongreject, xstest"


@data_verbs.command("check")
@bounded
def data_check(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...")],
    render: Annotated[bool, typer.Option("--render", help="Show the first pair as the model sees it.")] = False,
    model: Annotated[str, typer.Option("--base", help="With --render: whose chat template.")] = "data/base",
    as_json: Json = False,
) -> None:
    """Validate preference files: every bad row, with its number, at once."""
    from persona_rlhf.checking import check_data

    check_data(paths, model if render else None, as_json)


@data_verbs.command("import")
@bounded
def data_import(
    format_: Annotated[str, typer.Argument(metavar="FORMAT", help=_FORMATS)],
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A file or a folder; of probes, a hub id too.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new .jsonl file; a folder for the banks of probes.")],
    train: Annotated[bool, typer.Option("--train", help="Let public probes fall into the train split too.")] = False,
    as_json: Json = False,
) -> None:
    """Convert other people's preference files, or public sets of probes, to ours."""
    from persona_rlhf.preferences.importers import import_file

    summary = import_file(format_, source, out, train)
    if as_json:
        print_json(summary.to_json())
    for sentence in summary.sentences():
        say(sentence)
