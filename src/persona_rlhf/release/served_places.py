"""Places outside a run that hold data of its users because it is served: token files, layouts, engines, ledgers.

`serve` and `collect` note each place in RUN/state/served.jsonl, so that `forget` can take a user out of it, or name it.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import append_whole, atomic_write
from persona_rlhf.common.json_lines import read_json_lines
from persona_rlhf.data.choice_ledger import choice_traces, choices_in
from persona_rlhf.data.erasure import DataSubject, Trace
from persona_rlhf.release.engine_layout import erase_from_layout, layout_adapters_of

SERVED = Path("state") / "served.jsonl"
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


PlaceKind = Literal["tokens", "layout", "engine", "ledger"]


class ServedPlace(NamedTuple):
    """A token file, an engine's layout or a ledger of choices by its absolute path, or the URL of a running engine."""

    kind: PlaceKind
    place: str


def note_place(run: Path, kind: PlaceKind, place: Path | str) -> str | None:
    """Notes a place of a run, once; a sentence where the run's folder cannot be written to.

    A line is appended at once, so that several servers may do so.
    """
    line = ServedPlace(kind, str(place.resolve()) if isinstance(place, Path) else place)
    if line in served_places(run):
        return None
    try:
        (run / SERVED).parent.mkdir(exist_ok=True)
        with (run / SERVED).open("ab") as stream:
            append_whole(stream, json.dumps(line._asdict()).encode() + b"\n")
    except OSError as fault:
        return f"{run} cannot be written to ({fault.strerror}): `forget` will not know of {line.place}"
    return None


def served_places(run: Path) -> list[ServedPlace]:
    """The places that a run was served from. Raises InputError for a line that names none."""
    file = run / SERVED
    sentence = 'a line reads {"kind": "tokens" | "layout" | "engine" | "ledger", "place": ...}; remove this one'
    return list(dict.fromkeys(read_json_lines(file, ServedPlace, sentence))) if file.exists() else []


def served_traces(run: Path, user: DataSubject) -> Iterator[Trace]:
    """The user in token files, engine layouts and ledgers of choices that can be read now."""
    for kind, place in served_places(run):
        path = Path(place)
        if kind == "tokens" and (count := _reachable(_tokens_of, path, user)):
            yield Trace(path, "tokens", count, partial(_if_permitted, _erase_tokens, path, user))
        if kind == "layout" and (count := _reachable(_adapters_of, path, user)):
            yield Trace(
                path, "adapters of an engine's layout", count, partial(_if_permitted, erase_from_layout, path, user)
            )
        if kind == "ledger" and _reachable(_choices_of, path, user):
            yield from choices_in(path, user)


def ledger_choices(run: Path, user: DataSubject) -> Iterator[Trace]:
    """The choices of a user in every ledger of the run that can be read now."""
    yield from choice_traces(run, user)
    for kind, place in served_places(run):
        if kind == "ledger" and _reachable(_choices_of, Path(place), user):
            yield from choices_in(Path(place), user)


def served_remains(run: Path, user: DataSubject) -> Iterator[tuple[str, str]]:
    """Places that may still hold the user: words for the proof, and a sentence with the place for people."""
    for kind, place in served_places(run):
        path = Path(place)
        if kind == "tokens" and _reachable(_tokens_of, path, user) != 0:
            yield "a token file", f"{place} has, or had, a token of the user: remove the line whose slug ends so"
        if kind == "layout":
            if _reachable(_adapters_of, path, user) != 0:
                yield "an engine's layout", f"{place} has, or had, the adapter: write the layout again, or delete it"
            yield "an engine's memory", _engine(f"vLLM started from {place}, or from a copy of it,")
        if kind == "engine":
            yield "an engine's memory", _engine(f"vLLM at {place}")
        if kind == "ledger" and _reachable(_choices_of, path, user) != 0:
            yield "a ledger of choices", f"{place} has, or had, choices of the user: give `forget` again where it is"


def _engine(engine: str) -> str:
    return f"{engine} may hold the adapter in its memory: start it again, from a layout without the user"


def _reachable(count: Callable[[Path, DataSubject], int], path: Path, user: DataSubject) -> int | None:
    """The user's pieces in a place; None where it cannot be read."""
    try:
        return count(path, user)
    except (OSError, ValueError, TypeError, InputError):
        return None


def _tokens_of(file: Path, user: DataSubject) -> int:
    return sum(_is_token_of(line, user) for line in file.read_bytes().splitlines())


def _adapters_of(folder: Path, user: DataSubject) -> int:
    return len(layout_adapters_of(folder, user))


def _choices_of(file: Path, user: DataSubject) -> int:
    if not file.exists():
        raise FileNotFoundError(file)
    return sum(trace.pieces for trace in choices_in(file, user))


def _is_token_of(line: bytes, user: DataSubject) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and user.owns_slug(str(row.get("slug")))


def _erase_tokens(file: Path, user: DataSubject) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    atomic_write(file, [line for line in lines if not _is_token_of(line, user)], private=True)


def _if_permitted(erase: Callable[[Path, DataSubject], None], path: Path, user: DataSubject) -> None:
    """Erases the user from a place, unless it may not be written to: then `served_remains` names it."""
    try:
        erase(path, user)
    except OSError as fault:
        if fault.errno not in _FORBIDDEN:
            raise
