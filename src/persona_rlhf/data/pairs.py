"""The preference pair, its chat messages, and the split into train and held-out pairs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.data.columns import (
    CHECKS,
    ColumnFault,
    UserSpellings,
    columns_of,
    missing,
    moment,
    place_of,
    shown,
    text_fault,
    user_id_fault,
)
from persona_rlhf.data.layouts import Arranged, arranged, whole_conversations
from persona_rlhf.data.readers import read_rows

ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


Prompt = tuple[Message, ...]


def conversation(column: str, value: Sequence[object]) -> Prompt | list[ColumnFault]:
    """A list of `{"role", "content"}` as messages."""
    if not value:
        return [ColumnFault(column, "holds no message")]
    faults: list[ColumnFault] = []
    messages: list[Message] = []
    for index, item in enumerate(value):
        key = f"{column}[{index}]"
        if not isinstance(item, Mapping) or "role" not in item or "content" not in item:
            faults.append(ColumnFault(key, f'must be {{"role": ..., "content": ...}}, not {shown(item)}'))
            continue
        role, content = item["role"], item["content"]
        if role not in ROLES:
            faults.append(ColumnFault(f"{key}.role", f"is {shown(role)}; it must be system, user or assistant"))
        elif role == "system" and index:
            faults.append(ColumnFault(f"{key}.role", "a system message must be the first"))
        if (fault := text_fault(f"{key}.content", content)) is not None:
            faults.append(fault)
        else:
            messages.append(Message(str(role), content))
    return faults or tuple(messages)


def prompt_of(value: object, column: str = "prompt") -> Prompt | list[ColumnFault]:
    """A prompt: a text is one user message; a list of messages must end with the user's."""
    if isinstance(value, str):
        fault = text_fault(column, value)
        return [fault] if fault is not None else (Message("user", value),)
    if not isinstance(value, list | tuple):
        return [ColumnFault(column, f"must be a text or a list of messages, not {shown(value)}")]
    messages = conversation(column, value)
    if isinstance(messages, tuple) and messages[-1].role != "user":
        return [ColumnFault(column, f"must end with the user's message, not with the {messages[-1].role}'s")]
    return messages


def answer_of(column: str, value: object, prompt: Prompt) -> str | list[ColumnFault]:
    """An answer: a text, or one assistant message, optionally after a copy of the prompt."""
    if isinstance(value, str):
        fault = text_fault(column, value)
        return [fault] if fault is not None else value
    if not isinstance(value, list | tuple):
        return [ColumnFault(column, f"must be a text or one assistant message, not {shown(value)}")]
    messages = conversation(column, value)
    if isinstance(messages, list):
        return messages
    if len(messages) == len(prompt) + 1 and messages[:-1] == prompt:
        messages = messages[-1:]
    if len(messages) > 1:
        remedy = "keep the last answer here and move the turns before it to `prompt`"
        return [ColumnFault(column, f"holds {len(messages)} messages, but a preference is about one answer: {remedy}")]
    if messages[0].role != "assistant":
        return [ColumnFault(column, f"must be an assistant message, not a {messages[0].role} message")]
    return messages[0].content


def implicit_prompt(chosen: object, rejected: object, stated: object = None) -> Prompt | list[ColumnFault]:
    """TRL's implicit prompt: the common turns of two conversations that differ in the last answer only.

    `stated` is the column `prompt` of such a row, if it has one: one of the user's turns as a text, or all turns, with
    or without the system message.
    """
    if not isinstance(chosen, list | tuple) or not isinstance(rejected, list | tuple):
        return [missing("prompt", ())]
    preferred, other = conversation("chosen", chosen), conversation("rejected", rejected)
    if isinstance(preferred, list) or isinstance(other, list):
        return [fault for side in (preferred, other) if isinstance(side, list) for fault in side]
    if len(preferred) != len(other) or len(preferred) < 2 or preferred[:-1] != other[:-1]:
        remedy = "`chosen` and `rejected` must be the same conversation up to the last answer"
        if stated is None:
            return [ColumnFault("prompt", f"the column is missing; without `prompt`, {remedy}")]
        return [ColumnFault("chosen", f"{remedy}, or each of them one answer to `prompt`")]
    turns = preferred[:-1]
    if stated is not None and not _agrees(stated, turns):
        remedy = "leave `prompt` out, or correct it: both answers hold the whole conversation"
        return [ColumnFault("prompt", f"is no turn of the user in `chosen`: {shown(stated)}; {remedy}")]
    return prompt_of([message._asdict() for message in turns])


def _agrees(stated: object, turns: Prompt) -> bool:
    """Whether a prompt's text is a turn of the user, or its messages are the turns."""
    if isinstance(stated, str):
        return any(message.role == "user" and message.content.strip() == stated.strip() for message in turns)
    messages = prompt_of(stated)
    return messages in (turns, turns[1:] if turns[0].role == "system" else turns)


_KEY = b"persona-rlhf held-out prompts 1"
_DECIDING_KEY = b"persona-rlhf deciding prompts 1"
_FEW = 4  # prompts; a user with fewer may have none held out


def position(user_id: str, prompt: Prompt, key: bytes = _KEY) -> float:
    """A number in [0, 1): a hash of the key, the user and the prompt's text."""
    text = "\x1e".join((user_id, *(f"{role}\x1f{content}" for role, content in prompt)))
    digest = hashlib.blake2b(text.encode(), key=key, digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def held_out(user_id: str, prompts: Iterable[Prompt], share: float) -> set[Prompt]:
    """The held-out prompts of a user: those with a position below `share`.

    Two exceptions hold for users with few prompts. With 4 prompts or more, at least one is held out (the first by
    position); the last by position is always trained. A share of 0 holds out nothing.
    """
    if share == 0:
        return set()
    ranked = sorted((position(user_id, prompt), prompt) for prompt in set(prompts))
    count = sum(rank < share for rank, _ in ranked)
    if len(ranked) >= _FEW:
        count = max(count, 1)
    return {prompt for _, prompt in ranked[: min(count, len(ranked) - 1)]}


def deciding(user_id: str, prompts: Iterable[Prompt]) -> set[Prompt]:
    """Half of a user's held-out prompts, rounded down: they decide early stopping, so they are no evidence.

    The other half is evidence. A user with one held-out prompt has none that decides.
    """
    ranked = sorted((position(user_id, prompt, _DECIDING_KEY), prompt) for prompt in set(prompts))
    return {prompt for _, prompt in ranked[: len(ranked) // 2]}


Split = Literal["train", "heldout"]

SHOWN = 50  # problems printed at most


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One person's preference between two answers to a prompt: one object from the file to the gradient."""

    user_id: str
    prompt: Prompt
    chosen: str
    rejected: str
    id: str
    created_at: str | None  # ISO 8601
    source: str | None
    weight: float  # > 0, relative to the user's other pairs
    split: Split
    clean_choice: bool | None  # whether the label agrees with the noise-free utility; None if unknown
    file: str
    line: int
    place: tuple[int, int] | None = None  # of the chosen answer, among how many; None if unknown
    tie: bool = False  # the user holds both answers alike, so their columns have no order

    @property
    def orders(self) -> list[tuple[str, str]]:
        """The preferred and the other answer; of a tie, both orders, since it counts as half a preference each way."""
        ordered = (self.chosen, self.rejected)
        return [ordered, ordered[::-1]] if self.tie else [ordered]


class RowNotes(NamedTuple):
    """Numbers of rows: by unknown column or message field, by the other layout that was read, by role and column."""

    unknown: Counter[str]
    read_as: Counter[str]
    taken: Counter[tuple[str, str]]

    @staticmethod
    def none() -> RowNotes:
        """Notes of no row."""
        return RowNotes(Counter(), Counter(), Counter())


class ReadPairs(NamedTuple):
    """The pairs of a path, and notes on their columns."""

    pairs: list[PreferencePair]
    unknown: Counter[str]
    read_as: Counter[str]
    taken: Counter[tuple[str, str]]


def read_pairs(path: Path | str, heldout: float) -> list[PreferencePair]:
    """The pairs of a JSONL, Parquet or CSV file, a folder, or a hub data set, in file order.

    `heldout` is the share of a user's prompts held out if rows have no `split`. Raises InputError naming every
    bad row.
    """
    return read(path, heldout).pairs


def read(path: Path | str, heldout: float, users: UserSpellings | None = None) -> ReadPairs:
    """As `read_pairs`, with notes on the columns. `users` are the user ids of other paths read before."""
    if not 0 <= heldout < 1:
        raise ValueError(f"heldout is {heldout}; the share of prompts held out lies in [0, 1)")
    pairs: list[PreferencePair] = []
    problems: list[Problem] = []
    notes = RowNotes.none()
    undecided: list[int] = []  # indices in `pairs` of rows without a split
    for item in parsed_rows(path, notes, users):
        if isinstance(item, Problem):
            problems.append(item)
            continue
        pair, split = item
        if split is None:
            undecided.append(len(pairs))
        pairs.append(pair)
    if problems:
        raise InputError(first_problems(problems))
    assign_splits(pairs, undecided, heldout)
    return ReadPairs(pairs, *notes)


def parsed_rows(
    path: Path | str, notes: RowNotes | None = None, users: UserSpellings | None = None
) -> Iterator[tuple[PreferencePair, Split | None] | Problem]:
    """Every row as a pair with its split (None without one), or as a Problem.

    The split is the row's column, or what the name of its file states. Counts columns in `notes`, and compares the
    user ids with those in `users`.
    """
    users = users or UserSpellings()
    empty = True
    unclear: set[str] = set()
    for item in read_rows(path):
        empty = False
        if isinstance(item, Problem):
            yield item
            continue
        parsed = parse_row(item.row, item.file, item.line, notes)
        if isinstance(parsed, list):
            yield from parsed
            continue
        if (problem := users.problem(parsed.user_id, item.file, item.line)) is not None:
            yield problem
            continue
        assert isinstance(item.row, Mapping)
        if item.row.get("split") is not None:
            yield parsed, parsed.split
        elif item.part != "unclear":
            yield (replace(parsed, split=item.part) if item.part else parsed), item.part
        elif item.file not in unclear:
            unclear.add(item.file)
            yield Problem(item.file, item.line, "split", _UNCLEAR)
    if empty:
        yield Problem(str(path), None, None, "there are no rows in it; write one preference per row")


_UNCLEAR = (
    "the file's name says that its rows are held out, and no other file is named train; write `split` in the rows, or "
    "give the file another name"
)


def parse_row(row: object, file: str, line: int, notes: RowNotes | None = None) -> PreferencePair | list[Problem]:
    """One row as a pair, or all its problems. A row without `split` gets `train` until splits are assigned."""
    try:
        layout = arranged(columns_of(row))
    except ValueError as fault:
        return [Problem(file, line, None, str(fault))]
    if notes is not None:
        notes.unknown.update(layout.ignored)
        notes.read_as.update(layout.read_as)
        notes.taken.update(layout.taken.items())
    columns = layout.columns
    texts = _texts(layout)
    faults = [*_user_faults(columns), *layout.faults]
    faults += [*(texts if isinstance(texts, list) else ()), *_optional_faults(columns)]
    if faults or isinstance(texts, list):
        return [Problem(file, line, fault.key, fault.sentence) for fault in faults]
    user_id = columns["user_id"]
    return PreferencePair(
        user_id=user_id,
        prompt=texts.prompt,
        chosen=texts.chosen,
        rejected=texts.rejected,
        id=str(columns["id"]) if "id" in columns else content_id(user_id, *texts),
        created_at=moment(columns["created_at"]) if "created_at" in columns else None,
        source=columns.get("source"),
        weight=float(columns.get("weight", 1.0)),
        split=columns.get("split", "train"),
        clean_choice=columns.get("clean_choice"),
        file=file,
        line=line,
        place=place_of(columns["place"]) if "place" in columns else None,
        tie=columns.get("tie", False),
    )


class _Texts(NamedTuple):
    prompt: Prompt
    chosen: str
    rejected: str


def _texts(layout: Arranged) -> _Texts | list[ColumnFault]:
    """The prompt and the two answers; a fault in one does not hide those in the others."""
    columns = layout.columns
    if whole_conversations(columns) or ("prompt" not in columns and isinstance(columns.get("chosen"), list | tuple)):
        prompt = implicit_prompt(columns["chosen"], columns.get("rejected"), columns.get("prompt"))
        if isinstance(prompt, list):
            return prompt
    elif "prompt" in columns:
        prompt = prompt_of(columns["prompt"], layout.prompt_column)
    else:
        prompt = [missing("prompt", columns)]
    turns = prompt if isinstance(prompt, tuple) else ()
    chosen, rejected = (
        answer_of(column, columns[column], turns) if column in columns else [missing(column, columns)]
        for column in ("chosen", "rejected")
    )
    if isinstance(prompt, tuple) and isinstance(chosen, str) and isinstance(rejected, str):
        return _Texts(prompt, chosen, rejected)
    return [fault for part in (prompt, chosen, rejected) if isinstance(part, list) for fault in part]


def _user_faults(columns: Mapping[str, Any]) -> list[ColumnFault]:
    if "user_id" not in columns:
        return [missing("user_id", columns)]
    fault = user_id_fault(columns["user_id"])
    return [] if fault is None else [fault]


def _optional_faults(columns: Mapping[str, Any]) -> list[ColumnFault]:
    faults = (check(columns[column]) for column, check in CHECKS.items() if column in columns)
    return [fault for fault in faults if fault is not None]


def content_id(user_id: str, prompt: Prompt, chosen: str, rejected: str) -> str:
    """The id of a pair without one: 16 hex digits of the hash of its user and texts."""
    content = json.dumps([user_id, prompt, chosen, rejected])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def assign_splits(pairs: list[PreferencePair], undecided: list[int], share: float) -> None:
    """Assigns, in place, the split of rows without one: that of the prompt's other rows, or by hash.

    Ties have no order to predict, so a prompt that has nothing but ties is trained on.
    """
    unassigned = set(undecided)
    decided = {(pair.user_id, pair.prompt): pair.split for i, pair in enumerate(pairs) if i not in unassigned}
    prompts: dict[str, list[Prompt]] = {}
    for index in undecided:
        pair = pairs[index]
        if (pair.user_id, pair.prompt) not in decided and not pair.tie:
            prompts.setdefault(pair.user_id, []).append(pair.prompt)
    held = {user_id: held_out(user_id, user_prompts, share) for user_id, user_prompts in prompts.items()}
    for index in undecided:
        pair = pairs[index]
        hashed: Split = "heldout" if pair.prompt in held.get(pair.user_id, ()) else "train"
        pairs[index] = replace(pair, split=decided.get((pair.user_id, pair.prompt), hashed))


def first_problems(problems: list[Problem], count: int | None = None) -> list[Problem]:
    """The first SHOWN problems, and one that counts the rest; `count` is their total if the list is shorter."""
    if len(problems) <= SHOWN:
        return problems
    rest = (count or len(problems)) - SHOWN
    return [*problems[:SHOWN], Problem(problems[SHOWN].file, None, None, f"and {rest:,} more problems after these")]
