"""PreferencePair, chat messages, held-out split."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.data import readers
from persona_rlhf.data.readers import ColumnFault, RawRow, missing, read_rows, shown, text_fault

# ----------------------------------------------------------------------------------------------------
# Prompts and answers as chat messages, however the row wrote them.
# ----------------------------------------------------------------------------------------------------

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
        place = f"{column}[{index}]"
        if not isinstance(item, Mapping) or "role" not in item or "content" not in item:
            faults.append(ColumnFault(place, f'must be {{"role": ..., "content": ...}}, not {shown(item)}'))
            continue
        role, content = item["role"], item["content"]
        if role not in ROLES:
            faults.append(ColumnFault(f"{place}.role", f"is {shown(role)}; it must be system, user or assistant"))
        elif role == "system" and index:
            faults.append(ColumnFault(f"{place}.role", "a system message stands first or not at all"))
        if (fault := text_fault(f"{place}.content", content)) is not None:
            faults.append(fault)
        else:
            messages.append(Message(str(role), content))
    return faults or tuple(messages)


def prompt_of(value: object) -> Prompt | list[ColumnFault]:
    """A prompt: a text is one user message; a list of messages must end with the user's."""
    if isinstance(value, str):
        fault = text_fault("prompt", value)
        return [fault] if fault is not None else (Message("user", value),)
    if not isinstance(value, list | tuple):
        return [ColumnFault("prompt", f"must be a text or a list of messages, not {shown(value)}")]
    messages = conversation("prompt", value)
    if isinstance(messages, tuple) and messages[-1].role != "user":
        return [ColumnFault("prompt", f"must end with the user's message, not with the {messages[-1].role}'s")]
    return messages


def answer_of(column: str, value: object, prompt: Prompt) -> str | list[ColumnFault]:
    """An answer: a text, or one assistant message, with the prompt repeated before it or not."""
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


def implicit_prompt(chosen: object, rejected: object) -> Prompt | list[ColumnFault]:
    """TRL's implicit prompt: two whole conversations that differ in the last answer only."""
    if not isinstance(chosen, list | tuple) or not isinstance(rejected, list | tuple):
        return [missing("prompt", ())]
    ours, theirs = conversation("chosen", chosen), conversation("rejected", rejected)
    if isinstance(ours, list) or isinstance(theirs, list):
        return [fault for side in (ours, theirs) if isinstance(side, list) for fault in side]
    if len(ours) != len(theirs) or len(ours) < 2 or ours[:-1] != theirs[:-1]:
        remedy = "without `prompt`, `chosen` and `rejected` must be the same conversation up to the last answer"
        return [ColumnFault("prompt", f"the column is missing; {remedy}")]
    return prompt_of([message._asdict() for message in ours[:-1]])


# ----------------------------------------------------------------------------------------------------
# Which pairs of a user are held out: by prompt, by a keyed hash, never by chance or by row order.
# ----------------------------------------------------------------------------------------------------

_KEY = b"persona-rlhf held-out prompts 1"
_DECIDING_KEY = b"persona-rlhf deciding prompts 1"
_FEW = 4  # prompts; a user with fewer is not forced to give one up


def position(user_id: str, prompt: Prompt, key: bytes = _KEY) -> float:
    """A number in [0, 1) that depends on nothing but the key, the user and the prompt's text."""
    text = "\x1e".join((user_id, *(f"{role}\x1f{content}" for role, content in prompt)))
    digest = hashlib.blake2b(text.encode(), key=key, digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def held_out(user_id: str, prompts: Iterable[Prompt], share: float) -> set[Prompt]:
    """The user's prompts that are held out: those whose position is below `share`.

    Two exceptions keep a small user useful: somebody with 4 prompts or more has at least one held out (the first by
    position), and nobody has all of them held out (the last by position is trained). A share of 0 holds out nothing.
    """
    if share == 0:
        return set()
    ranked = sorted((position(user_id, prompt), prompt) for prompt in set(prompts))
    count = sum(place < share for place, _ in ranked)
    if len(ranked) >= _FEW:
        count = max(count, 1)
    return {prompt for _, prompt in ranked[: min(count, len(ranked) - 1)]}


def deciding(user_id: str, prompts: Iterable[Prompt]) -> set[Prompt]:
    """Half of a user's held-out prompts, rounded down: they may decide when his training stops, and so are no evidence.

    The other half is. A user with one held-out prompt has none that decides.
    """
    ranked = sorted((position(user_id, prompt, _DECIDING_KEY), prompt) for prompt in set(prompts))
    return {prompt for _, prompt in ranked[: len(ranked) // 2]}


# ----------------------------------------------------------------------------------------------------
# The preference pair: one object from the file to the gradient.
# ----------------------------------------------------------------------------------------------------

Split = Literal["train", "heldout"]

SHOWN = 50  # problems printed; a file of a million bad rows is told in a screenful


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One judgement of one person: of two answers to a prompt, which one they would rather have had."""

    user_id: str
    prompt: Prompt
    chosen: str
    rejected: str
    id: str
    created_at: str | None  # ISO 8601
    source: str | None
    weight: float  # > 0, relative to the user's other pairs
    split: Split
    clean_choice: bool | None  # does the label agree with the noise-free utility, where that is known
    file: str
    line: int


class ReadPairs(NamedTuple):
    """What a path held: its pairs, and the columns that nobody reads with the number of rows that have them."""

    pairs: list[PreferencePair]
    unknown: Counter[str]


def read_pairs(path: Path | str, heldout: float) -> list[PreferencePair]:
    """The pairs of a JSONL, Parquet or CSV file, a folder, or a hub data set, in file order.

    `heldout` is the share of a user's prompts held out where rows carry no `split`. Raises InputError naming every
    bad row.
    """
    return read(path, heldout).pairs


def read(path: Path | str, heldout: float) -> ReadPairs:
    """As `read_pairs`, with what else was in the files."""
    if not 0 <= heldout < 1:
        raise ValueError(f"heldout is {heldout}; the share of prompts held out lies in [0, 1)")
    pairs: list[PreferencePair] = []
    problems: list[Problem] = []
    unknown: Counter[str] = Counter()
    undecided: list[int] = []  # places in `pairs` of rows without a split
    for item in parsed_rows(path, unknown):
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
    return ReadPairs(pairs, unknown)


def parsed_rows(
    path: Path | str, unknown: Counter[str] | None = None
) -> Iterator[tuple[PreferencePair, Split | None] | Problem]:
    """Every row as a pair with the split that it gives itself (None where that is to be decided), or what is wrong.

    Counts in `unknown` the columns that nobody reads.
    """
    empty = True
    for item in read_rows(path):
        empty = False
        parsed = [item] if isinstance(item, Problem) else parse_row(item.row, item.file, item.line)
        if isinstance(parsed, list):
            yield from parsed
            continue
        assert isinstance(item, RawRow)
        assert isinstance(item.row, Mapping)
        if unknown is not None:
            unknown.update(name for name in item.row if name not in readers.KNOWN)
        yield parsed, None if item.row.get("split") is None else parsed.split
    if empty:
        yield Problem(str(path), None, None, "there are no rows in it; write one preference per row")


def parse_row(row: object, file: str, line: int) -> PreferencePair | list[Problem]:
    """One row as a pair, or everything that is wrong with it. A row without `split` is given `train` for the moment."""
    try:
        given: dict[str, Any] = {name: value for name, value in readers.columns_of(row).items() if value is not None}
    except ValueError as fault:
        return [Problem(file, line, None, str(fault))]
    texts = _texts(given)
    faults = [*_user_faults(given), *(texts if isinstance(texts, list) else ()), *_optional_faults(given)]
    if faults or isinstance(texts, list):
        return [Problem(file, line, fault.key, fault.sentence) for fault in faults]
    user_id = given["user_id"]
    return PreferencePair(
        user_id=user_id,
        prompt=texts.prompt,
        chosen=texts.chosen,
        rejected=texts.rejected,
        id=str(given["id"]) if "id" in given else content_id(user_id, *texts),
        created_at=readers.moment(given["created_at"]) if "created_at" in given else None,
        source=given.get("source"),
        weight=float(given.get("weight", 1.0)),
        split=given.get("split", "train"),
        clean_choice=given.get("clean_choice"),
        file=file,
        line=line,
    )


class _Texts(NamedTuple):
    prompt: Prompt
    chosen: str
    rejected: str


def _texts(given: Mapping[str, Any]) -> _Texts | list[ColumnFault]:
    """The prompt and the two answers; a fault in one does not hide those in the others."""
    if "prompt" not in given and isinstance(given.get("chosen"), list | tuple) and "rejected" in given:
        prompt = implicit_prompt(given["chosen"], given["rejected"])
        if isinstance(prompt, list):
            return prompt
    elif "prompt" in given:
        prompt = prompt_of(given["prompt"])
    else:
        prompt = [readers.missing("prompt", given)]
    known = prompt if isinstance(prompt, tuple) else ()
    chosen, rejected = (
        answer_of(column, given[column], known) if column in given else [readers.missing(column, given)]
        for column in ("chosen", "rejected")
    )
    if isinstance(prompt, tuple) and isinstance(chosen, str) and isinstance(rejected, str):
        return _Texts(prompt, chosen, rejected)
    return [fault for part in (prompt, chosen, rejected) if isinstance(part, list) for fault in part]


def _user_faults(given: Mapping[str, Any]) -> list[ColumnFault]:
    if "user_id" not in given:
        return [readers.missing("user_id", given)]
    fault = readers.user_id_fault(given["user_id"])
    return [] if fault is None else [fault]


def _optional_faults(given: Mapping[str, Any]) -> list[ColumnFault]:
    found = (check(given[column]) for column, check in readers.CHECKS.items() if column in given)
    return [fault for fault in found if fault is not None]


def content_id(user_id: str, prompt: Prompt, chosen: str, rejected: str) -> str:
    """The name of a pair that was given none: 16 hex digits of a hash of what it says."""
    content = json.dumps([user_id, prompt, chosen, rejected])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def assign_splits(pairs: list[PreferencePair], undecided: list[int], share: float) -> None:
    """Decides, in place, the split of the rows that have none: as the prompt's other rows, or by hash."""
    open_places = set(undecided)
    decided = {(pair.user_id, pair.prompt): pair.split for i, pair in enumerate(pairs) if i not in open_places}
    prompts: dict[str, list[Prompt]] = {}
    for place in undecided:
        pair = pairs[place]
        if (pair.user_id, pair.prompt) not in decided:
            prompts.setdefault(pair.user_id, []).append(pair.prompt)
    held = {user_id: held_out(user_id, mine, share) for user_id, mine in prompts.items()}
    for place in undecided:
        pair = pairs[place]
        hashed: Split = "heldout" if pair.prompt in held.get(pair.user_id, ()) else "train"
        pairs[place] = replace(pair, split=decided.get((pair.user_id, pair.prompt), hashed))


def first_problems(problems: list[Problem], count: int | None = None) -> list[Problem]:
    """What fits a screen of them, and a sentence that counts the rest; `count` where the list does not hold all."""
    if len(problems) <= SHOWN:
        return problems
    rest = (count or len(problems)) - SHOWN
    return [*problems[:SHOWN], Problem(problems[SHOWN].file, None, None, f"and {rest:,} more problems after these")]
