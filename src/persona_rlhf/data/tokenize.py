"""Pairs as token rows, through the base's chat template.

A row is the prompt exactly as `prompt_ids` gives it to generation, then the answer up to and with the token that ends
the turn. Only the base's own chat template decides the text around them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.data.pairs import Message, PreferencePair, Prompt, deciding

_TEMPLATE_ARGUMENTS = {"enable_thinking": False, "date_string": "26 Jul 2024"}
"""Arguments of some templates: no chain of thought before an answer, and a fixed date, so that tokens do not change
overnight (the day is the default of the templates that write one)."""

_CLOCK = """
{%- macro strftime_now(form) -%}
    {{- form | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July') | replace('%Y', '2024') -}}
{%- endmacro -%}
"""
"""A clock fixed at that day, put before a template that calls `strftime_now`."""


@runtime_checkable  # for beartype in the tests
class ChatTokenizer(Protocol):
    """The interface of a tokenizer that is used here; every tokenizer of `transformers` has it."""

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

    def get_vocab(self) -> Mapping[str, int]: ...


def need_template(tokenizer: ChatTokenizer) -> None:
    """Raises InputError if the base has no chat template."""
    if not tokenizer.chat_template:
        remedy = "take an instruction-tuned base, or put a chat_template.jinja beside its tokenizer"
        raise InputError([template_problem(tokenizer, f"the base has no chat template; {remedy}")])


def template_problem(tokenizer: ChatTokenizer, sentence: str) -> Problem:
    """A problem of the base's chat template."""
    return Problem(tokenizer.name_or_path or "the base's tokenizer", None, "chat_template", sentence)


def render(messages: Sequence[Message], tokenizer: ChatTokenizer, answer: str | None = None) -> str:
    """A conversation as text, open for the model's answer or with `answer`.

    Raises jinja2.TemplateError if the template rejects it.
    """
    turns = [{"role": message.role, "content": message.content} for message in messages]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    settings: dict[str, Any] = {**_TEMPLATE_ARGUMENTS, "tokenize": False, "add_generation_prompt": answer is None}
    template = tokenizer.chat_template
    if isinstance(template, str) and "strftime_now" in template:
        settings["chat_template"] = _CLOCK + template
    text = tokenizer.apply_chat_template(turns, **settings)
    assert isinstance(text, str)
    return text


def encode(texts: list[str], tokenizer: ChatTokenizer) -> list[list[int]]:
    """Token ids of rendered texts. Nothing is added: the template wrote the start of text."""
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def closing(prompt: Prompt, tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """The tokens that the template writes after an answer (Qwen: `<|im_end|>`, a new line).

    The model generates the first of them, which ends the turn; the rest is the template's.
    """
    answer = "Yes"
    text = render(prompt, tokenizer, answer)
    tail = text[text.rindex(answer) + len(answer) :] if answer in text else ""
    end = control_tokens(tokenizer).search(tail)
    if end is None:
        sentence = "the template ends an answer with no special token, so that no answer would ever end; add one"
        raise InputError([template_problem(tokenizer, sentence)])
    return tuple(encode([tail[end.start() :]], tokenizer)[0])


_QUESTION = (Message("user", "Hello"),)


def turn_end(tokenizer: ChatTokenizer) -> int:
    """The token that ends an answer: the template's, which can differ from the tokenizer's end of text.

    Raises InputError if the base has no usable chat template.
    """
    return _ending(tokenizer)[0]


def _ending(tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """The tokens after an answer (`closing`). Raises InputError if the base has no usable chat template."""
    import jinja2

    need_template(tokenizer)
    try:
        return closing(_QUESTION, tokenizer)
    except jinja2.TemplateError as fault:
        sentence = f"the template rejects a single question ({fault}); correct the template"
        raise InputError([template_problem(tokenizer, sentence)]) from fault


def control_tokens(tokenizer: ChatTokenizer) -> re.Pattern[str]:
    """A pattern of the control tokens, which open and end turns and must not occur in a text."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special.update(tokenizer.all_special_tokens)
    longest_first = sorted((token for token in special if token), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches


class Row(NamedTuple):
    """Token ids of one answer to one prompt; the completion ends with the end of the turn."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of the whole row."""
        return len(self.prompt) + len(self.completion)


class PairRow(NamedTuple):
    """A pair with its two rows, which share their prompt, and the probability of its label.

    It is 1 for a user's choice, and 0.5 for a tie.
    """

    pair: PreferencePair
    chosen: Row
    rejected: Row
    probability: float = 1.0


def both_rows(pairs: Iterable[PairRow]) -> list[Row]:
    """The rows of every pair, each chosen one before its rejected one."""
    return [row for pair in pairs for row in (pair.chosen, pair.rejected)]


class UserRows(NamedTuple):
    """One user's rows, each split in file order; `deciding` are the held-out pairs that decide early stopping.

    `labelled` are pairs of the base's answers that the user's posterior labels (`reward_basis`). `ties` are pairs to
    train on whose answers the user holds alike.
    """

    user_id: str
    train: list[PairRow]
    heldout: list[PairRow]
    deciding: Sequence[PairRow] = ()
    labelled: Sequence[PairRow] = ()
    ties: Sequence[PairRow] = ()

    @property
    def judged(self) -> list[PairRow]:
        """The pairs to train on that the user judged: preferences, then ties."""
        return [*self.train, *self.ties]

    @property
    def taught(self) -> list[PairRow]:
        """All pairs that the loss is computed on."""
        return [*self.judged, *self.labelled]


def prompt_ids(messages: Sequence[Message], tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """The tokens of the prompt from which the base answers these messages.

    Raises InputError if the base has no chat template, or a text contains one of its control tokens (it could open
    another turn).
    """
    need_template(tokenizer)
    token = written_token(messages, control_tokens(tokenizer))
    if token is not None:
        sentence = f"the text holds the base's control token `{token}`; take it out"
        raise InputError([Problem("prompt", None, None, sentence)])
    return tuple(encode([render(messages, tokenizer)], tokenizer)[0])


class UnreadablePair(NamedTuple):
    """A pair that the base cannot read, the column, and the reason as "kind: sentence"."""

    pair: PreferencePair
    column: str
    reason: str

    @property
    def problem(self) -> Problem:
        """The same as a problem of its row."""
        return Problem(self.pair.file, self.pair.line, self.column, self.reason.partition(": ")[2])


class TokenizedPairs(NamedTuple):
    """Pairs as rows, in file order, and those that cannot be written as rows."""

    rows: list[PairRow]
    unreadable: list[UnreadablePair]


def tokenize(pairs: Sequence[PreferencePair], tokenizer: ChatTokenizer, context: int) -> list[UserRows]:
    """The rows of every user, in the order of their first pairs; `context` is in tokens.

    Rows longer than the context are returned too: `screening.fit` drops them with a reason. Raises InputError if the
    base has no usable chat template, and naming each pair that it rejects or whose prompt alone fills the context.
    """
    tokenized = tokenize_readable(pairs, tokenizer)
    lengths = ((row.pair, len(row.chosen.prompt)) for row in tokenized.rows)
    long = [UnreadablePair(pair, "prompt", _too_long(length, context)) for pair, length in lengths if length >= context]
    if unreadable := [*tokenized.unreadable, *long]:
        raise InputError([pair.problem for pair in unreadable])
    return by_user(tokenized.rows)


def by_user(pairs: Iterable[PairRow]) -> list[UserRows]:
    """The rows of every user, in the order of their first pairs. Held-out ties, which tell nothing, are left out."""
    users: dict[str, UserRows] = {}
    for row in pairs:
        user = users.setdefault(row.pair.user_id, UserRows(row.pair.user_id, [], []))
        if not row.pair.tie:
            (user.train if row.pair.split == "train" else user.heldout).append(row)
        elif row.pair.split == "train":
            users[row.pair.user_id] = user._replace(ties=(*user.ties, row))
    return list(users.values())


def tokenize_readable(pairs: Sequence[PreferencePair], tokenizer: ChatTokenizer) -> TokenizedPairs:
    """The pairs that the base's chat template can write, as rows, and the others with the reason.

    Raises InputError if the template itself cannot be used: one that fails for a single question and answer.
    """
    ending = _ending(tokenizer)
    if not pairs:
        return TokenizedPairs([], [])
    if not render(_QUESTION, tokenizer, "Yes").startswith(render(_QUESTION, tokenizer)):
        raise _different_prompt(tokenizer)
    texts, unreadable = _rendered(pairs, tokenizer)
    every = list(dict.fromkeys(text for rendered in texts for text in (rendered.prompt, *rendered.answers)))
    ids = dict(zip(every, encode(every, tokenizer), strict=True)) if every else {}  # one call: it uses all cores
    rows: dict[tuple[str, str], Row | str] = {}  # several users can have the same answers

    def row_of(prompt: str, text: str) -> Row | str:
        if (row := rows.get((prompt, text))) is None:
            row = rows[prompt, text] = _row(ids[prompt], ids[text], text[len(prompt) :], ending, tokenizer)
        return row

    tokenized: list[PairRow] = []
    for pair, prompt, answers in texts:
        chosen, rejected = (row_of(prompt, text) for text in answers)
        if isinstance(chosen, Row) and isinstance(rejected, Row):
            tokenized.append(PairRow(pair, chosen, rejected, 0.5 if pair.tie else 1.0))
        else:
            column, reason = ("rejected", rejected) if isinstance(chosen, Row) else ("chosen", chosen)
            unreadable.append(UnreadablePair(pair, column, f"template: {reason}"))
    return TokenizedPairs(tokenized, unreadable)


def text_row(prompt: str, answer: str, tokenizer: ChatTokenizer) -> Row:
    """A written answer to one user message as a row, with the end of the turn.

    Raises InputError if the base has no usable chat template.
    """
    messages = (Message("user", prompt),)
    before, whole = render(messages, tokenizer), render(messages, tokenizer, answer)
    if not whole.startswith(before):
        raise _different_prompt(tokenizer)
    prompt_only, both = encode([before, whole], tokenizer)
    row = _row(prompt_only, both, whole[len(before) :], closing(messages, tokenizer), tokenizer)
    if isinstance(row, str):
        raise InputError([template_problem(tokenizer, row)])
    return row


def halved(user: UserRows) -> UserRows:
    """The user's rows with half of the held-out pairs, by prompt, set apart to decide early stopping."""
    chosen = deciding(user.user_id, (row.pair.prompt for row in user.heldout))
    kept = [row for row in user.heldout if row.pair.prompt not in chosen]
    return user._replace(heldout=kept, deciding=[row for row in user.heldout if row.pair.prompt in chosen])


def unreadable_prompts(pairs: Sequence[PreferencePair], tokenizer: ChatTokenizer, context: int) -> list[UnreadablePair]:
    """The pairs whose prompts the base cannot read, without a look at the answers; `context` is in tokens.

    Such a prompt holds a control token, is rejected by the chat template, or fills the context. Raises InputError if
    the base has no chat template.
    """
    import jinja2

    need_template(tokenizer)
    control = control_tokens(tokenizer)
    reasons: dict[Prompt, str] = {}
    texts: dict[Prompt, str] = {}
    for prompt in dict.fromkeys(pair.prompt for pair in pairs):
        if (token := written_token(prompt, control)) is not None:
            reasons[prompt] = f"control token: a text writes out the base's `{token}`"
            continue
        try:
            texts[prompt] = render(prompt, tokenizer)
        except jinja2.TemplateError as fault:
            reasons[prompt] = _rejected(fault)
    for prompt, ids in zip(texts, encode(list(texts.values()), tokenizer) if texts else [], strict=True):
        if len(ids) >= context:
            reasons[prompt] = _too_long(len(ids), context)
    return [UnreadablePair(pair, "prompt", reasons[pair.prompt]) for pair in pairs if pair.prompt in reasons]


def written_token(messages: Iterable[Message], control: re.Pattern[str]) -> str | None:
    """The first control token that a message writes out; None without one."""
    return next((match.group() for message in messages if (match := control.search(message.content))), None)


class _RenderedPair(NamedTuple):
    """A pair, its rendered prompt, and its two whole conversations, which begin with that prompt."""

    pair: PreferencePair
    prompt: str
    answers: tuple[str, str]


def _rendered(
    pairs: Sequence[PreferencePair], tokenizer: ChatTokenizer
) -> tuple[list[_RenderedPair], list[UnreadablePair]]:
    import jinja2

    rendered: dict[Prompt, str] = {}
    texts: list[_RenderedPair] = []
    unreadable: list[UnreadablePair] = []
    for pair in pairs:
        try:
            if (prompt := rendered.get(pair.prompt)) is None:
                prompt = rendered[pair.prompt] = render(pair.prompt, tokenizer)
            both = render(pair.prompt, tokenizer, pair.chosen), render(pair.prompt, tokenizer, pair.rejected)
        except jinja2.TemplateError as fault:
            unreadable.append(UnreadablePair(pair, "prompt", _rejected(fault)))
            continue
        answers = (("chosen", pair.chosen, both[0]), ("rejected", pair.rejected, both[1]))
        changed = next((name for name, answer, text in answers if not _writes(prompt, answer, text)), None)
        if changed is None:
            texts.append(_RenderedPair(pair, prompt, both))
        else:
            reason = "template: the base's chat template does not write this answer as it is, after the prompt"
            unreadable.append(UnreadablePair(pair, changed, f"{reason}; take marks of thoughts out of it"))
    return texts, unreadable


def _writes(prompt: str, answer: str, text: str) -> bool:
    """Whether a rendered conversation is its rendered prompt, and then the whole answer; spaces may be trimmed."""
    return text.startswith(prompt) and answer.strip() in text[len(prompt) :]


def _row(
    prompt: list[int], whole: list[int], answer: str, ending: tuple[int, ...], tokenizer: ChatTokenizer
) -> Row | str:
    """The row of a prompt and the rest of the whole conversation, up to and with the end of the turn; or the reason.

    `answer` is the text of that rest.
    """
    if whole[: len(prompt)] == prompt:
        ids = whole[len(prompt) :]
    else:
        # The answer's first characters merge into the prompt's last token (a line feed after a line feed). Generation
        # starts from the prompt's own tokens, so the answer is tokenized alone, if decoding gives it back unchanged.
        ids = encode([answer], tokenizer)[0]
        if tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) != answer:
            sentence = "a prompt's tokens are not the beginning of the conversation's, so that no answer can be scored"
            return f"{sentence}; end the generation prompt with a special token"
    if tuple(ids[-len(ending) :]) != ending:
        sentence = "the template does not end every answer in the same way, so that its end cannot be found"
        return f"{sentence}; correct the template"
    return Row(tuple(prompt), tuple(ids[: len(ids) - len(ending) + 1]))


def _different_prompt(tokenizer: ChatTokenizer) -> InputError:
    sentence = "the template writes a prompt differently before an answer than for generation, so that no"
    return InputError([template_problem(tokenizer, f"{sentence} answer can be scored; correct the template")])


def _rejected(fault: Exception) -> str:
    return f"template: the base's chat template rejects this conversation ({fault}); change it or the base"


def _too_long(length: int, context: int) -> str:
    remedy = "shorten it, or take a base with a longer context"
    return f"over-long: has {length:,} tokens and fills the context of {context:,}; {remedy}"
