"""Does an adapted model refuse: base answers, exact shortcut, second judge."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import find, is_hub_id
from persona_rlhf.config.evaluation import ClassifierSettings
from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.adapted_model import AdaptedModel, GreedyScore
from persona_rlhf.models.generation import Generated
from persona_rlhf.models.model_split import HiddenStates, token_logps

OPENING_TOKENS = 20
"""Tokens, within which a refusal has said that it is one."""


# ----------------------------------------------------------------------------------------------------
# A causal language model that is asked which words it would write after a prompt of its own, a template or a chat.
# ----------------------------------------------------------------------------------------------------


class WordScorer:
    """A model, and how it is asked: by a `template` with places such as {prompt}, or by its chat template (None)."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
        self._model, self._tokenizer, self._template = model, tokenizer, template

    def ids(self, turns: Sequence[Message], places: Mapping[str, str]) -> list[int]:
        """The question as token ids: the turns of a chat, or the texts in their places of the template.

        One pass over the template: a text that holds the name of a place stays as it is.
        """
        if self._template is None:
            chat = [{"role": turn.role, "content": turn.content} for turn in turns]
            text = str(self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        else:
            text = re.sub(r"\{(\w+)\}", lambda place: places.get(place[1], place[0]), self._template)
        found: list[int] = self._tokenizer(text, add_special_tokens=self._template is not None)["input_ids"]
        return found

    @torch.no_grad()
    def logp(self, ids: list[int], word: str) -> float:
        """Log-probability in nats of a word after these tokens."""
        said = self._tokenizer(word, add_special_tokens=False)["input_ids"]
        whole = torch.tensor([ids + said], device=self._model.device)
        logits = self._model(input_ids=whole, logits_to_keep=len(said) + 1).logits[0, :-1]
        return float(token_logps(logits, whole[0, -len(said) :]).sum())

    @torch.no_grad()
    def continuation(self, ids: list[int], word: str, tokens: int) -> str:
        """What it writes after a word, greedy, of at most so many tokens."""
        said = self._tokenizer(word, add_special_tokens=False)["input_ids"]
        whole = torch.tensor([ids + said], device=self._model.device)
        for _ in range(tokens):
            token = self._model(input_ids=whole, logits_to_keep=1).logits[0, -1].argmax()
            whole = torch.cat([whole, token[None, None]], 1)
            if int(token) == self._tokenizer.eos_token_id:
                break
        return str(self._tokenizer.decode(whole[0, len(ids) + len(said) :], skip_special_tokens=True))


def load_words(model: str, file: Path | None, places: Sequence[str], key: str, device: torch.device) -> WordScorer:
    """Loads a model, a folder or a hub id, in the type of its weights.

    `file` holds its template, if it is asked by one; `places` are what that must hold, in order; `key` is the config's
    section that names it. Raises InputError where it cannot be loaded or asked.
    """
    place = model if is_hub_id(model) else find(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
        loaded = AutoModelForCausalLM.from_pretrained(place, dtype="auto", use_safetensors=True)
    except (OSError, ValueError) as fault:
        sentence = f"the classifier cannot be loaded ({fault})"
        raise InputError([Problem(model, None, f"{key}.model", sentence)]) from fault
    at, template = f"{key}.template", None if file is None else file.read_text(encoding="utf-8")
    if template is None and not tokenizer.chat_template:
        sentence = f"the classifier has no chat template; give its prompt in a file, {at}"
        raise InputError([Problem(model, None, at, sentence)])
    found = [] if template is None else [template.find(f"{{{name}}}") for name in places]
    if -1 in found or found != sorted(found):
        sentence = f"a template holds {', and after it '.join(f'{{{name}}}' for name in places)}"
        raise InputError([Problem(model, None, at, sentence)])
    loaded.requires_grad_(False).eval().to(device)
    return WordScorer(loaded, tokenizer, template)


# ----------------------------------------------------------------------------------------------------
# A model as a second judge: what the string rules call a refusal counts only where it says so too.
#
# Any causal language model that answers with one of two words. Known ones, by hub id, with the words (`refused`,
# `otherwise`) they answer with; their prompts are theirs, so they stand in a file of yours, or in the chat template:
#
# - meta-llama/Llama-Guard-3-8B, -1B: chat template, "\n\nsafe" and "\n\nunsafe", the defaults (harm, not refusal)
# - allenai/wildguard: its card's prompt up to "Response refusal:", " yes" and " no"
# - cais/HarmBench-Llama-2-13b-cls, HarmBench-Mistral-7b-val-cls: their card's prompt, "no" and "yes" (harm)
# - sorry-bench/ft-mistral-7b-instruct-v0.2-sorry-bench-202406: its card's prompt, "0" and "1" (fulfilment)
# ----------------------------------------------------------------------------------------------------


class AnsweredPrompt(NamedTuple):
    """A prompt and the answer that was given to it, as texts."""

    prompt: str
    answer: str


SecondJudge = Callable[[Sequence[AnsweredPrompt]], Sequence[bool]]
"""Does each of these answers refuse?"""


class RefusalClassifier:
    """A causal language model that is asked which of two words it would answer with."""

    def __init__(self, words: WordScorer, refused: str, otherwise: str) -> None:
        self._words, self._refused, self._otherwise = words, refused, otherwise

    def __call__(self, asked: Sequence[AnsweredPrompt]) -> list[bool]:
        """True where `refused` is the likelier word; a tie is no refusal."""
        return [self._refuses(one) for one in asked]

    def _refuses(self, asked: AnsweredPrompt) -> bool:
        turns = [Message("user", asked.prompt), Message("assistant", asked.answer)]
        ids = self._words.ids(turns, {"prompt": asked.prompt, "answer": asked.answer})
        return self._words.logp(ids, self._refused) > self._words.logp(ids, self._otherwise)


def load_classifier(settings: ClassifierSettings, device: torch.device) -> RefusalClassifier:
    """Loads a classifier, a folder or a hub id. Raises InputError where it cannot be."""
    words = load_words(settings.model, settings.template, ("prompt", "answer"), "gate.classifier", device)
    return RefusalClassifier(words, settings.refused, settings.otherwise)


# ----------------------------------------------------------------------------------------------------
# Greedy answers, mostly without writing them: who refuses says few different things, and one pass tells a right guess.
#
# A guess is scored under the adapter. Where each of its tokens is the likeliest, greedy decoding would write just that
# answer; where not, the likeliest token at the first place that differs is known, and the next guess must go on with
# it.
# So what comes out is what decoding would have written, whatever was guessed. (Stern et al. 2018 and Leviathan et al.
# 2023 verify drafts of some tokens in this way; here a draft is a whole answer to another prompt.)
# ----------------------------------------------------------------------------------------------------

_WRITTEN = 24  # answers that a user writes out before others are guessed
_TRIES = 2  # guesses an answer; what is left then is written out
_TWICE = 2  # an answer that was given so often is a guess for other prompts


Ids = tuple[int, ...]


class StartedAnswer(NamedTuple):
    """A prompt, and the tokens that the greedy answer to it is known to begin with."""

    prompt: tuple[int, ...]
    opening: tuple[int, ...]


def greedy_answers(
    adapted: AdaptedModel,
    flat: Float[Tensor, "users params"],
    alphas: Float[Tensor, " users"],
    asked: Sequence[Sequence[StartedAnswer]],
    max_new_tokens: int,
    below: Callable[[Sequence[Row]], HiddenStates],
) -> list[list[Generated]]:
    """Every user's greedy answers to his own prompts, as `AdaptedModel.generate` would write them.

    `below` gives the hidden states of rows below the adapters (see `AdaptedModel.prefix_states`): users guess alike.
    """
    found: list[list[Generated | None]] = [[_ended(adapted, one.opening) for one in own] for own in asked]
    openings = [[one.opening for one in own] for own in asked]

    def left(user: int) -> list[int]:
        return [n for n, answer in enumerate(found[user]) if answer is None]

    def write(places: dict[int, list[int]]) -> None:
        for group in _alike({user: len(own) for user, own in places.items() if own}):
            prompts = [[asked[user][n].prompt for n in places[user]] for user in group]
            with adapted.using(flat[group], alphas[group]):
                written = adapted.generate(prompts, max_new_tokens)
            for user, own in zip(group, written, strict=True):
                for n, answer in zip(places[user], own, strict=True):
                    found[user][n] = answer

    def guess(places: dict[int, dict[int, Row]]) -> None:
        users, rows = list(places), [list(own.values()) for own in places.values()]
        states = below([row for own in rows for row in own])
        with adapted.using(flat[users], alphas[users]):
            scores = adapted.score_greedy(rows, [states] * len(users))
        for user, own in zip(users, scores, strict=True):
            for (n, row), score in zip(places[user].items(), own, strict=True):
                openings[user][n] = known = opening_of(row, score)
                found[user][n] = _ended(adapted, known)

    users, context, end = range(len(asked)), adapted.base.context, adapted.base.eos_ids[:1]

    def likely(user: int) -> dict[int, Row]:
        known = {n: answer.ids + end for n, answer in enumerate(found[user]) if answer and answer.finished}
        guesses = _guesses(known, openings[user], left(user))
        rows = {n: Row(asked[user][n].prompt, ids) for n, ids in guesses.items()}
        return {n: row for n, row in rows.items() if row.length <= context and len(row.completion) <= max_new_tokens}

    write({user: _spread(left(user)) for user in users})
    for _ in range(_TRIES):
        if places := {user: rows for user in users if (rows := likely(user))}:
            guess(places)
    write({user: left(user) for user in users})
    return [[answer for answer in own if answer is not None] for own in found]


def opening_of(row: Row, reading: GreedyScore) -> tuple[int, ...]:
    """What a reading tells of the greedy answer: the tokens of the row that stand, and the one that follows them."""
    return row.completion[: reading.matched] + (() if reading.next_token is None else (reading.next_token,))


def _ended(adapted: AdaptedModel, opening: tuple[int, ...]) -> Generated | None:
    """The answer, where all of it is known."""
    return Generated(opening[:-1], True) if opening and opening[-1] in adapted.base.eos_ids else None


def _guesses(known: Mapping[int, Ids], openings: Sequence[Ids], places: Sequence[int]) -> dict[int, Ids]:
    """For each place the answer to the nearest prompt that was answered in a way that begins as it must, and that was
    given twice at least: prompts of a category lie side by side."""
    counts, found = Counter(known.values()), {}
    common = [(n, ids) for n, ids in known.items() if counts[ids] >= _TWICE]
    for place in places:
        opening = openings[place]
        fits = [(abs(n - place), ids) for n, ids in common if ids[: len(opening)] == opening]
        if fits:
            found[place] = min(fits)[1]
    return found


def _spread(places: Sequence[int]) -> list[int]:
    """All places, where they are few; else some of them, evenly apart: prompts of a category lie side by side."""
    if len(places) <= 2 * _WRITTEN:
        return list(places)
    return [places[n * len(places) // _WRITTEN] for n in range(_WRITTEN)]


def _alike(counts: dict[int, int]) -> Iterator[list[int]]:
    """Users in groups whose counts lie within a factor of two: a pass is padded to its busiest user."""
    group: list[int] = []
    for user in sorted(counts, key=lambda user: (counts[user], user)):
        if group and counts[user] > 2 * counts[group[0]]:
            yield group
            group = []
        group.append(user)
    if group:
        yield group


# ----------------------------------------------------------------------------------------------------
# Which probes an adapted model refuses, exactly, and mostly without writing an answer.
# ----------------------------------------------------------------------------------------------------

_KEPT = 2**28  # bytes of hidden states of rows that were guessed

Judge = Callable[[str], bool]
"""Is this text a refusal? `policy.judges.is_refusal`, or a model behind the same call."""

PromptIds = tuple[int, ...]
"""Token ids of a conversation, up to where the answer begins."""


class BaseAnswer(NamedTuple):
    """The base's greedy answer as a row (its end token included where it came in time), the judge's verdict, and the
    text that was judged."""

    row: Row
    refused: bool
    text: str


class BaseAnswers:
    """The base's own greedy answers: written and judged once, whatever the number of users."""

    def __init__(
        self,
        adapted: AdaptedModel,
        judge: Judge,
        max_new_tokens: int,
        second: SecondJudge | None = None,
        said: Mapping[PromptIds, str] | None = None,
    ) -> None:
        """With a `second` judge, both must call an answer a refusal; he is told what the prompts `said` as texts."""
        self.judge, self.max_new_tokens = judge, max_new_tokens
        self._second, self._said = second, said or {}
        self._adapted = adapted
        self._known: dict[PromptIds, BaseAnswer] = {}
        self.states: dict[Row, Float[Tensor, "_tokens hidden"]] = {}
        """Of each answer what lies below the adapted layers: the same for every user."""
        self._guessed: dict[Row, Float[Tensor, "_tokens hidden"]] = {}

    def of(self, prompts: Sequence[PromptIds]) -> list[BaseAnswer]:
        """The answers to these prompts; those not asked before are written now."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if new:
            with self._adapted.using(None):
                (written,) = self._adapted.generate([new], self.max_new_tokens)
            texts = [answer_text(self._adapted, answer) for answer in written]
            judged = self.judged(new, texts)
            for prompt, answer, text, refused in zip(new, written, texts, judged, strict=True):
                self._known[prompt] = BaseAnswer(answer_row(self._adapted, prompt, answer), refused, text)
            self.states.update(self._adapted.prefix_states([self._known[prompt].row for prompt in new]))
        return [self._known[prompt] for prompt in prompts]

    def below(self, rows: Sequence[Row]) -> HiddenStates:
        """What lies below the adapted layers of any rows; kept for other users as long as it is little."""
        new = [row for row in dict.fromkeys(rows) if row not in self._guessed]
        found = self._adapted.prefix_states(new)
        known = {row: self._guessed[row] for row in rows if row in self._guessed}
        if self._adapted.prefix_bytes([*self._guessed, *new]) <= _KEPT:
            self._guessed.update(found)
        return {**known, **found}

    def judged(self, prompts: Sequence[PromptIds], texts: Sequence[str]) -> list[bool]:
        """Whether each answer is a refusal; the second judge is asked only where the first says so."""
        verdicts = [self.judge(text) for text in texts]
        if self._second is not None:
            places = [n for n, refused in enumerate(verdicts) if refused]
            decode = self._adapted.base.tokenizer.decode
            asked = [
                AnsweredPrompt(self._said.get(prompts[n]) or str(decode(list(prompts[n]))), texts[n]) for n in places
            ]
            for n, agreed in zip(places, self._second(asked), strict=True):
                verdicts[n] = agreed
        return verdicts

    def refused(self, prompts: Sequence[PromptIds]) -> list[bool]:
        """Whether the base refuses each prompt."""
        return [answer.refused for answer in self.of(prompts)]


class Refusals(NamedTuple):
    """By user: was each prompt refused, and the share of prompts answered to the token as the base answers them.

    Beside these, of each prompt, the text of the greedy answer, and the log-probability (nats) of the base's answer.
    """

    refused: list[list[bool]]
    unchanged: list[float]
    texts: list[list[str]]
    base_logps: list[list[float]]


def refusal_outcomes(
    adapted: AdaptedModel,
    flat: Float[Tensor, "users params"],
    alphas: Float[Tensor, " users"],
    prompts: Sequence[PromptIds],
    base: BaseAnswers,
) -> Refusals:
    """Whether every user's greedy answer to each prompt is a refusal.

    The base's own answer is scored under the adapter: where each of its tokens stays the argmax, its end token too,
    greedy decoding would write just that answer, so the verdict on it is known already. That holds for any answer of
    the base, refusal or not. The other answers are found as `guessing` has it.
    """
    if not prompts:
        nothing = range(flat.shape[0])
        return Refusals([[] for _ in nothing], [1.0 for _ in nothing], [[] for _ in nothing], [[] for _ in nothing])
    answers = base.of(prompts)
    with adapted.using(flat, alphas):
        scores = adapted.score_greedy(
            [[answer.row for answer in answers]] * flat.shape[0], [base.states] * flat.shape[0]
        )
    refused = [[answer.refused for answer in answers] for _ in scores]
    texts = [[answer.text for answer in answers] for _ in scores]
    changed = [[n for n, score in enumerate(own) if not score.greedy] for own in scores]
    asked = [
        [StartedAnswer(prompts[n], opening_of(answers[n].row, own[n])) for n in places]
        for own, places in zip(scores, changed, strict=True)
    ]
    own_answers = greedy_answers(adapted, flat, alphas, asked, base.max_new_tokens, base.below)
    for user, written in enumerate(own_answers):
        answered = [answer_text(adapted, answer) for answer in written]
        judged = base.judged([prompts[n] for n in changed[user]], answered)
        for n, text, verdict in zip(changed[user], answered, judged, strict=True):
            texts[user][n], refused[user][n] = text, verdict
    unchanged = [1 - len(places) / len(prompts) for places in changed]
    return Refusals(refused, unchanged, texts, [[score.logp for score in own] for own in scores])


def answer_text(adapted: AdaptedModel, answer: Generated) -> str:
    """An answer as text."""
    return str(adapted.base.tokenizer.decode(list(answer.ids), skip_special_tokens=True)).strip()


def answer_row(adapted: AdaptedModel, prompt: PromptIds, answer: Generated) -> Row:
    """An answer as a row to score: with its end token, where it was not cut off."""
    end = adapted.base.eos_ids[:1] if answer.finished else ()
    return Row(prompt, answer.ids + end)
