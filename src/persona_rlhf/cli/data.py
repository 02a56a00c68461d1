"""Data group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from persona_rlhf.cli.console import (
    ConfigFile,
    Json,
    Overrides,
    print_json,
    print_table,
    say,
    verb_group,
    with_exit_codes,
)
from persona_rlhf.data.check import check, render

# ----------------------------------------------------------------------------------------------------
# `data check`: what is in preference files, and what a base sees of one pair.
# ----------------------------------------------------------------------------------------------------


def check_data(paths: Sequence[Path], base: str | None, as_json: bool) -> None:
    """Checks the files and prints what is in them; with a `base` also their first pair as that model sees it.

    Raises InputError naming every bad row, and where the base cannot be had or does not take the pair.
    """
    summary, pair = check(paths), None
    if base is not None:
        from persona_rlhf.data.check import first_pair, rendered
        from persona_rlhf.models.base import load_tokenizer

        pair = rendered(first_pair(paths[0]), base, load_tokenizer(base))
    if as_json:
        print_json(summary.to_json() | ({} if pair is None else {"rendered": pair.to_json()}))
        return
    print_table(render(summary))
    if pair is not None:
        print_table(pair.panel())


# ----------------------------------------------------------------------------------------------------
# The verbs of the command line about preference files, and other people's files.
# ----------------------------------------------------------------------------------------------------

data_verbs = verb_group("Preference files.")

_FORMATS = "cragc25; or probes: advbench, ailuminate, harmbench, simplesafetytests, strongreject, xstest"


@data_verbs.command("check")
@with_exit_codes
def data_check(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...")],
    render: Annotated[bool, typer.Option("--render", help="Show the first pair as the model sees it.")] = False,
    model: Annotated[str, typer.Option("--base", help="With --render: whose chat template.")] = "data/base",
    as_json: Json = False,
) -> None:
    """Validate preference files: every bad row, with its number, at once."""

    check_data(paths, model if render else None, as_json)


@data_verbs.command("import")
@with_exit_codes
def data_import(
    format_: Annotated[str, typer.Argument(metavar="FORMAT", help=_FORMATS)],
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A file or a folder; of probes, a hub id too.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new .jsonl file; a folder for the banks of probes.")],
    train: Annotated[bool, typer.Option("--train", help="Let public probes fall into the train split too.")] = False,
    as_json: Json = False,
) -> None:
    """Convert other people's preference files, or public sets of probes, to ours."""
    from persona_rlhf.data.importers import import_file

    summary = import_file(format_, source, out, train)
    if as_json:
        print_json(summary.to_json())
    for sentence in summary.sentences():
        say(sentence)


@data_verbs.command("screen")
@with_exit_codes
def data_screen(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Say what the screen of a config would take out, and how well it tells forbidden requests; nothing is written."""
    from persona_rlhf.config.experiment import read_config
    from persona_rlhf.pipeline.curate import render_screening, screen_dry_run
    from persona_rlhf.pipeline.inputs import read_inputs

    settings = read_config(config, overrides or [])
    summary = screen_dry_run(settings, read_inputs(settings))
    if as_json:
        print_json(summary.to_json())
        return
    for table in render_screening(summary):
        print_table(table)


@data_verbs.command("draft")
@with_exit_codes
def data_draft(
    config: ConfigFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new .jsonl file.")],
    user: Annotated[str, typer.Option("--user", help="A user_id, whose tier three states tastes.")],
    overrides: Overrides = None,
    pairs: Annotated[int, typer.Option(min=1, help="At most so many.")] = 64,
    as_json: Json = False,
) -> None:
    """Draft pairs for a user who has judged none: answers of the base, told apart by the tastes that he states."""
    from persona_rlhf.config.experiment import read_config
    from persona_rlhf.pipeline.curate import draft

    drafted = draft(read_config(config, overrides or []), user, out, pairs)
    if as_json:
        print_json(drafted.to_json())
    for sentence in drafted.sentences():
        say(sentence)


@data_verbs.command("review")
@with_exit_codes
def data_review(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    user: Annotated[str | None, typer.Option("--user", help="A user_id; without --pair, his quarantine alone.")] = None,
    pair: Annotated[str | None, typer.Option("--pair", metavar="ID", help="The pair to decide about.")] = None,
    decision: Annotated[Literal["accept", "reject"] | None, typer.Option("--decide", help="What is decided.")] = None,
    reason: Annotated[str | None, typer.Option(help="Why, for the audit trail.")] = None,
    reviewer: Annotated[str | None, typer.Option(help="Who decides.")] = None,
    as_json: Json = False,
) -> None:
    """Show the quarantine of a run, or decide about one pair; a later run is given the decisions."""
    from persona_rlhf.cli.console import open_run
    from persona_rlhf.pipeline import curate

    open_run(run)
    if pair is None:
        held = curate.quarantine(run, user)
        print_json([own.to_json() for own in held]) if as_json else print_table(curate.render_reviews(held))
        return
    if user is None or decision is None or not (reason and reason.strip()) or not (reviewer and reviewer.strip()):
        raise typer.BadParameter("to decide about a pair: --user, --pair, --decide accept|reject, --reason, --reviewer")
    made = curate.review(run, user, pair, decision, reason, reviewer)
    if as_json:
        print_json(made._asdict())
    say(f"{decision}ed; give it to the next run with screening.reviews={run / 'reviews.jsonl'}")
