"""Errors -> exit codes, JSON/tables, shared argument types."""

from __future__ import annotations

import errno
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec

import typer

from persona_rlhf.common.errors import InputError
from persona_rlhf.pipeline.distributed import HELD_BACK

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from persona_rlhf.pipeline.distributed import WorkShare
    from persona_rlhf.pipeline.monitoring import ProgressDisplay
    from persona_rlhf.release.results import Result

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]


# ----------------------------------------------------------------------------------------------------
# Where the program meets people: errors become a sentence and an exit code (1 our fault, 2 the input's), output.
# ----------------------------------------------------------------------------------------------------

P = ParamSpec("P")
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="Config of an experiment (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Changes to the config, as in YAML.")
]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable results on stdout.")]


def verb_group(what: str) -> typer.Typer:
    """A group of verbs; `what` stands in its help."""
    return typer.Typer(
        help=what, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False
    )


def with_exit_codes(verb: Callable[P, None]) -> Callable[P, None]:
    """A verb that ends in an exit code whatever happens; PERSONA_RLHF_DEBUG=1 shows the traceback of a fault."""

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            verb(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise
        except InputError as fault:
            for problem in fault.problems:
                say(str(problem))
            count = len(fault.problems)
            say(f"{count} problem{'' if count == 1 else 's'} found.")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            say("Interrupted.")
            raise typer.Exit(130) from None
        except Exception as fault:
            if isinstance(fault, OSError) and fault.errno in (errno.ENOSPC, errno.EDQUOT):
                say(f"The disk is full ({fault}). What is done is kept: make room, then go on (train has --resume).")
                raise typer.Exit(1) from None
            if os.environ.get("PERSONA_RLHF_DEBUG") == "1":
                traceback.print_exc()
            last = traceback.extract_tb(fault.__traceback__)[-1]
            what = f"{type(fault).__name__} at {Path(last.filename).name}:{last.lineno}: {fault}"
            say(f"Internal fault, not your input: {what}. PERSONA_RLHF_DEBUG=1 shows the traceback.")
            raise typer.Exit(1) from None

    return run


def say(text: str) -> None:
    """A line for people, on stderr; what their terminal cannot show is escaped."""
    encoding = sys.stderr.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=sys.stderr, flush=True)  # noqa: T201


def print_json(value: object) -> None:
    """A machine-readable result, on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=True))


def print_json_list(values: Iterable[object]) -> None:
    """A machine-readable list, on stdout, one value at a time."""
    before = "[\n"
    for value in values:
        typer.echo(before + json.dumps(value, ensure_ascii=True), nl=False)
        before = ",\n"
    typer.echo("[]" if before == "[\n" else "\n]")


def print_table(table: RenderableType) -> None:
    """A result for people, on stdout."""
    console(people=False).print(table)


def console(people: bool) -> Console:
    """A console on stderr (for people while something runs) or stdout; a pipe gets lines wide enough for a table."""
    from rich.console import Console

    found = Console(stderr=people)
    return found if found.is_terminal else Console(stderr=people, width=160)


def progress_display(share: WorkShare | None = None) -> ProgressDisplay:
    """A display of progress events on stderr."""
    from persona_rlhf.pipeline.monitoring import ProgressDisplay

    return ProgressDisplay(console(people=True), share)


# ----------------------------------------------------------------------------------------------------
# How a verb over a run ends: the table of its users, what is promised of them together, and the exit code.
# ----------------------------------------------------------------------------------------------------


def finish(results: Iterable[Result], as_json: bool) -> None:
    """The result table, or the lines of results.jsonl as a list; of many users never all at once."""
    if as_json:
        print_json_list(result.to_json() for result in results)
        return
    from persona_rlhf.release.render import results_table

    print_table(results_table(results))


def print_guarantee(run: Path) -> None:
    """What the gate promises of all users together, in one sentence."""
    from persona_rlhf.release.results import read_sentence

    if (sentence := read_sentence(run)) is not None:
        say(sentence)


def exit_held_back(results: Iterable[Result]) -> None:
    """Exit code 3 where a user was held back: a result, but not the one that was asked for."""
    if any(result.status == "held_back" for result in results):
        raise typer.Exit(HELD_BACK)


# ----------------------------------------------------------------------------------------------------
# How a program opens a run: what another one began to change in it, and was cut short in, is finished first.
# ----------------------------------------------------------------------------------------------------


def open_run(run: Path) -> None:
    """Finishes the additions, deletions and replacements that were begun.

    Raises InputError where one cannot be finished, OSError where the disk is full.
    """
    from persona_rlhf.pipeline.run_dir import RunDir, finish_replacement
    from persona_rlhf.release.deletion_records import pending

    if finish_replacement(run):
        say(f"A replacement that was cut short is finished: {run}")
    if RunDir(run).addition_trained.is_file():
        from persona_rlhf.pipeline.update_run import complete_addition

        complete_addition(run)
        say(f"An addition that was cut short is finished: {run}")
    if pending(run):
        from persona_rlhf.pipeline.forget_user import finish_forgetting

        for done in finish_forgetting(run):
            say(f"A deletion that was cut short is finished: {done.proof}")
