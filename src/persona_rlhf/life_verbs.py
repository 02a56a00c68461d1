"""The verbs of the command line about a run's life after it was trained: users come and go, the base changes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from persona_rlhf.boundary import Json, bounded, console, print_json, print_table, say
from persona_rlhf.ending import exit_held_back, finish, say_promise
from persona_rlhf.opening import open_run
from persona_rlhf.release.forgotten import LIST
from persona_rlhf.replacement import before, check_replacement, replace_run

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]


@bounded
def forget(
    run: RunFolder,
    user: Annotated[str, typer.Option("--user", help="A user_id.")],
    data: Annotated[bool, typer.Option("--data", help="Take his rows out of the run's source files too.")] = False,
    as_json: Json = False,
) -> None:
    """Delete one user everywhere and write a proof."""
    from persona_rlhf.deletion import forget as delete
    from persona_rlhf.deletion import withdraw
    from persona_rlhf.preferences.identity import pseudonym
    from persona_rlhf.release.forgotten import proof_file

    open_run(run)
    for sentence in withdraw(run, user):
        say(sentence)
    done = delete(run, user, data)
    if done is None:
        say(f"`{user}` was forgotten already; the proof is {proof_file(run, pseudonym(user))}")
        return
    if as_json:
        print_json(done.content)
    removed = sum(piece["count"] for piece in done.content["removed"])
    say(f"`{user}` is forgotten: {removed:,} pieces in {len(done.content['removed'])} places.")
    for sentence in done.remains:
        say(f"Outside the run: {sentence}.")
    say(f"He stays out, whatever the sources hold; to let him in again, delete the proof.\nProof: {done.proof}")


@bounded
def add(
    run: RunFolder,
    users: Annotated[
        str, typer.Option("--users", metavar="PATH", help="New or changed users: each with all of his pairs.")
    ],
    as_json: Json = False,
) -> None:
    """Train new or changed users into a finished run; nobody else's bytes change."""
    open_run(run)
    from persona_rlhf.addition import add as train

    done = train(run, users, console(people=True))
    if done.results or as_json:
        finish(done.results, as_json)
    else:
        say("Nobody in there is new or changed.")
    if done.unchanged:
        say(f"{done.unchanged:,} users are in the run already, with the same pairs.")
    if done.forgotten:
        say(f"{done.forgotten:,} users asked to be forgotten and stay out; {run / LIST} says how they may come back.")
    if done.results:
        say_promise(run)
    exit_held_back(done.results)


@bounded
def rebase(
    run: RunFolder,
    base: Annotated[str, typer.Option("--base", metavar="NEW", help="The new base: a folder or a hub id.")],
    to: Annotated[
        Path | None, typer.Option("--run", metavar="NEWRUN", help="Folder of the new run; else RUN.rebased.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Then put the new run in the old one's place, and that to RUN.before.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train all users of a run again on a new base, and say what that changes for each of them."""
    open_run(run)
    from persona_rlhf import rebasing
    from persona_rlhf.release.comparison import comparison_table
    from persona_rlhf.release.results import RunResults
    from persona_rlhf.release.succession import succession_table

    place = to or run.with_name(f"{run.name}.rebased")
    if replace:
        check_replacement(run, place)
    done = rebasing.rebase(run, base, place, console(people=True))
    if as_json:
        print_json(done.to_json())
    else:
        print_table(succession_table(done.users))
        print_table(comparison_table(done.figures))
    if replace:
        replace_run(run, place)
        place = run
        say(f"{run} is on the new base now; the old run is {before(run)}.")
    say(f"Report:   {place / 'report.html'}\nAdapters: {place / 'adapters'}")
    exit_held_back(RunResults(place))


def add_life_verbs(app: typer.Typer) -> None:
    """Puts the verbs into the command line."""
    app.command()(add)
    app.command()(forget)
    app.command()(rebase)
