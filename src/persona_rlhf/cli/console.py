"""Shared parts of all commands: exit codes of errors, JSON and tables, argument types, opening a run."""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec

import typer

from persona_rlhf.common.errors import InputError, visible
from persona_rlhf.common.files import full_disk_code
from persona_rlhf.common.run_lock import run_lock
from persona_rlhf.pipeline.distributed import HELD_BACK

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from persona_rlhf.pipeline.distributed import WorkShare
    from persona_rlhf.pipeline.monitoring import ProgressDisplay
    from persona_rlhf.release.results import Result

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]


P = ParamSpec("P")
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="Config of an experiment (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Changes to the config, as in YAML.")
]
Wait = Annotated[
    float,
    typer.Option("--wait", metavar="SECONDS", min=0, help="How long to wait for a program at work in the same run."),
]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable results on stdout.")]


def command_group(title: str) -> typer.Typer:
    """A group of commands with this title in its help."""
    return typer.Typer(
        help=title,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
    )


_AFTER_FULL_DISK = (
    "Nothing half-written is left, and finished work is kept: free space, then give the command again (`train` with "
    "--resume)."
)


def with_exit_codes(verb: Callable[P, None]) -> Callable[P, None]:
    """A command whose exceptions become messages and exit codes.

    2: wrong input or a full disk; 130: Ctrl-C; 1: an internal fault.
    PERSONA_RLHF_DEBUG=1 shows the traceback of a fault.
    """

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            verb(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise
        except InputError as fault:
            for problem in fault.problems:
                note(str(problem))
            count = len(fault.problems)
            note(f"{count} problem{'' if count == 1 else 's'} found.")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            note("Interrupted.")
            raise typer.Exit(130) from None
        except Exception as fault:
            if full_disk_code(fault) is not None:
                note(f"The disk is full: {fault}. {_AFTER_FULL_DISK}")
                raise typer.Exit(2) from None
            if os.environ.get("PERSONA_RLHF_DEBUG") == "1":
                traceback.print_exc()
            last = traceback.extract_tb(fault.__traceback__)[-1]
            fault_text = f"{type(fault).__name__} at {Path(last.filename).name}:{last.lineno}: {fault}"
            note(f"Internal fault, not your input: {fault_text}. PERSONA_RLHF_DEBUG=1 shows the traceback.")
            raise typer.Exit(1) from None

    return run


def note(text: str) -> None:
    """Prints a line for people on stderr; characters that their terminal cannot show are escaped."""
    encoding = sys.stderr.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=sys.stderr, flush=True)  # noqa: T201


def print_json(value: object) -> None:
    """Prints a machine-readable result on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=True))


def print_json_list(values: Iterable[object]) -> None:
    """Prints a machine-readable list on stdout, one value at a time."""
    before = "[\n"
    for value in values:
        typer.echo(before + json.dumps(value, ensure_ascii=True), nl=False)
        before = ",\n"
    typer.echo("[]" if before == "[\n" else "\n]")


def print_table(table: RenderableType) -> None:
    """Prints a result for people on stdout."""
    console(people=False).print(table)


def console(people: bool) -> Console:
    """A console on stderr (for people, while a command runs) or stdout; in a pipe its lines fit a wide table."""
    from rich.console import Console

    terminal = Console(stderr=people)
    return terminal if terminal.is_terminal else Console(stderr=people, width=160)


def progress_display(share: WorkShare | None = None) -> ProgressDisplay:
    """A display of progress events on stderr.

    Imports are over by then, so garbage is collected as Python does by default. `main` has it collected rarely, and
    tensors in reference cycles must not wait so long.
    """
    from persona_rlhf.pipeline.monitoring import ProgressDisplay

    gc.freeze()  # what is imported stays, and is not looked at again
    gc.set_threshold(700, 10, 10)
    return ProgressDisplay(console(people=True), share)


def print_results(results: Iterable[Result], as_json: bool) -> None:
    """Prints the result table, or the lines of results.jsonl as a JSON list, one user at a time."""
    if as_json:
        print_json_list(result.to_json() for result in results)
        return
    from persona_rlhf.release.render import results_table

    print_table(results_table(results))


def print_guarantee(run: Path) -> None:
    """Prints what the gate's bounds imply for all users together, in one sentence."""
    from persona_rlhf.release.results import read_sentence

    if (sentence := read_sentence(run)) is not None:
        note(sentence)


_REASONS_SHOWN = 20


def exit_if_withheld(results: Iterable[Result]) -> None:
    """Ends with exit code 3 if a user was held back by the gate or failed, with the first reasons on stderr."""
    withheld = 0
    for result in results:
        if result.status in ("held_back", "failed"):
            withheld += 1
            if withheld <= _REASONS_SHOWN:
                verdict = result.status.replace("_", " ")
                note(visible(f"{result.user_id}: {verdict}: {result.reason.removeprefix(f'{verdict}: ')}"))
    if withheld > _REASONS_SHOWN:
        note(f"and {withheld - _REASONS_SHOWN:,} more users; results.jsonl has the reason of each")
    if withheld:
        raise typer.Exit(HELD_BACK)


@contextmanager
def open_run(run: Path, verb: str, wait: float, *, shared: bool = False, part: str | None = None) -> Iterator[None]:
    """Holds the lock of a run for a verb, alone, `shared` with readers, or as a `part` (see `run_lock`).

    Additions, deletions, replacements and ways back to earlier adapters that were interrupted in the run are finished
    first. Raises InputError if one cannot be finished, or another program holds the lock for longer than `wait`
    seconds; OSError if the disk is full.
    """
    from persona_rlhf.pipeline.run_dir import RunDir, finish_replacement
    from persona_rlhf.release.deletion_records import pending
    from persona_rlhf.release.earlier_adapters import finish_restoring, is_restoring

    if finish_replacement(run, wait, note):
        note(f"Finished an interrupted replacement: {run}")
    if RunDir(run).addition_trained.is_file() or pending(run):  # or they are under way: the lock tells
        with run_lock(run, verb, wait=wait, tell=note):
            _finish_interrupted(run)
    if is_restoring(run):
        finish_restoring(run, wait)
    with run_lock(run, verb, shared=shared, part=part, wait=wait, tell=note):
        yield


def _finish_interrupted(run: Path) -> None:
    """Finishes the addition and the deletions that a killed program left in a locked run."""
    from persona_rlhf.pipeline.run_dir import RunDir
    from persona_rlhf.release.deletion_records import pending

    if RunDir(run).addition_trained.is_file():
        from persona_rlhf.pipeline.update_run import complete_addition

        complete_addition(run)
        note(f"Finished an interrupted addition: {run}")
    if pending(run):
        from persona_rlhf.pipeline.forget_user import finish_forgetting

        for done in finish_forgetting(run):
            note(f"Finished an interrupted deletion: {done.proof}")
