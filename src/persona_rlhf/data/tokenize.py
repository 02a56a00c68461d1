"""Chat template -> prompt/completion token rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.data.pairs import Message, PreferencePair, Prompt, deciding

# ----------------------------------------------------------------------------------------------------
# A base's chat template: how a conversation becomes text and tokens, and which token ends an answer in it.
# ----------------------------------------------------------------------------------------------------

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


# ----------------------------------------------------------------------------------------------------
# Pairs as token rows: what the model reads (the prompt) and what it is judged on (the completion).
#
# A row is always the prompt exactly as `prompt_ids` gives it to generation, followed by the answer up to and with the
# token that ends the turn. Only the base's own chat template decides what that looks like.
# ----------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """Token ids of one answer to one prompt; the completion ends with the end of the turn."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of the whole row."""
        return len(self.prompt) + len(self.completion)


class PairRow(NamedTuple):
    """A pair with its two rows, which share their prompt."""

    pair: PreferencePair
    chosen: Row
    rejected: Row


def both_rows(pairs: Iterable[PairRow]) -> list[Row]:
    """The rows of every pair, each chosen one before its rejected one."""
    return [row for pair in pairs for row in (pair.chosen, pair.rejected)]


class UserRows(NamedTuple):
    """One user's rows, each split in file order; `deciding` are held-out pairs that decide when his training stops."""

    user_id: str
    train: list[PairRow]
    heldout: list[PairRow]
    deciding: Sequence[PairRow] = ()


def prompt_ids(messages: Sequence[Message], tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """The tokens from which the base writes its answer to these messages.

    Raises InputError where the base has no chat template, or the text itself holds one of its control tokens (it
    could open a turn of its own).
    """
    need_template(tokenizer)
    control = control_tokens(tokenizer)
    found = next((found for message in messages if (found := control.search(message.content))), None)
    if found is not None:
        sentence = f"the text holds the base's control token `{found.group()}`; take it out"
        raise InputError([Problem("prompt", None, None, sentence)])
    return tuple(encode([render(messages, tokenizer)], tokenizer)[0])


def tokenize(pairs: Sequence[PreferencePair], tokenizer: ChatTokenizer, context: int) -> list[UserRows]:
    """The rows of every user, in the order the users first appear; `context` is in tokens.

    Rows longer than the context are returned too: `screening.fit` drops them with a reason. Raises InputError where
    the base has no usable chat template, and naming each pair whose prompt alone fills the context.
    """
    need_template(tokenizer)
    if not pairs:
        return []
    prompts, texts = _rendered(pairs, tokenizer)
    ending = closing(pairs[0].prompt, tokenizer)
    every = list(dict.fromkeys([*prompts, *(text for both in texts for text in both)]))
    ids = dict(zip(every, encode(every, tokenizer), strict=True))  # one call: it uses all cores
    problems = _too_long([(pair, len(ids[prompt])) for pair, prompt in zip(pairs, prompts, strict=True)], context)
    if problems:
        raise InputError(problems)

    rows: dict[tuple[str, str], Row] = {}  # people judge the same answers

    def row_of(prompt: str, text: str) -> Row:
        if (row := rows.get((prompt, text))) is None:
            row = rows[prompt, text] = _row(ids[prompt], ids[text], text[len(prompt) :], ending, tokenizer)
        return row

    users: dict[str, UserRows] = {}
    for pair, prompt, (chosen, rejected) in zip(pairs, prompts, texts, strict=True):
        user = users.setdefault(pair.user_id, UserRows(pair.user_id, [], []))
        row = PairRow(pair, row_of(prompt, chosen), row_of(prompt, rejected))
        (user.train if pair.split == "train" else user.heldout).append(row)
    return list(users.values())


def text_row(prompt: str, answer: str, tokenizer: ChatTokenizer) -> Row:
    """A written answer to one user message as a row, the end of the turn and all.

    Raises InputError where the base has no usable chat template.
    """
    messages = (Message("user", prompt),)
    before, whole = render(messages, tokenizer), render(messages, tokenizer, answer)
    if not whole.startswith(before):
        raise _unlike(tokenizer)
    prompt_only, both = encode([before, whole], tokenizer)
    return _row(prompt_only, both, whole[len(before) :], closing(messages, tokenizer), tokenizer)


def halved(user: UserRows) -> UserRows:
    """The user with half of his held-out pairs, by prompt, set apart to decide when his training stops."""
    chosen = deciding(user.user_id, (row.pair.prompt for row in user.heldout))
    kept = [row for row in user.heldout if row.pair.prompt not in chosen]
    return user._replace(heldout=kept, deciding=[row for row in user.heldout if row.pair.prompt in chosen])


def prompt_problems(pairs: Sequence[PreferencePair], tokenizer: ChatTokenizer, context: int) -> list[Problem]:
    """The pairs whose prompt the base cannot take (see `tokenize`), found without a look at the answers.

    Raises InputError where the base has no chat template.
    """
    import jinja2

    need_template(tokenizer)
    problems: list[Problem] = []
    texts: dict[Prompt, str] = {}
    for pair in pairs:
        try:
            if pair.prompt not in texts:
                texts[pair.prompt] = render(pair.prompt, tokenizer)
        except jinja2.TemplateError as fault:
            problems.append(_not_taken(pair, fault))
    lengths = dict(zip(texts, map(len, encode(list(texts.values()), tokenizer)), strict=True)) if texts else {}
    known = [(pair, lengths[pair.prompt]) for pair in pairs if pair.prompt in lengths]
    return problems + _too_long(known, context)


def _rendered(pairs: Sequence[PreferencePair], tokenizer: ChatTokenizer) -> tuple[list[str], list[tuple[str, str]]]:
    """Every pair's prompt, and its two whole conversations, which begin with that prompt."""
    import jinja2

    problems: list[Problem] = []
    known: dict[Prompt, str] = {}
    prompts: list[str] = []
    texts: list[tuple[str, str]] = []
    for pair in pairs:
        try:
            if (prompt := known.get(pair.prompt)) is None:
                prompt = known[pair.prompt] = render(pair.prompt, tokenizer)
            both = render(pair.prompt, tokenizer, pair.chosen), render(pair.prompt, tokenizer, pair.rejected)
        except jinja2.TemplateError as fault:
            problems.append(_not_taken(pair, fault))
            continue
        if not all(text.startswith(prompt) for text in both):
            raise _unlike(tokenizer)
        prompts.append(prompt)
        texts.append(both)
    if problems:
        raise InputError(problems)
    return prompts, texts


def _row(prompt: list[int], whole: list[int], answer: str, ending: tuple[int, ...], tokenizer: ChatTokenizer) -> Row:
    """A prompt, and what follows it in the whole conversation, up to and with the end of the turn.

    `answer` is the text of what follows.
    """
    if whole[: len(prompt)] == prompt:
        ids = whole[len(prompt) :]
    else:
        # The answer's first characters melt into the prompt's last token (a line feed after a line feed). Generation
        # starts from the prompt's own tokens, so the answer is tokenized alone, if the tokenizer leaves it unchanged.
        ids = encode([answer], tokenizer)[0]
        if tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) != answer:
            sentence = "a prompt's tokens are not the beginning of the conversation's, so that no answer can be scored"
            raise InputError(
                [template_problem(tokenizer, f"{sentence}; end the generation prompt with a special token")]
            )
    if tuple(ids[-len(ending) :]) != ending:
        sentence = "the template does not end every answer in the same way, so that its end cannot be found"
        raise InputError([template_problem(tokenizer, f"{sentence}; mend the template")])
    return Row(tuple(prompt), tuple(ids[: len(ids) - len(ending) + 1]))


def _unlike(tokenizer: ChatTokenizer) -> InputError:
    sentence = "the template writes a prompt differently before an answer than for generation, so that no"
    return InputError([template_problem(tokenizer, f"{sentence} answer can be scored; mend the template")])


def _not_taken(pair: PreferencePair, fault: Exception) -> Problem:
    sentence = f"the base's chat template does not take this conversation ({fault}); change it or the base"
    return Problem(pair.file, pair.line, "prompt", sentence)


def _too_long(lengths: Sequence[tuple[PreferencePair, int]], context: int) -> list[Problem]:
    remedy = "shorten it, or take a base with a longer context"
    return [
        Problem(pair.file, pair.line, "prompt", f"has {length:,} tokens and fills the context of {context:,}; {remedy}")
        for pair, length in lengths
        if length >= context
    ]
