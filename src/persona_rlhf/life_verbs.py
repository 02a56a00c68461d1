"""The verbs of the command line about a run's life after it was trained: users come and go, the base changes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from persona_rlhf.boundary import Json, bounded, console, print_json, say
from persona_rlhf.ending import exit_held_back, finish, say_promise
from persona_rlhf.opening import open_run
from persona_rlhf.release.forgotten import LIST

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
    from persona_rlhf.preferences.identity import pseudonym
    from persona_rlhf.release.forgotten import proof_file

    open_run(run)
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
    if not done.results:
        say("Nobody in there is new or changed.")
    finish(done.results, as_json)
    if done.unchanged:
        say(f"{done.unchanged:,} users are in the run already, with the same pairs.")
    if done.forgotten:
        say(f"{done.forgotten:,} users asked to be forgotten and stay out; {run / LIST} says how they may come back.")
    if done.results:
        say_promise(run)
    exit_held_back(done.results)


def add_life_verbs(app: typer.Typer) -> None:
    """Puts the verbs into the command line."""
    app.command()(add)
    app.command()(forget)
