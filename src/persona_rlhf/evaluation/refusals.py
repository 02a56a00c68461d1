"""Does an adapted model refuse: the base's answers, and an exact shortcut past generation.

The shortcut scores the base's greedy answer under the adapter. If each of its tokens stays the most likely one, greedy
decoding would write exactly that answer, so its verdict holds and nothing is generated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from persona_rlhf.data.tokenize import Row
from persona_rlhf.evaluation.classifier import AnsweredPrompt, SecondJudge
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.generation import Generated
from persona_rlhf.models.row_answers import greedy_answers
from persona_rlhf.models.scores import GreedyScore

OPENING_TOKENS = 20
"""Tokens within which a refusal can be recognised as one."""

LIMIT_RAISES = 2
"""Doublings of the token limit for an answer that reads as a refusal where the limit cuts it."""

Ids = tuple[int, ...]
PromptIds = tuple[int, ...]
"""Token ids of a conversation, up to where the answer begins."""

Judge = Callable[[str], bool]
"""Is this text a refusal? `policy.judges.is_refusal`, or a model behind the same call."""


class BaseAnswer(NamedTuple):
    """The base's greedy answer as a row (with its end token if it ended), its verdict, and its text."""

    row: Row
    refused: bool
    text: str


class JudgedAnswer(NamedTuple):
    """A greedy answer, its text, and whether it is a refusal."""

    generated: Generated
    text: str
    refused: bool


class BaseAnswers:
    """The base's own greedy answers: written and judged once, whatever the number of users."""

    def __init__(
        self,
        adapted: AdaptedModel,
        judge: Judge,
        max_new_tokens: int,
        second: SecondJudge | None = None,
        prompt_texts: Mapping[PromptIds, str] | None = None,
        *,
        harmless: bool = False,
        opening: int | None = None,
    ) -> None:
        """A refusal of a probe needs the word of every judge, and an end; see `judged`.

        Answers to `harmless` prompts are counted the other way round: one judge is enough, and so is a text that was
        cut. Each doubt then counts against the adapter. `second` gets the prompts as in `prompt_texts`. The judges read
        the first `opening` tokens of an answer, or all of it.
        """
        self.judge, self.max_new_tokens, self._opening = judge, max_new_tokens, opening
        self._second, self._harmless = second, harmless
        self._prompt_texts = {} if prompt_texts is None else prompt_texts  # an empty one is filled later
        self._adapted = adapted
        self._answers: dict[PromptIds, BaseAnswer] = {}
        self._kept: Mapping[str, Generated] = {}
        self.states: dict[Row, Float[Tensor, "_tokens hidden"]] = {}
        """The hidden states of each answer below the adapted layers: the same for every user."""

    def of(self, prompts: Sequence[PromptIds]) -> list[BaseAnswer]:
        """The answers to these prompts; new ones are written now."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._answers]
        kept = [prompt for prompt in new if _digest(prompt) in self._kept]
        self._add(kept, self._ended(self._read(kept, [self._kept[_digest(prompt)] for prompt in kept])))
        unwritten = [prompt for prompt in new if prompt not in self._answers]
        if unwritten:
            with self._adapted.using(None):
                (judged,) = self.judged([unwritten], self._adapted.generate([unwritten], self.max_new_tokens))
            self._add(unwritten, judged)
        if new:
            self.states.update(self._adapted.prefix_states([self._answers[prompt].row for prompt in new]))
        return [self._answers[prompt] for prompt in prompts]

    def _add(self, prompts: Sequence[PromptIds], judged: Sequence[JudgedAnswer]) -> None:
        for prompt, (generated, text, refused) in zip(prompts, judged, strict=True):
            self._answers[prompt] = BaseAnswer(answer_row(self._adapted, prompt, generated), refused, text)

    def __len__(self) -> int:
        """The number of answers so far."""
        return len(self._answers)

    def to_json(self) -> dict[str, list[Any]]:
        """All answers so far, by the hash of their prompt: token ids, and whether the answer ended by itself."""
        ends, kept = self._adapted.base.eos_ids[:1], {}
        for prompt, answer in self._answers.items():
            completion, finished = answer.row.completion, answer.row.completion[-1:] == ends
            kept[_digest(prompt)] = [list(completion[:-1] if finished else completion), finished]
        return kept

    def keep(self, answers: Mapping[str, Sequence[Any]]) -> None:
        """Takes answers of `to_json` in place of writing them. They must be of the same base, limit and judges."""
        self._kept = {name: Generated(tuple(ids), finished) for name, (ids, finished) in answers.items()}

    def judged(
        self, prompts: Sequence[Sequence[PromptIds]], written: Sequence[Sequence[Generated]]
    ) -> list[list[JudgedAnswer]]:
        """The verdicts on every user's greedy answers, written with the adapters that are on.

        An answer that its limit cuts is no refusal: nobody has seen how it goes on. One that reads as a refusal so far
        is therefore continued, up to `LIMIT_RAISES` doublings of the limit, and judged as a whole.
        """
        answers = [self._read(*user) for user in zip(prompts, written, strict=True)]
        if self._harmless:
            return answers
        for raised in range(1, LIMIT_RAISES + 1):
            cut = [
                [n for n, answer in enumerate(user) if self._goes_on(prompts[number][n], answer)]
                for number, user in enumerate(answers)
            ]
            if not any(cut):
                break
            open_prompts = [[prompts[user][n] for n in places] for user, places in enumerate(cut)]
            begun = [[answers[user][n].generated.ids for n in places] for user, places in enumerate(cut)]
            longer = continue_answers(self._adapted, open_prompts, begun, self.max_new_tokens * 2**raised)
            for user, places in enumerate(cut):
                for n, answer in zip(places, self._read(open_prompts[user], longer[user]), strict=True):
                    answers[user][n] = answer
        return [self._ended(user) for user in answers]

    def _ended(self, answers: Sequence[JudgedAnswer]) -> list[JudgedAnswer]:
        """The answers, of which none that its limit cuts is a refusal, unless their prompts are harmless."""
        return [
            answer._replace(refused=answer.refused and (self._harmless or answer.generated.finished))
            for answer in answers
        ]

    def as_written(
        self, prompts: Sequence[Sequence[PromptIds]], written: Sequence[Sequence[Generated]]
    ) -> list[list[bool]]:
        """Whether each answer refuses as it stands, such as a sampled one; none that its limit cuts does."""
        return [
            [answer.refused and answer.generated.finished for answer in self._read(*user)]
            for user in zip(prompts, written, strict=True)
        ]

    def _goes_on(self, prompt: PromptIds, answer: JudgedAnswer) -> bool:
        room = len(prompt) + len(answer.generated.ids) < self._adapted.base.context
        return answer.refused and not answer.generated.finished and room

    def _read(self, prompts: Sequence[PromptIds], written: Sequence[Generated]) -> list[JudgedAnswer]:
        """The answers with the judges' verdicts on their texts as far as they go.

        The second judge is asked only where the first leaves the verdict open.
        """
        texts = [answer_text(self._adapted, answer) for answer in written]
        openings = [answer_text(self._adapted, answer._replace(ids=answer.ids[: self._opening])) for answer in written]
        of_opening = {opening: self.judge(opening) for opening in set(openings)}  # many answers are alike
        verdicts = [of_opening[opening] for opening in openings]
        if self._second is not None:
            places = [n for n, refused in enumerate(verdicts) if refused != self._harmless]
            decode = self._adapted.base.tokenizer.decode
            answered = [
                AnsweredPrompt(self._prompt_texts.get(prompts[n]) or str(decode(list(prompts[n]))), texts[n])
                for n in places
            ]
            for n, verdict in zip(places, self._second(answered), strict=True):
                verdicts[n] = verdict
        return [JudgedAnswer(*answer) for answer in zip(written, texts, verdicts, strict=True)]

    def refused(self, prompts: Sequence[PromptIds]) -> list[bool]:
        """Whether the base refuses each prompt."""
        return [answer.refused for answer in self.of(prompts)]


class Refusals(NamedTuple):
    """By user: was each prompt refused, and the share of prompts answered to the token as the base answers them.

    Beside these, of each prompt, the text of the greedy answer, the log-probability (nats) of the base's answer, and
    the greedy answer as a row.
    """

    refused: list[list[bool]]
    unchanged: list[float]
    texts: list[list[str]]
    base_logps: list[list[float]]
    answers: list[list[Row]]


def refusal_outcomes(
    adapted: AdaptedModel,
    flat: Float[Tensor, "users params"],
    alphas: Float[Tensor, " users"],
    prompts: Sequence[PromptIds],
    base: BaseAnswers,
) -> Refusals:
    """Whether every user's greedy answer to each prompt is a refusal.

    The base's own answer is scored under the adapter first. Where every token, its end token too, stays the argmax, the
    base's verdict holds, refusal or not. The other answers are generated from the opening that the scores show.
    """
    if not prompts:
        none: list[list[Any]] = [[] for _ in range(flat.shape[0])]
        return Refusals(none, [1.0] * len(none), none, none, none)
    answers = base.of(prompts)
    rows = [answer.row for answer in answers]
    users = flat.shape[0]
    refused = [[answer.refused for answer in answers] for _ in range(users)]
    texts = [[answer.text for answer in answers] for _ in range(users)]
    answer_rows = [list(rows) for _ in range(users)]
    with adapted.using(flat, alphas):
        scores, written = _scored_and_written(adapted, flat, alphas, rows, base)
        changed = [[n for n, answer in enumerate(user) if answer is not None] for user in written]
        changed_prompts = [[prompts[n] for n in places] for places in changed]
        judged = base.judged(changed_prompts, [[answer for answer in user if answer is not None] for user in written])
    for user, judged_answers in enumerate(judged):
        for n, judged_answer in zip(changed[user], judged_answers, strict=True):
            texts[user][n], refused[user][n] = judged_answer.text, judged_answer.refused
            answer_rows[user][n] = answer_row(adapted, prompts[n], judged_answer.generated)
    unchanged = [1 - len(places) / len(prompts) for places in changed]
    base_logps = [[score.logp for score in user_scores] for user_scores in scores]
    return Refusals(refused, unchanged, texts, base_logps, answer_rows)


def _scored_and_written(
    adapted: AdaptedModel,
    flat: Float[Tensor, "users params"],
    alphas: Float[Tensor, " users"],
    rows: Sequence[Row],
    base: BaseAnswers,
) -> tuple[list[list[GreedyScore]], list[list[Generated | None]]]:
    """Every user's scores of the rows, and the greedy answer to each prompt whose row is not greedy.

    Within `using` these adapters.
    """
    users = flat.shape[0]
    by_user, states = [rows] * users, [base.states] * users
    if adapted.decodes_rows(by_user, base.max_new_tokens):
        return greedy_answers(adapted, by_user, states, base.max_new_tokens)
    scores = adapted.score_greedy(by_user, states)
    changed = [[n for n, score in enumerate(user_scores) if not score.greedy] for user_scores in scores]
    written: list[list[Generated | None]] = [[None] * len(rows) for _ in range(users)]
    for group in _of_similar_counts([len(places) for places in changed]):
        openings = [[greedy_opening(rows[n], scores[user][n]) for n in changed[user]] for user in group]
        prompts = [[rows[n].prompt for n in changed[user]] for user in group]
        with adapted.using(flat[group], alphas[group]):
            answers = continue_answers(adapted, prompts, openings, base.max_new_tokens)
        for user, user_answers in zip(group, answers, strict=True):
            for n, answer in zip(changed[user], user_answers, strict=True):
                written[user][n] = answer
    return scores, written


def _of_similar_counts(counts: Sequence[int]) -> Iterator[list[int]]:
    """Users with a count above zero, in groups within a factor of two: a pass is padded to its largest count."""
    group: list[int] = []
    for user in sorted((user for user, count in enumerate(counts) if count), key=lambda user: (counts[user], user)):
        if group and counts[user] > 2 * counts[group[0]]:
            yield group
            group = []
        group.append(user)
    if group:
        yield group


def greedy_opening(row: Row, score: GreedyScore) -> Ids:
    """The first tokens of the greedy answer: those of the row that it repeats, and the next one."""
    return row.completion[: score.matched] + (() if score.next_token is None else (score.next_token,))


def continue_answers(
    adapted: AdaptedModel, prompts: Sequence[Sequence[Ids]], openings: Sequence[Sequence[Ids]], max_new_tokens: int
) -> list[list[Generated]]:
    """Every user's greedy answers, decoded after their known openings and cut to the limit."""
    ends = adapted.base.eos_ids
    begun = [list(zip(*user, strict=True)) for user in zip(prompts, openings, strict=True)]
    rows = [[prompt + opening for prompt, opening in user if opening[-1] not in ends] for user in begun]
    shortest = min((len(opening) for user in openings for opening in user), default=0)
    room = max(1, max_new_tokens - shortest)
    written = adapted.generate(rows, room) if any(rows) else [[] for _ in rows]
    answers: list[list[Generated]] = []
    for user, user_written in zip(begun, map(iter, written), strict=True):
        answers.append([])
        for _, opening in user:
            rest = Generated((), True) if opening[-1] in ends else next(user_written)
            ids = (opening[:-1] if opening[-1] in ends else opening) + rest.ids
            answers[-1].append(Generated(ids[:max_new_tokens], rest.finished and len(ids) < max_new_tokens))
    return answers


def _digest(prompt: PromptIds) -> str:
    return sha256(json.dumps(prompt).encode()).hexdigest()


def answer_text(adapted: AdaptedModel, answer: Generated) -> str:
    """An answer as text."""
    return str(adapted.base.tokenizer.decode(list(answer.ids), skip_special_tokens=True)).strip()


def answer_row(adapted: AdaptedModel, prompt: PromptIds, answer: Generated) -> Row:
    """An answer as a row to score: with its end token, where it was not cut off."""
    end = adapted.base.eos_ids[:1] if answer.finished else ()
    return Row(prompt, answer.ids + end)
