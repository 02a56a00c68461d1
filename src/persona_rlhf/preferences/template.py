"""A base's chat template: how a conversation becomes text and tokens, and which token ends an answer in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.preferences.messages import Message, Prompt

_ASKED = {"enable_thinking": False, "date_string": "26 Jul 2024"}
"""What some templates ask for: no chain of thought before an answer that has none, and no date that would change the
tokens overnight (the day is the default of the templates that write one)."""

_CLOCK = """
{%- macro strftime_now(form) -%}
    {{- form | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July') | replace('%Y', '2024') -}}
{%- endmacro -%}
"""
"""Stands still on that day, before a template that would ask the clock."""


@runtime_checkable  # for beartype in the tests
class ChatTokenizer(Protocol):
    """What we need of a tokenizer; every tokenizer of `transformers` has it."""

    @property
    def name_or_path(self) -> str: ...

    @property
    def chat_template(self) -> Any: ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...

    @property
    def all_special_tokens(self) -> list[str]: ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **settings: Any) -> Any: ...

    def __call__(self, text: list[str], **settings: Any) -> Any: ...

    def decode(self, token_ids: list[int], **settings: Any) -> Any: ...


def need_template(tokenizer: ChatTokenizer) -> None:
    """Raises InputError where the base has no chat template."""
    if not tokenizer.chat_template:
        remedy = "take an instruction-tuned base, or put a chat_template.jinja beside its tokenizer"
        raise InputError([template_problem(tokenizer, f"the base has no chat template; {remedy}")])


def template_problem(tokenizer: ChatTokenizer, sentence: str) -> Problem:
    """What is wrong with the base's template."""
    return Problem(tokenizer.name_or_path or "the base's tokenizer", None, "chat_template", sentence)


def render(messages: Sequence[Message], tokenizer: ChatTokenizer, answer: str | None = None) -> str:
    """A conversation as text: open for the model's answer, or with one.

    Raises jinja2.TemplateError where the template does not take it.
    """
    turns = [{"role": message.role, "content": message.content} for message in messages]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    settings: dict[str, Any] = {**_ASKED, "tokenize": False, "add_generation_prompt": answer is None}
    template = tokenizer.chat_template
    if isinstance(template, str) and "strftime_now" in template:
        settings["chat_template"] = _CLOCK + template
    text = tokenizer.apply_chat_template(turns, **settings)
    assert isinstance(text, str)
    return text


def encode(texts: list[str], tokenizer: ChatTokenizer) -> list[list[int]]:
    """Token ids of rendered texts: nothing is added, since the template has written the start of text itself."""
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def closing(prompt: Prompt, tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """What the template writes after an answer, from the token that ends the turn on (Qwen: `<|im_end|>`, a new line).

    Only that first token is the model's to write; what follows is the template's.
    """
    answer = "Yes"
    text = render(prompt, tokenizer, answer)
    tail = text[text.rindex(answer) + len(answer) :] if answer in text else ""
    end = control_tokens(tokenizer).search(tail)
    if end is None:
        sentence = "the template ends an answer with no special token, so that no answer would ever end; add one"
        raise InputError([template_problem(tokenizer, sentence)])
    return tuple(encode([tail[end.start() :]], tokenizer)[0])


def turn_end(tokenizer: ChatTokenizer) -> int:
    """The token that ends an answer: the template's, which need not be the tokenizer's end of text.

    Raises InputError where the base has no usable chat template.
    """
    import jinja2

    need_template(tokenizer)
    try:
        return closing((Message("user", "Hello"),), tokenizer)[0]
    except jinja2.TemplateError as fault:
        sentence = f"the template does not take a single question ({fault}); mend the template"
        raise InputError([template_problem(tokenizer, sentence)]) from fault


def control_tokens(tokenizer: ChatTokenizer) -> re.Pattern[str]:
    """Matches what a text must not write out: the tokens with which the template opens and ends turns."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special.update(tokenizer.all_special_tokens)
    longest_first = sorted((token for token in special if token), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches
