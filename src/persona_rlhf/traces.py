"""Everything in a run folder that is of one user, and how each piece goes; he is known by his pseudonym alone.

Each removal is whole or not at all, and can be done again: whatever it is interrupted by, doing all of them once more
ends in the same place.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.inputs.yaml_text import read_yaml
from persona_rlhf.preferences.identity import pseudonym
from persona_rlhf.preferences.pairs import PreferencePair
from persona_rlhf.preferences.store import PairStore, Roll
from persona_rlhf.release import audit
from persona_rlhf.release.erasure import erase, files_with_rows, rows_of
from persona_rlhf.release.fleet import SUMMARY
from persona_rlhf.release.folder import remove_folder, write_file
from persona_rlhf.release.forgotten import LIST, adapter_folders, tail
from persona_rlhf.release.redteam import REDTEAM, without_user
from persona_rlhf.release.seal import REVOKED, SEAL
from persona_rlhf.run_folder import RunFolder

_NAMELESS = (audit.AUDIT, REVOKED, "users.jsonl")  # they call users by their pseudonyms; the last goes by itself

_PAPERS = {SEAL, REDTEAM, SUMMARY, "policy.json", "bank.json", "identity.json", "persona.json", "adapter_config.json"}


_RULES = ("preferences", "not_in_force")  # of policy.json: what end users stated


class Trace(NamedTuple):
    """A piece: where it lies, what it is in words, how many of these there are, and what takes them away."""

    path: Path
    what: str
    pieces: int
    remove: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose traces are looked for."""

    name: str

    def __call__(self, user_id: object) -> bool:
        return isinstance(user_id, str) and _pseudonym(user_id) == self.name


class Outside(NamedTuple):
    """What a run's config says of places outside its folder; read leniently, for some may be gone."""

    users: str
    heldout: float
    utilities: str | None
    cache: str | None
    model: str


def read_outside(run: Path) -> Outside:
    """The places that RUN/config.yaml names. Raises InputError where it cannot be read."""
    tree = read_yaml(run / "config.yaml").tree
    try:
        config: Any = tree
        more, fleet = config.get("evaluation") or {}, config.get("fleet") or {}
        users = config["users"]
        asked = (users["path"], users.get("heldout", 0.25), more.get("utilities"), fleet.get("reference_cache"))
        return Outside(*asked, config["base"]["model"])
    except (AttributeError, KeyError, TypeError) as fault:
        sentence = f"the config of this run lacks a part of its form ({fault})"
        raise InputError([Problem(str(run / "config.yaml"), None, None, sentence)]) from fault


_pseudonym = lru_cache(4096)(pseudonym)


def traces(run: Path, name: str) -> Iterator[Trace]:
    """What the run folder holds of a user, piece by piece. Raises InputError where a file of it cannot be read."""
    his, inner = Owner(name), RunFolder(RunFolder(run).adding)
    if number_of(inner.roll.known, name) is not None:
        yield Trace(inner.path, "an addition under way, all of it", 1, partial(remove_folder, inner.path))
    for folder in adapter_folders(run):
        if folder.name.lstrip(".").partition(".")[0].endswith(tail(name)):
            yield Trace(folder, "adapter", 1, partial(shutil.rmtree, folder))
    yield from _files(run, his)
    yield from _checkpoints(run, his)
    yield from _papers(run, his)
    yield from _index(run, his)


def _files(run: Path, his: Owner) -> Iterator[Trace]:
    """Rows of files with a row or a line a pair, a step or a user; the run's own and sources that lie in it."""
    for file in files_below(run):
        if file.name.endswith((".half", ".old")):
            continue  # swept at the end, whosever it is
        if file.name in _NAMELESS or LIST in file.relative_to(run).parts or not files_with_rows(file):
            continue
        if file.suffix == ".json" and file.name in _PAPERS:
            continue
        if count := rows_of(file, his):
            yield Trace(file, "lines", count, partial(erase, file, his))


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, but those behind links."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def sweep(run: Path) -> None:
    """Removes what interrupted writes left behind: halves of files, and of lines. Anybody's data may be in them."""
    for path in sorted(run.rglob("*")):
        if path.name.endswith((".half", ".old")) and not path.is_symlink() and path.exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for file in (*run.rglob("metrics*.jsonl"), *run.rglob("ledger.jsonl")):
        if rows_of(file, _nobody, torn=True):
            erase(file, _nobody, torn=True)


def _nobody(_: object) -> bool:
    return False


def _checkpoints(run: Path, his: Owner) -> Iterator[Trace]:
    """What an interrupted training keeps."""
    for file in sorted((run / "state").rglob("*.safetensors")):
        if file.parent.name == "trained" and file.stem.endswith(tail(his.name)):
            yield Trace(file, "trained adapter of an unfinished run", 1, file.unlink)
        elif file.name == "slots.safetensors":
            from persona_rlhf.training import checkpoint

            if checkpoint.sits_in(file, his):
                yield Trace(file, "place in a checkpoint", 1, partial(checkpoint.without, file, his))


def _index(run: Path, his: Owner) -> Iterator[Trace]:
    """His line among the users; his number stays free. It goes last.

    Before it goes the base's log-probabilities that his chunk asked for, if it is in training: they are computed anew
    for the others.
    """
    folder = RunFolder(run)
    known = folder.roll.known
    if (number := number_of(known, his.name)) is not None:
        values = folder.chunk(number // folder.chunk_size) / folder.reference.name
        if values.exists():
            yield Trace(values, "the base's log-probabilities of a chunk, all", 1, values.unlink)
        rest = [*known[:number], None, *known[number + 1 :]]
        yield Trace(folder.users, "index line", 1, partial(folder.change_users, rest))


def number_of(known: Sequence[tuple[str, str] | None], name: str) -> int | None:
    """The number of a user; None where he is not among those known."""
    return next((number for number, user in enumerate(known) if user is not None and user[0] == name), None)


def _papers(run: Path, his: Owner) -> Iterator[Trace]:
    """Pieces of files that are about everybody."""
    file = run / REDTEAM
    if file.is_file() and any(his(user["user_id"]) for user in json.loads(file.read_bytes())["users"]):
        yield Trace(file, "red team's figures", 1, partial(without_user, run, his))
    for place in sorted(run.rglob("policy.json")):
        policy = json.loads(place.read_bytes())
        if own := [rule for key in _RULES for rule in policy.get(key, ()) if his(rule["user_id"])]:
            yield Trace(place, "tier-three rules of the policy", len(own), partial(_unrule, place, policy, own))


def _unrule(file: Path, policy: dict[str, Any], own: list[dict[str, Any]]) -> None:
    """The policy without a user's own rules and their document; its hash stays that which everybody was judged by."""
    documents = {rule["document"] for rule in own}
    kept = {
        **{key: [rule for rule in policy[key] if rule not in own] for key in _RULES if key in policy},
        "documents": [document for document in policy["documents"] if document["path"] not in documents],
    }
    write_file(file, (json.dumps(policy | kept, indent=2, ensure_ascii=False) + "\n").encode())


def cached(outside: Outside, roll: Roll, name: str) -> Iterator[Trace]:
    """What `fleet.reference_cache` keeps of the user: values that no other user of the run asked for.

    A value is known by the hash of its tokens, so his pairs are tokenized again to find them. Where his pairs are no
    longer those that were trained on, nobody can say which values were his, and all go: they are computed anew when
    they are needed.
    """
    files = sorted(Path(outside.cache).glob("*.safetensors")) if outside.cache is not None else []
    number = number_of(roll.known, name)
    if not files or (roll.known and number is None):
        return
    from persona_rlhf.training.reference import drop_values, values_of

    keys = None if number is None else _keys(outside, roll._replace(out=roll.out - {name}), number)
    what = "the base's log-probabilities of his rows" if keys is not None else "the base's log-probabilities, all"
    for file in files:
        if count := values_of(file, keys):
            yield Trace(file, what, count, partial(drop_values, file, keys))


def _keys(outside: Outside, roll: Roll, number: int) -> set[bytes] | None:
    """The rows that he alone asked for; None where that cannot be said any more."""
    from persona_rlhf.preferences.tokens import both_rows, tokenize
    from persona_rlhf.training.base import load_tokenizer
    from persona_rlhf.training.reference import key_of

    try:
        pairs = PairStore(outside.users, outside.heldout, roll)
        if pairs.known[number] != roll.known[number]:
            return None
        tokenizer = load_tokenizer(outside.model)

        def keys(told: Sequence[PreferencePair]) -> set[bytes]:
            rows = tokenize(told, tokenizer, sys.maxsize)
            return {key_of(row) for user in rows for row in both_rows((*user.train, *user.heldout))}

        his = pairs.of(range(number, number + 1))
        own = keys(his)
        for start in range(0, pairs.users, 256):
            told = pairs.of(range(start, min(start + 256, pairs.users)))
            own -= keys([pair for pair in told if pair.user_id != his[0].user_id])
    except InputError:
        return None
    return own
