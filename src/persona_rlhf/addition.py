"""`add`: users new to a finished run, or whose pairs changed, are trained into it; the others stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from persona_rlhf import line
from persona_rlhf.config import Config, read_config
from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.joining import begin_joining, join
from persona_rlhf.materials import read_materials
from persona_rlhf.preferences.store import PairStore, Roll
from persona_rlhf.release.folder import remove_folder
from persona_rlhf.release.results import Result, read_results
from persona_rlhf.run_folder import RunFolder
from persona_rlhf.shards import Share


class Added(NamedTuple):
    """Who was trained, and how many users of the source were not: nothing of theirs changed, or they asked to be
    forgotten."""

    results: list[Result]
    unchanged: int
    forgotten: int


def add(run: Path, source: str, console: Console) -> Added:
    """Trains the users of `source` whose pairs the run does not have as they are there, and makes them users of it.

    Whoever is in `source` is there with all of his pairs: they replace what the run had of him. The run's config, base
    and policy are those that it began with. A call that was killed is gone on with by the next.

    Raises InputError where the run is not finished, its base, policy or config changed since, its gate shares delta
    among all users, or the source cannot be read; nothing is changed then.
    """
    folder = RunFolder(run)
    inner = RunFolder(folder.adding)
    if not folder.finished:
        sentence = "this run is not finished; go on with it (train has --resume) before users are added"
        raise InputError([Problem(str(run), None, None, sentence)])
    config = read_config(run / "config.yaml")
    if config.gate.enabled and config.gate.family == "all":
        sentence = "this run shares delta among all of its users, so nothing of it is left for new ones"
        raise InputError([Problem(str(run / "config.yaml"), None, "gate.family", sentence)])
    roll = folder.roll
    wanted, store = _wanted(config, source, roll)
    there = len([user for user in store.known if user is not None])
    if not wanted:
        return Added([], there, store.left_out)
    if inner.path.exists() and [user for user in inner.roll.known if user is not None] != wanted:
        console.print("another addition was under way; this one begins anew")
        remove_folder(inner.path)
    if not inner.begun:
        inner.begin_as(folder, wanted, Share().chunk_size(len(wanted), config.fleet.chunk))
    out = roll.out | {user[0] for user in store.known if user is not None} - {name for name, _ in wanted}
    asked = config.model_copy(update={"users": config.users.model_copy(update={"path": source})})
    materials = read_materials(asked, Roll(inner.roll.known, frozenset(out)))
    line.train(config, inner.path, True, console, materials, trail=run)
    results = read_results(inner.path)
    begin_joining(run, source)
    join(run)
    return Added(results, there - len(wanted), store.left_out)


def _wanted(config: Config, source: str, roll: Roll) -> tuple[list[tuple[str, str]], PairStore]:
    """The users of a source whom the run does not have, or has with other pairs; and all of the source."""
    store = PairStore(source, config.users.heldout, Roll(out=roll.out))
    known = {user for user in roll.known if user is not None}
    return [user for user in store.known if user is not None and user not in known], store
