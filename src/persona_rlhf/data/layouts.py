"""Row layouts of other trainers (TRL, Axolotl, LLaMA-Factory, ShareGPT, OpenAI), arranged as ours.

Sources: the data formats that their documentation describes for preference pairs. A layout is recognised by its column
names alone. Content that a pair cannot hold, such as tool calls or images, is a fault and never left out in silence.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from persona_rlhf.data.columns import KNOWN, ColumnFault, shown, text_fault

_ANSWERS = {"chosen": ("chosen_response",), "rejected": ("rejected_response",)}  # Argilla's names
_PROMPTS = ("messages", "conversations", "instruction", "question", "input")
UNREADABLE = {  # columns that change the texts of a row, with the remedy
    "tools": "definitions of tools cannot be trained on; remove the row, or the column if no text depends on it",
    "images": "only texts can be trained on; remove the row",
    "image": "only texts can be trained on; remove the row",
    "videos": "only texts can be trained on; remove the row",
    "audios": "only texts can be trained on; remove the row",
    "chat_template_kwargs": "the arguments of the chat template are fixed; remove the column",
}
_LOST_FIELDS = frozenset(  # of a message: they are part of what it says
    {"tool_calls", "function_call", "tool_call_id", "reasoning_content", "reasoning", "thinking", "images", "audio"}
)
_ROLE_COLUMNS = {
    "user": "user_id",
    "prompt": "prompt",
    "chosen": "chosen",
    "rejected": "rejected",
    "time": "created_at",
    "id": "id",
    "source": "source",
    "weight": "weight",
    "split": "split",
    "clean label": "clean_choice",
    "place": "place",
    "tie": "tie",
}
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}  # ShareGPT's names


class Arranged(NamedTuple):
    """A row with the columns `prompt`, `chosen` and `rejected`, and notes on how it was read.

    `ignored` are columns and message fields that nothing reads. `read_as` tells which other layout was read. `taken` is
    the column of each role: user, prompt, chosen and rejected, and time, id, source, weight, split, clean label, place
    and tie.
    """

    columns: dict[str, Any]
    prompt_column: str  # the user's name of it, for messages
    ignored: list[str]
    read_as: list[str]
    taken: dict[str, str]
    faults: list[ColumnFault]


def arranged(row: Mapping[str, Any]) -> Arranged:
    """A row of any layout as ours. An absent value and an empty list of tools or images are the same as no column."""
    columns = {name: value for name, value in row.items() if value is not None}
    used, read_as, faults = {*KNOWN, "system", "history"}, list[str](), list[ColumnFault]()
    for ours, names in _ANSWERS.items():
        for name in names:
            if ours not in columns and name in columns:
                columns[ours] = columns[name]
                used.add(name)
                read_as.append(f"`{name}` as `{ours}`")
    for column, remedy in UNREADABLE.items():
        if columns.get(column) not in (None, "", [], {}, "[]"):
            faults.append(ColumnFault(column, f"holds {shown(columns[column])}; {remedy}"))
        used.add(column)
    for column in ("prompt", "chosen", "rejected", *_PROMPTS):
        if column in columns:
            columns[column] = _one_as_list(columns[column])
    _read_texts(columns, read_as, faults)
    source = _prompt_source(columns, faults)
    if source not in (None, "prompt"):
        columns["prompt"] = columns[source]
        used.add(source)
        with_input = source == "instruction" and isinstance(columns["prompt"], str) and "input" in columns
        if with_input and isinstance(columns["input"], str):
            columns["prompt"] = "\n".join(filter(None, (columns["prompt"], columns["input"])))
            used.add("input")
        read_as.append(f"`{source}`{' and `input`' if with_input else ''} as the prompt")
    ignored = [name for name in row if name not in used]
    taken = {role: name for role, name in _ROLE_COLUMNS.items() if name in columns}
    taken |= {ours: name for ours, names in _ANSWERS.items() for name in names if row.get(ours) is None and name in row}
    if source is not None:
        taken["prompt"] = source
    elif "prompt" not in columns and whole_conversations(columns):
        taken["prompt"] = "chosen and rejected, up to the last answer"
    for column in ("prompt", "chosen", "rejected"):
        if isinstance(columns.get(column), list | tuple):
            shown_name = (source or "prompt") if column == "prompt" else column
            columns[column] = _messages(shown_name, columns[column], ignored, read_as, faults)
    for column in ("history", "system"):
        if columns.get(column) not in (None, "", []):
            read_as.append(f"`{column}` as turns before the prompt")
            _put_before(column, columns, faults)
    return Arranged(columns, source or "prompt", ignored, list(dict.fromkeys(read_as)), taken, faults)


def _prompt_source(columns: Mapping[str, Any], faults: list[ColumnFault]) -> str | None:
    """The column of the prompt; None where the answers are whole conversations, or where there is none."""
    if "prompt" in columns:
        return "prompt"
    if whole_conversations(columns):
        return None
    present = [name for name in _PROMPTS if name in columns]
    if present == ["instruction", "input"]:
        return "instruction"
    if len(present) > 1:
        names = " and ".join(f"`{name}`" for name in present)
        faults.append(ColumnFault("prompt", f"{names} could be the prompt; rename the one that is to `prompt`"))
    return present[0] if present else None


def whole_conversations(columns: Mapping[str, Any]) -> bool:
    """Whether both answers are lists of several messages."""
    return all(isinstance(columns.get(answer), list | tuple) and len(columns[answer]) > 1 for answer in _ANSWERS)


def _one_as_list(value: Any) -> Any:
    """A single message as a list of it."""
    is_message = isinstance(value, Mapping) and (
        {"role", "content"} <= value.keys() or {"from", "value"} <= value.keys()
    )
    return [value] if is_message else value


_BEGINS_AS_MESSAGES = re.compile(r"""\s*(?:array\()?\[?\s*\{\s*['"](?:role|content|from|value)['"]\s*:""")
_BROKEN = object()


def _read_texts(columns: dict[str, Any], read_as: list[str], faults: list[ColumnFault]) -> None:
    """Replaces texts that write out lists of messages (JSON, or Python as pandas writes it) by the lists.

    A prompt counts on its own; the two answers count if both are such texts.
    """
    prompts = ("prompt",) if "prompt" in columns else _PROMPTS
    read = {name: _written_out(columns.get(name)) for name in (*prompts, *_ANSWERS)}
    answers = [read[name] for name in _ANSWERS]
    for name, value in read.items():
        if value is None or (name in _ANSWERS and None in answers and all(v in (None, _BROKEN) for v in answers)):
            continue
        if value is _BROKEN:
            sentence = "begins as the text of a list of messages and cannot be read as one; save the data as JSON lines"
            faults.append(ColumnFault(name, sentence))
        elif name in _ANSWERS and None in answers:
            sentence = "is the text of a list of messages, and the other answer is none; write both in the same way"
            faults.append(ColumnFault(name, sentence))
        else:
            columns[name] = value
            read_as.append(f"`{name}`, the text of a list, as messages")


def _written_out(value: Any) -> Any:
    """The messages that a text writes out; None for another value, `_BROKEN` for a beginning without an end."""
    if not isinstance(value, str) or not _BEGINS_AS_MESSAGES.match(value):
        return None
    try:
        content = json.loads(value)
    except (ValueError, RecursionError):
        try:
            with warnings.catch_warnings(action="ignore"):
                content = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return _BROKEN
    messages = _one_as_list(content)
    whole = isinstance(messages, list) and messages and all(_one_as_list(item) != item for item in messages)
    return messages if whole else None


def _messages(column: str, items: Any, ignored: list[str], read_as: list[str], faults: list[ColumnFault]) -> list[Any]:
    """Messages with `role` and `content` alone. A fault for each field that says more."""
    messages: list[Any] = []
    for index, item in enumerate(items):
        if not isinstance(item, Mapping) or _one_as_list(item) is item:
            messages.append(item)
            continue
        sharegpt = "role" not in item
        role, content = (item["from"], item["value"]) if sharegpt else (item["role"], item["content"])
        if sharegpt:
            role = _ROLES.get(role, role) if isinstance(role, str) else role
            read_as.append("`from` and `value` as `role` and `content`")
        for field in sorted(_lost(item)):
            sentence = f"{shown(item[field])} would be left out of the text; write it into `content`, or remove the row"
            faults.append(ColumnFault(f"{column}[{index}].{field}", sentence))
        written = {"from", "value"} if sharegpt else {"role", "content"}
        ignored += [f"{column}[].{name}" for name, value in item.items() if value is not None and name not in written]
        messages.append({"role": role, "content": _one_text(content)})
    return messages


def _lost(message: Mapping[str, Any]) -> list[str]:
    return [name for name in _LOST_FIELDS & message.keys() if message[name] not in (None, "", [], {})]


def _one_text(content: Any) -> Any:
    """The text of OpenAI's `[{"type": "text", "text": ...}]`; other content stays as it is and becomes a fault."""
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], Mapping):
        part = {name: value for name, value in content[0].items() if value is not None}
        if part.keys() == {"type", "text"} and part["type"] == "text":
            return part["text"]
    return content


def _put_before(column: str, columns: dict[str, Any], faults: list[ColumnFault]) -> None:
    """Puts LLaMA-Factory's `history` (pairs of question and answer) or a `system` text before the prompt."""
    value = columns[column]
    if column == "system":
        if (fault := text_fault(column, value)) is not None:
            faults.append(fault)
            return
        turns = [{"role": "system", "content": value}]
    elif isinstance(value, list | tuple) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
        roles = ("user", "assistant")
        turns = [{"role": role, "content": text} for pair in value for role, text in zip(roles, pair, strict=True)]
    else:
        faults.append(ColumnFault(column, f"must be a list of [question, answer], not {shown(value)}"))
        return
    for name in _ANSWERS if whole_conversations(columns) else ("prompt",):
        messages = columns.get(name)
        if isinstance(messages, str):
            columns[name] = [*turns, {"role": "user", "content": messages}]
        elif isinstance(messages, list) and not (column == "system" and _begins_with_system(messages)):
            columns[name] = [*turns, *messages]
        elif isinstance(messages, list) and messages[:1] != turns:
            faults.append(ColumnFault(column, f"differs from the system message of `{name}`; keep one of both"))


def _begins_with_system(messages: list[Any]) -> bool:
    return bool(messages) and isinstance(messages[0], Mapping) and messages[0].get("role") == "system"
