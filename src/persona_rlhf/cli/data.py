"""The commands of the group `data`: check, import, screen, draft and review preferences."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from persona_rlhf.cli.console import (
    ConfigFile,
    Json,
    Overrides,
    RunArgument,
    Wait,
    command_group,
    note,
    open_run,
    print_json,
    print_table,
    progress_display,
    with_exit_codes,
)
from persona_rlhf.common.run_lock import WAIT_SECONDS
from persona_rlhf.data.importers import format_list
from persona_rlhf.data.preference_export import EXPORTS

data_commands = command_group("Preference files.")


@data_commands.command("check")
@with_exit_codes
def data_check(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...")],
    render: Annotated[bool, typer.Option("--render", help="Show the first pair as the model sees it.")] = False,
    base: Annotated[str, typer.Option("--base", help="With --render: the base with the chat template.")] = "data/base",
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Also write a page (HTML) with distributions.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Validate preference files: every bad row, with its number, at once."""
    from persona_rlhf.data import check

    summary, pair = check.check(paths), None
    if render:
        from persona_rlhf.models.base import load_tokenizer

        pair = check.rendered(check.first_pair(paths[0]), base, load_tokenizer(base))
    if report is not None:
        from persona_rlhf.release.data_report import write_data_report

        write_data_report(summary, paths, report)
        note(f"report: {report}")
    if as_json:
        print_json(summary.to_json() | ({} if pair is None else {"rendered": pair.to_json()}))
        return
    print_table(check.render(summary))
    if pair is not None:
        print_table(pair.panel())


@data_commands.command("import")
@with_exit_codes
def data_import(
    name: Annotated[str, typer.Argument(metavar="FORMAT", help=format_list())],
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A file or a folder; of probes, a hub id too.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new .jsonl file; a folder for the banks of probes.")],
    train: Annotated[bool, typer.Option("--train", help="Let public probes fall into the train split too.")] = False,
    min_pairs: Annotated[
        int, typer.Option("--min-pairs", metavar="N", min=1, help="Leave out users with fewer preference pairs.")
    ] = 1,
    column: Annotated[
        list[str] | None, typer.Option(metavar="ROLE=COLUMN", help="Another column for a role, such as user=annotator.")
    ] = None,
    user: Annotated[str | None, typer.Option("--user", help="One user for all rows, of a set that names none.")] = None,
    min_gap: Annotated[
        float | None, typer.Option("--min-gap", metavar="X", min=0, help="The smallest difference of two scores.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert preference files of other formats, or public sets of probes, to ours."""
    from persona_rlhf.data.importers import import_file
    from persona_rlhf.data.preference_import import SetChoices

    roles = [text.partition("=") for text in column or []]
    if any(not role or not path for role, _, path in roles):
        raise typer.BadParameter("--column takes ROLE=COLUMN, such as user=annotator")
    choices = SetChoices({role: path for role, _, path in roles}, user, min_gap)
    summary = import_file(name, source, out, train, min_pairs, choices, note)
    if as_json:
        print_json(summary.to_json())
    for sentence in summary.sentences():
        note(sentence)


@data_commands.command("export")
@with_exit_codes
def data_export(
    name: Annotated[str, typer.Argument(metavar="FORMAT", help=", ".join(EXPORTS))],
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A preference file, or a folder of them.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new .json file.")],
    as_json: Json = False,
) -> None:
    """Write preference files for an annotation tool; `data import` reads them, and the tool's own export, back."""
    from persona_rlhf.data.preference_export import export_file

    summary = export_file(name, source, out)
    if as_json:
        print_json(summary.to_json())
    for sentence in summary.sentences():
        note(sentence)


@data_commands.command("screen")
@with_exit_codes
def data_screen(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Report the pairs that a config's screens would remove, and the screens' error rates; nothing is written."""
    from persona_rlhf.config.experiment import read_config
    from persona_rlhf.pipeline.curate import render_screening, screen_dry_run
    from persona_rlhf.pipeline.inputs import read_inputs

    settings = read_config(config, overrides or [])
    inputs = read_inputs(settings)
    with progress_display() as display:
        screened = screen_dry_run(settings, inputs, display)
    if as_json:
        print_json(screened.to_json())
        return
    for table in render_screening(screened):
        print_table(table)


@data_commands.command("draft")
@with_exit_codes
def data_draft(
    config: ConfigFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new .jsonl file.")],
    user: Annotated[str, typer.Option("--user", help="A user_id whose tier-three document states preferences.")],
    overrides: Overrides = None,
    pairs: Annotated[int, typer.Option(min=1, help="The largest number of pairs.")] = 64,
    as_json: Json = False,
) -> None:
    """Draft pairs for a user without any: answers of the base, ranked by the user's stated preferences."""
    from persona_rlhf.config.experiment import read_config
    from persona_rlhf.pipeline.curate import draft

    settings = read_config(config, overrides or [])
    with progress_display() as display:
        drafted = draft(settings, user, out, pairs, display)
    if as_json:
        print_json(drafted.to_json())
    for sentence in drafted.sentences():
        note(sentence)


@data_commands.command("review")
@with_exit_codes
def data_review(
    run: RunArgument,
    user: Annotated[str | None, typer.Option("--user", help="A user_id; without --pair, show this user only.")] = None,
    pair: Annotated[str | None, typer.Option("--pair", metavar="ID", help="The pair to decide about.")] = None,
    decision: Annotated[Literal["accept", "reject"] | None, typer.Option("--decide", help="The decision.")] = None,
    reason: Annotated[str | None, typer.Option(help="The reason, for the audit trail.")] = None,
    reviewer: Annotated[str | None, typer.Option(help="The person who decides.")] = None,
    as_json: Json = False,
    wait: Wait = WAIT_SECONDS,
) -> None:
    """Show the quarantine of a finished run, or decide about one pair; a later run is given the decisions."""
    from persona_rlhf.pipeline import curate

    if pair is None:
        with open_run(run, "data review", wait, shared=True):
            quarantined = curate.quarantine(run, user)
        as_rows = [entry.to_json() for entry in quarantined]
        print_json(as_rows) if as_json else print_table(curate.render_reviews(quarantined))
        return
    if user is None or decision is None or not (reason and reason.strip()) or not (reviewer and reviewer.strip()):
        raise typer.BadParameter("to decide about a pair: --user, --pair, --decide accept|reject, --reason, --reviewer")
    with open_run(run, "data review", wait):
        review = curate.review(run, user, pair, decision, reason, reviewer)
    if as_json:
        print_json(review._asdict())
    past = {"accept": "Accepted", "reject": "Rejected"}[decision]
    note(f"{past}. Give the decision to the next run with screening.reviews={run / 'reviews.jsonl'}")
