"""Which probes an adapted model refuses, exactly, and mostly without writing an answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from persona_rlhf.evaluation.classifiers import Asked, SecondJudge
from persona_rlhf.evaluation.guessing import Begun, greedy_answers, opening_of
from persona_rlhf.preferences.tokens import Row
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.generation import Generated
from persona_rlhf.training.trunk import States

_KEPT = 2**28  # bytes of hidden states of rows that were guessed

Judge = Callable[[str], bool]
"""Is this text a refusal? `policy.judges.is_refusal`, or a model behind the same call."""

Prompt = tuple[int, ...]
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
        said: Mapping[Prompt, str] | None = None,
    ) -> None:
        """With a `second` judge, both must call an answer a refusal; he is told what the prompts `said` as texts."""
        self.judge, self.max_new_tokens = judge, max_new_tokens
        self._second, self._said = second, said or {}
        self._adapted = adapted
        self._known: dict[Prompt, BaseAnswer] = {}
        self.states: dict[Row, Float[Tensor, "_tokens hidden"]] = {}
        """Of each answer what lies below the adapted layers: the same for every user."""
        self._guessed: dict[Row, Float[Tensor, "_tokens hidden"]] = {}

    def of(self, prompts: Sequence[Prompt]) -> list[BaseAnswer]:
        """The answers to these prompts; those not asked before are written now."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if new:
            with self._adapted.using(None):
                (written,) = self._adapted.generate([new], self.max_new_tokens)
            texts = [answer_text(self._adapted, answer) for answer in written]
            judged = self.judged(new, texts)
            for prompt, answer, text, refused in zip(new, written, texts, judged, strict=True):
                self._known[prompt] = BaseAnswer(answer_row(self._adapted, prompt, answer), refused, text)
            self.states.update(self._adapted.below([self._known[prompt].row for prompt in new]))
        return [self._known[prompt] for prompt in prompts]

    def below(self, rows: Sequence[Row]) -> States:
        """What lies below the adapted layers of any rows; kept for other users as long as it is little."""
        new = [row for row in dict.fromkeys(rows) if row not in self._guessed]
        found = self._adapted.below(new)
        known = {row: self._guessed[row] for row in rows if row in self._guessed}
        if self._adapted.below_bytes([*self._guessed, *new]) <= _KEPT:
            self._guessed.update(found)
        return {**known, **found}

    def judged(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[bool]:
        """Whether each answer is a refusal; the second judge is asked only where the first says so."""
        verdicts = [self.judge(text) for text in texts]
        if self._second is not None:
            places = [n for n, refused in enumerate(verdicts) if refused]
            decode = self._adapted.base.tokenizer.decode
            asked = [Asked(self._said.get(prompts[n]) or str(decode(list(prompts[n]))), texts[n]) for n in places]
            for n, agreed in zip(places, self._second(asked), strict=True):
                verdicts[n] = agreed
        return verdicts

    def refused(self, prompts: Sequence[Prompt]) -> list[bool]:
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
    prompts: Sequence[Prompt],
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
        scores = adapted.read([[answer.row for answer in answers]] * flat.shape[0], [base.states] * flat.shape[0])
    refused = [[answer.refused for answer in answers] for _ in scores]
    texts = [[answer.text for answer in answers] for _ in scores]
    changed = [[n for n, score in enumerate(own) if not score.greedy] for own in scores]
    asked = [
        [Begun(prompts[n], opening_of(answers[n].row, own[n])) for n in places]
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


def answer_row(adapted: AdaptedModel, prompt: Prompt, answer: Generated) -> Row:
    """An answer as a row to score: with its end token, where it was not cut off."""
    end = adapted.base.eos_ids[:1] if answer.finished else ()
    return Row(prompt, answer.ids + end)
