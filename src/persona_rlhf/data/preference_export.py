"""`data export`: preference pairs as tasks of Label Studio or records of Argilla, which `data import` reads back."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from persona_rlhf.common.errors import InputError, Problem, counted, did_you_mean
from persona_rlhf.common.files import atomic_write
from persona_rlhf.data.pairs import PreferencePair, Split, first_problems, parsed_rows


class ExportSummary(NamedTuple):
    """The outcome of an export: pairs written, their users, and ties, for which these formats have no place."""

    format: str
    pairs: int
    users: int
    ties: int
    path: Path

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**self._asdict(), "path": str(self.path)}

    def sentences(self) -> Iterator[str]:
        """The outcome as sentences."""
        yield f"{counted(self.pairs, 'pair')} of {counted(self.users, 'user')} written to {self.path}."
        if self.ties:
            yield f"  {counted(self.ties, 'tie')} left out: the format has no place for one."


class _ShownPair(NamedTuple):
    """A pair as a tool shows it: two answers in order, and the index of the chosen one."""

    pair: PreferencePair
    prompt: str | list[dict[str, str]]
    answers: tuple[str, str]
    chosen: int
    about: dict[str, str]  # user, split and time, where a row has them


def export_file(name: str, src: Path | str, out: Path) -> ExportSummary:
    """Writes the pairs of a file or folder as one JSON list, pair by pair.

    Raises InputError, and writes nothing, for an unknown format, an `out` that is no new .json file, or bad rows (all
    at once).
    """
    if name not in EXPORTS:
        sentence = f"no export is named `{name}`{did_you_mean(name, EXPORTS)}; there is {', '.join(EXPORTS)}"
        raise InputError([Problem("data export", None, "FORMAT", sentence)])
    if out.suffix != ".json" or out.exists():
        raise InputError([Problem(str(out), None, None, "the output is a new file of one JSON list; name it *.json")])
    users, ties = Counter[str](), Counter[str]()
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, _listed(src, EXPORTS[name], users, ties))
    return ExportSummary(name, users.total(), len(users), ties.total(), out)


def _listed(
    src: Path | str, arrange: Callable[[_ShownPair], dict[str, Any]], users: Counter[str], ties: Counter[str]
) -> Iterator[str]:
    """The text of a JSON list, an object a line; pairs and ties are counted by user.

    Raises InputError naming every bad row at the end.
    """
    problems: list[Problem] = []
    for row in parsed_rows(src):
        if isinstance(row, Problem):
            problems.append(row)
        elif row[0].tie:
            ties[row[0].user_id] += 1
        elif not problems:
            yield ",\n" if users else "[\n"
            users[row[0].user_id] += 1
            yield json.dumps(arrange(_shown(*row)), ensure_ascii=False)
    if problems:
        raise InputError(first_problems(problems))
    yield "\n]\n" if users else "[]\n"


def _shown(pair: PreferencePair, split: Split | None) -> _ShownPair:
    """The order of two answers is the one in which they were shown; where that is unknown, a hash of the pair's id."""
    hashed = hashlib.blake2b(pair.id.encode(), digest_size=1).digest()[0] % 2
    chosen = pair.place[0] - 1 if pair.place is not None and pair.place[1] == 2 else hashed
    answers = (pair.rejected, pair.chosen) if chosen else (pair.chosen, pair.rejected)
    messages = [message._asdict() for message in pair.prompt]
    prompt = messages[0]["content"] if [message.role for message in pair.prompt] == ["user"] else messages
    about = {"user_id": pair.user_id, "split": split, "created_at": pair.created_at}
    return _ShownPair(pair, prompt, answers, chosen, {key: value for key, value in about.items() if value is not None})


def _label_studio(shown: _ShownPair) -> dict[str, Any]:
    """A task with one annotation: `left` and `right` are the answers of a Pairwise control."""
    left, right = shown.answers
    selected = {"selected": ("left", "right")[shown.chosen]}
    result = {"from_name": "preference", "to_name": "left,right", "type": "pairwise", "value": selected}
    data = {"prompt": shown.prompt, "left": left, "right": right, **shown.about}
    return {"data": data, "annotations": [{"result": [result]}]}


def _argilla(shown: _ShownPair) -> dict[str, Any]:
    """A record as `Record.to_dict` of Argilla 2; its user ids are UUIDs, so one is hashed from ours."""
    names = ("response_a", "response_b")
    ranking = [names[shown.chosen], names[1 - shown.chosen]]
    user = str(uuid.uuid5(uuid.NAMESPACE_OID, shown.pair.user_id))
    return {
        "id": shown.pair.id,
        "fields": {"prompt": shown.prompt, **dict(zip(names, shown.answers, strict=True))},
        "metadata": shown.about,
        "suggestions": {},
        "responses": {"ranking": [{"value": ranking, "user_id": user}]},
        "vectors": {},
    }


EXPORTS: Mapping[str, Callable[[_ShownPair], dict[str, Any]]] = {"label-studio": _label_studio, "argilla": _argilla}
