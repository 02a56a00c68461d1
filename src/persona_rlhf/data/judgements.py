"""Judgements in the rows of a preference set: a person, a prompt, and answers with their scores."""

from __future__ import annotations

import json
import math
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from tempfile import gettempdir
from typing import Any, NamedTuple

from persona_rlhf.common.files import naming_full_disk
from persona_rlhf.data.layouts import UNREADABLE
from persona_rlhf.data.preference_sets import PreferenceSet, value_at

UNREAD = (*UNREADABLE, "system", "history")
"""Columns of other trainers whose content belongs to a row's text, and that no set's columns hold."""


class ScoredAnswer(NamedTuple):
    """An answer to a prompt: a text, or messages; the higher score is preferred, and None is no score."""

    name: str
    text: Any
    score: float | None


class Judgement(NamedTuple):
    """A person's judgement of the answers to one prompt; `prompt` is None if the answers are whole conversations."""

    user: str
    prompt: Any
    answers: list[ScoredAnswer]
    id: str
    time: str | None
    split: str | None


class PlacedJudgement(NamedTuple):
    """A judgement, or the reason why there is none, with the file and line of its row."""

    file: str
    line: int
    judgement: Judgement | str


class Comparison(NamedTuple):
    """Two answers of a judgement, the preferred one first."""

    chosen: ScoredAnswer
    rejected: ScoredAnswer


def judgements_of(columns: PreferenceSet, row: Mapping[str, object]) -> Iterator[Judgement | str]:
    """The judgements of a row; a reason where a judgement lacks a part.

    In a conversation, the turns before and the answers they went on with stand before a turn's prompt.
    """
    history: list[dict[str, Any]] = []
    broken = False
    lost = next((column for column in UNREAD if row.get(column) not in (None, "", [], {}, "[]")), None)
    if lost is not None and (columns.chosen or columns.gathered):
        yield f"`{lost}` would be left out of the text"
        return
    parts = list(_parts(columns, row))
    if not parts:
        yield f"no judgement in `{columns.thread or columns.each}`"
    for number, (name, part) in enumerate(parts):
        prompt, answers = _prompt(columns, part, name), _answers(columns, part, name)
        if columns.turns and number and prompt is None and isinstance(answers, str):
            broken = True
            continue
        user = _user(columns, part, name)
        if user is None:
            yield f"no user in {' or '.join(f'`{path}`' for path in columns.user)}"
        elif (columns.prompt or columns.template) and not columns.chosen and prompt is None:
            yield f"no prompt in `{_path(columns.prompt or 'its template', name)}`"
        elif isinstance(prompt, str) and not prompt.strip():
            yield "an empty prompt"
        elif isinstance(answers, str):
            yield answers
        elif broken:
            yield "a turn after one without a choice"
        else:
            request = [*history, {"role": "user", "content": prompt}] if columns.turns else prompt
            split = None if columns.split is None else columns.splits.get(str(value_at(part, columns.split)))
            row_id = "" if columns.id is None or (value := value_at(part, columns.id)) is None else str(value)
            identity = "/".join(filter(None, (row_id, name))) if row_id else ""
            yield Judgement(user, request, answers, identity, _time(columns, part), split)
        if not columns.turns:
            continue
        next_answer = None if broken or isinstance(answers, str) else _continued(columns, part, name, answers)
        if next_answer is None:
            broken = True
        else:
            history += [{"role": "user", "content": prompt}, {"role": "assistant", "content": next_answer.text}]


def comparisons(answers: Sequence[ScoredAnswer], gap: float) -> Iterator[Comparison | str]:
    """The answers of the highest score against each other answer; a reason where two are not compared."""
    scored = [answer for answer in answers if answer.score is not None]
    yield from ["an answer without a score"] * (len(answers) - len(scored))
    if len(scored) < 2:
        yield "fewer than two answers"
        return
    highest = max(answer.score for answer in scored if answer.score is not None)
    best = [answer for answer in scored if answer.score == highest]
    yield from ["a tie"] * (len(best) * (len(best) - 1) // 2)
    for chosen in best:
        for rejected in scored:
            if rejected.score is None or rejected.score == highest:
                continue
            if highest - rejected.score < gap:
                yield f"scores less than {gap:g} apart"
            elif _is_empty(chosen.text) or _is_empty(rejected.text):
                yield "an empty answer"
            elif chosen.text == rejected.text:
                yield "equal answers"
            else:
                yield Comparison(chosen, rejected)


def gathered(items: Iterable[PlacedJudgement]) -> Iterator[PlacedJudgement]:
    """Judgements with all answers of a user to a prompt, from rows in any order; sorted by user, in a temporary file.

    Raises DiskFullError if the temporary folder is full.
    """
    with naming_full_disk(Path(gettempdir()) / "answers by prompt"), closing(sqlite3.connect("")) as store:
        store.execute("CREATE TABLE answers (user TEXT, prompt TEXT, place TEXT)")
        for item in items:
            if isinstance(item.judgement, str):
                yield item
                continue
            user, prompt = item.judgement.user, json.dumps(item.judgement.prompt)
            store.execute("INSERT INTO answers VALUES (?, ?, ?)", (user, prompt, json.dumps(item)))
        rows = store.execute("SELECT user, prompt, place FROM answers ORDER BY user, prompt, rowid")
        for _, group in groupby(rows, key=lambda row: row[:2]):
            places = [PlacedJudgement(*json.loads(place)) for _, _, place in group]
            first = Judgement(*places[0].judgement)
            answers = [ScoredAnswer(*answer) for place in places for answer in Judgement(*place.judgement).answers]
            yield places[0]._replace(judgement=first._replace(answers=answers))


def _parts(columns: PreferenceSet, row: Mapping[str, object]) -> Iterator[tuple[str, Mapping[str, object]]]:
    """The parts of a row with a judgement each, by name; an item of a list is at `item`."""
    if isinstance(columns.each, list):
        yield from ((name, row) for name in columns.each)
    elif columns.thread is not None or columns.each is not None:
        items = value_at(row, columns.thread or columns.each or "")
        if isinstance(items, list | tuple):
            parts = _threaded(items) if columns.thread else items
            yield from ((str(number), {**row, "item": item}) for number, item in enumerate(parts))
    else:
        yield "", row


def _threaded(messages: Sequence[object]) -> list[dict[str, Any]]:
    """Messages as turns: the user's message, and the answers that follow it."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        if isinstance(message, Mapping) and message.get("role") == "user":
            turns.append({"prompt": message.get("content"), "answers": []})
        elif turns:
            turns[-1]["answers"].append(message)
    return turns


def _path(path: str, name: str, answer: str = "") -> str:
    return path.replace("{each}", name).replace("{answer}", answer)


def _user(columns: PreferenceSet, row: Mapping[str, object], name: str) -> str | None:
    if columns.user_name is not None:
        return _path(columns.user_name, name)
    values = (value_at(row, path) for path in columns.user)
    ids = (str(value) for value in values if isinstance(value, str | int) and not isinstance(value, bool))
    return next(filter(None, ids), None)


def _prompt(columns: PreferenceSet, row: Mapping[str, object], name: str) -> Any:
    if columns.template is not None:
        texts = {path: value_at(row, path) for path in re.findall(r"\{([^}]+)\}", columns.template)}
        if not all(isinstance(text, str) for text in texts.values()):
            return None
        return re.sub(r"\{([^}]+)\}", lambda place: str(texts[place[1]]), columns.template)
    return None if columns.prompt is None else _messages(columns, value_at(row, _path(columns.prompt, name)))


def _answers(columns: PreferenceSet, row: Mapping[str, object], name: str) -> list[ScoredAnswer] | str:
    """The answers of a judgement, or the reason why there are none."""
    if columns.chosen is not None and columns.rejected is not None:
        sides = (("chosen", columns.chosen, 1.0), ("rejected", columns.rejected, 0.0))
        pair = [ScoredAnswer(side, _answer(columns, value_at(row, path)), score) for side, path, score in sides]
        missing = next((path for _, path, _ in sides if value_at(row, path) is None), None)
        return pair if missing is None else f"no answer in `{missing}`"
    if columns.gathered:
        text, score = (value_at(row, _path(path or "", name)) for path in (columns.text, columns.score))
        return [ScoredAnswer("", _answer(columns, text), _number(score))] if text is not None else _no_text(columns)
    scores = _scores(columns, row, name)
    if isinstance(scores, str):
        return scores
    paths = {answer: columns.texts.get(answer, columns.text or "") for answer in scores}
    texts = {answer: value_at(row, _path(path, name, answer)) for answer, path in paths.items()}
    if all(text is None for text in texts.values()):
        return _no_text(columns)
    return [ScoredAnswer(answer, _answer(columns, texts[answer]), score) for answer, score in scores.items()]


def _no_text(columns: PreferenceSet) -> str:
    return f"no answer in {' or '.join(f'`{path}`' for path in (columns.texts.values() or [columns.text]))}"


def _scores(columns: PreferenceSet, row: Mapping[str, object], name: str) -> dict[str, float | None] | str:
    """The scores of the answers by name: 1 for the preferred one and 0 for others, or minus the rank."""
    if columns.ranking is not None:
        return _ranks(value_at(row, columns.ranking)) or f"no ranking in `{columns.ranking}`"
    names = columns.answers if isinstance(columns.answers, list) else _indices(value_at(row, columns.answers))
    if columns.score is not None:
        return {answer: _number(value_at(row, _path(columns.score, name, answer))) for answer in names}
    path = _path(columns.choice or "", name)
    label = value_at(row, path)
    if label is None:
        return f"no choice in `{path}`"
    if str(label) not in (columns.labels or names):
        return f"an unknown label in `{path}`"
    preferred = columns.labels.get(str(label), None if columns.labels else str(label))
    return "a tie" if preferred is None else {answer: float(answer == preferred) for answer in names}


def _indices(items: object) -> list[str]:
    return [str(number) for number in range(len(items))] if isinstance(items, list | tuple) else []


def _ranks(items: object) -> dict[str, float | None]:
    """Scores of a ranking: names from the best one on, or objects with `value` and `rank`."""
    scores: dict[str, float | None] = {}
    for place, item in enumerate(items if isinstance(items, list | tuple) else [], 1):
        ranked = item if isinstance(item, Mapping) else {"value": item, "rank": place}
        rank = _number(ranked.get("rank"))
        scores[str(ranked.get("value"))] = None if rank is None else -rank
    return scores


def _number(value: object) -> float | None:
    """A score as a number: thumbs up are 1 and thumbs down 0."""
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _continued(
    columns: PreferenceSet, row: Mapping[str, object], name: str, answers: Sequence[ScoredAnswer]
) -> ScoredAnswer | None:
    """The answer with which a conversation goes on: the marked one, or the preferred one."""
    if columns.continued is not None:
        path = columns.continued
        return next((one for one in answers if value_at(row, _path(path, name, one.name)) is True), None)
    highest = max((answer.score for answer in answers if answer.score is not None), default=None)
    best = [answer for answer in answers if answer.score == highest]
    return best[0] if len(best) == 1 and isinstance(best[0].text, str) else None


def _time(columns: PreferenceSet, row: Mapping[str, object]) -> str | None:
    value = next((value for path in columns.time if (value := value_at(row, path)) is not None), None)
    if isinstance(value, int | float):
        return datetime.fromtimestamp(value, UTC).isoformat()
    return None if value is None else str(value)


_TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")


def _answer(columns: PreferenceSet, value: object) -> Any:
    """An answer as the set gives it: cut, or a transcript as messages."""
    if not isinstance(value, str):
        return _messages(columns, value)
    if columns.transcript:
        _, *turns = _TURN.split(value)
        roles = ("user" if role == "Human" else "assistant" for role in turns[::2])
        return [{"role": role, "content": text} for role, text in zip(roles, turns[1::2], strict=True)]
    if value.strip() in columns.blank:
        return ""
    for text in columns.remove:
        value = value.replace(text, "")
    return value.strip() if columns.strip else value


def _messages(columns: PreferenceSet, value: object) -> Any:
    """Messages with our roles; another value as it is."""
    if isinstance(value, Mapping):
        return {**value, "role": columns.roles.get(str(value.get("role")), value.get("role"))}
    if isinstance(value, list | tuple):
        return [_messages(columns, item) for item in value]
    return value


def _is_empty(text: object) -> bool:
    return not (text.strip() if isinstance(text, str) else text)
