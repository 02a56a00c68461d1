"""Prompts and answers as chat messages, however the row wrote them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from persona_rlhf.preferences.columns import Fault, missing, shown, text_fault

ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


Prompt = tuple[Message, ...]


def conversation(column: str, value: Sequence[object]) -> Prompt | list[Fault]:
    """A list of `{"role", "content"}` as messages."""
    if not value:
        return [Fault(column, "holds no message")]
    faults: list[Fault] = []
    messages: list[Message] = []
    for index, item in enumerate(value):
        place = f"{column}[{index}]"
        if not isinstance(item, Mapping) or "role" not in item or "content" not in item:
            faults.append(Fault(place, f'must be {{"role": ..., "content": ...}}, not {shown(item)}'))
            continue
        role, content = item["role"], item["content"]
        if role not in ROLES:
            faults.append(Fault(f"{place}.role", f"is {shown(role)}; it must be system, user or assistant"))
        elif role == "system" and index:
            faults.append(Fault(f"{place}.role", "a system message stands first or not at all"))
        if (fault := text_fault(f"{place}.content", content)) is not None:
            faults.append(fault)
        else:
            messages.append(Message(str(role), content))
    return faults or tuple(messages)


def prompt_of(value: object) -> Prompt | list[Fault]:
    """A prompt: a text is one user message; a list of messages must end with the user's."""
    if isinstance(value, str):
        fault = text_fault("prompt", value)
        return [fault] if fault is not None else (Message("user", value),)
    if not isinstance(value, list | tuple):
        return [Fault("prompt", f"must be a text or a list of messages, not {shown(value)}")]
    messages = conversation("prompt", value)
    if isinstance(messages, tuple) and messages[-1].role != "user":
        return [Fault("prompt", f"must end with the user's message, not with the {messages[-1].role}'s")]
    return messages


def answer_of(column: str, value: object, prompt: Prompt) -> str | list[Fault]:
    """An answer: a text, or one assistant message, with the prompt repeated before it or not."""
    if isinstance(value, str):
        fault = text_fault(column, value)
        return [fault] if fault is not None else value
    if not isinstance(value, list | tuple):
        return [Fault(column, f"must be a text or one assistant message, not {shown(value)}")]
    messages = conversation(column, value)
    if isinstance(messages, list):
        return messages
    if len(messages) == len(prompt) + 1 and messages[:-1] == prompt:
        messages = messages[-1:]
    if len(messages) > 1:
        remedy = "keep the last answer here and move the turns before it to `prompt`"
        return [Fault(column, f"holds {len(messages)} messages, but a preference is about one answer: {remedy}")]
    if messages[0].role != "assistant":
        return [Fault(column, f"must be an assistant message, not a {messages[0].role} message")]
    return messages[0].content


def implicit_prompt(chosen: object, rejected: object) -> Prompt | list[Fault]:
    """TRL's implicit prompt: two whole conversations that differ in the last answer only."""
    if not isinstance(chosen, list | tuple) or not isinstance(rejected, list | tuple):
        return [missing("prompt", ())]
    ours, theirs = conversation("chosen", chosen), conversation("rejected", rejected)
    if isinstance(ours, list) or isinstance(theirs, list):
        return [fault for side in (ours, theirs) if isinstance(side, list) for fault in side]
    if len(ours) != len(theirs) or len(ours) < 2 or ours[:-1] != theirs[:-1]:
        remedy = "without `prompt`, `chosen` and `rejected` must be the same conversation up to the last answer"
        return [Fault("prompt", f"the column is missing; {remedy}")]
    return prompt_of([message._asdict() for message in ours[:-1]])
