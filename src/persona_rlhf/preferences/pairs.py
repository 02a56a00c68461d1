"""The preference pair: one object from the file to the gradient."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.preferences import columns
from persona_rlhf.preferences.columns import Fault
from persona_rlhf.preferences.formats import RawRow, read_rows
from persona_rlhf.preferences.heldout import held_out
from persona_rlhf.preferences.identity import slug
from persona_rlhf.preferences.messages import Message, Prompt, answer_of, implicit_prompt, prompt_of

__all__ = [
    "Message",
    "PreferencePair",
    "Prompt",
    "Reading",
    "SHOWN",
    "Split",
    "assign_splits",
    "first_problems",
    "parse_row",
    "parsed_rows",
    "read",
    "read_pairs",
    "slug",
]

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


class Reading(NamedTuple):
    """What a path held: its pairs, and the columns that nobody reads with the number of rows that have them."""

    pairs: list[PreferencePair]
    unknown: Counter[str]


def read_pairs(path: Path | str, heldout: float) -> list[PreferencePair]:
    """The pairs of a JSONL, Parquet or CSV file, a folder, or a hub data set, in file order.

    `heldout` is the share of a user's prompts held out where rows carry no `split`. Raises InputError naming every
    bad row.
    """
    return read(path, heldout).pairs


def read(path: Path | str, heldout: float) -> Reading:
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
    return Reading(pairs, unknown)


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
            unknown.update(name for name in item.row if name not in columns.KNOWN)
        yield parsed, None if item.row.get("split") is None else parsed.split
    if empty:
        yield Problem(str(path), None, None, "there are no rows in it; write one preference per row")


def parse_row(row: object, file: str, line: int) -> PreferencePair | list[Problem]:
    """One row as a pair, or everything that is wrong with it. A row without `split` is given `train` for the moment."""
    try:
        given: dict[str, Any] = {name: value for name, value in columns.columns_of(row).items() if value is not None}
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
        created_at=columns.moment(given["created_at"]) if "created_at" in given else None,
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


def _texts(given: Mapping[str, Any]) -> _Texts | list[Fault]:
    """The prompt and the two answers; a fault in one does not hide those in the others."""
    if "prompt" not in given and isinstance(given.get("chosen"), list | tuple) and "rejected" in given:
        prompt = implicit_prompt(given["chosen"], given["rejected"])
        if isinstance(prompt, list):
            return prompt
    elif "prompt" in given:
        prompt = prompt_of(given["prompt"])
    else:
        prompt = [columns.missing("prompt", given)]
    known = prompt if isinstance(prompt, tuple) else ()
    chosen, rejected = (
        answer_of(column, given[column], known) if column in given else [columns.missing(column, given)]
        for column in ("chosen", "rejected")
    )
    if isinstance(prompt, tuple) and isinstance(chosen, str) and isinstance(rejected, str):
        return _Texts(prompt, chosen, rejected)
    return [fault for part in (prompt, chosen, rejected) if isinstance(part, list) for fault in part]


def _user_faults(given: Mapping[str, Any]) -> list[Fault]:
    if "user_id" not in given:
        return [columns.missing("user_id", given)]
    fault = columns.user_id_fault(given["user_id"])
    return [] if fault is None else [fault]


def _optional_faults(given: Mapping[str, Any]) -> list[Fault]:
    found = (check(given[column]) for column, check in columns.CHECKS.items() if column in given)
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
