"""Answers of every user's adapter, decoded from the keys and values of the passes that began them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.base import Base
from persona_rlhf.models.generation import Generated
from persona_rlhf.models.model_split import HiddenStates, OfLogits
from persona_rlhf.models.packing import EMPTY, Batch, RowPlace
from persona_rlhf.models.passes import plan_passes
from persona_rlhf.models.row_decoding import (
    BegunAnswer,
    BegunRows,
    CachedTokens,
    ChooseToken,
    Decoding,
    LayerTokens,
    RowCache,
    token_chooser,
)
from persona_rlhf.models.scores import GreedyScore, greedy_scores, logps_and_greedy


@runtime_checkable  # for beartype in the tests
class RowModel(Protocol):
    """The part of `AdaptedModel` that decoding needs; its methods are explained there."""

    base: Base
    tokens_per_pass: int
    tokens_per_generation: int
    on_rows: Callable[[float, int], None]

    def batch(self, rows: Sequence[Row], users: int) -> Batch: ...

    def logits(
        self, batch: Batch, states: Sequence[HiddenStates] = (), passed: list[LayerTokens] | None = None
    ) -> Float[Tensor, "tokens vocabulary"]: ...

    def by_token(
        self,
        batch: Batch,
        function: OfLogits,
        states: Sequence[HiddenStates] = (),
        passed: list[LayerTokens] | None = None,
    ) -> list[Tensor]: ...

    def cached_tokens(
        self, places: Sequence[RowPlace], lengths: Sequence[int], passed: Sequence[LayerTokens], from_states: bool
    ) -> list[CachedTokens]: ...

    def step(
        self, tokens: Sequence[int], cache: RowCache, slots: Sequence[int], rows_per_user: Sequence[int]
    ) -> Float[Tensor, "rows vocabulary"]: ...


@torch.no_grad()
def greedy_answers(
    model: RowModel, rows: Sequence[Sequence[Row]], states: Sequence[HiddenStates], max_new_tokens: int
) -> tuple[list[list[GreedyScore]], list[list[Generated | None]]]:
    """Scores as of `AdaptedModel.score_greedy`, and the greedy answer where the row is not one.

    An answer is decoded from the keys and values of its scored tokens, if `AdaptedModel.decodes_rows` says so.
    """
    users = len(rows)
    scores: list[list[GreedyScore | None]] = [[None] * len(user_rows) for user_rows in rows]
    settings = _decoding(model, rows, max_new_tokens)
    written: dict[tuple[int, int], Generated] = {}

    def begun() -> Iterator[BegunRows]:
        for pass_rows in plan_passes(rows, model.tokens_per_pass):
            batch_rows = [EMPTY if n is None else rows[user][n] for user, n in pass_rows]
            batch, passed = model.batch(batch_rows, users), list[LayerTokens]()
            of_rows = greedy_scores(batch, batch_rows, *model.by_token(batch, logps_and_greedy, states, passed))
            answers, places = list[BegunAnswer](), list[RowPlace]()
            for place in batch.row_places:
                (user, n), score = pass_rows[place.number], of_rows[place.number]
                assert n is not None
                scores[user][n] = score
                if score.next_token is not None:
                    ids = [*place.row.completion[: score.matched], score.next_token]
                    answer = BegunAnswer(user, n, len(place.row.prompt), ids)
                    if settings.over(answer):
                        written[user, n] = settings.generated(answer)
                    else:
                        answers.append(answer)
                        places.append(place)
            model.on_rows(len(batch.row_places), len(answers))
            if answers:
                lengths = [answer.cached for answer in answers]
                yield BegunRows(answers, model.cached_tokens(places, lengths, passed, bool(states)))

    model.on_rows(0.0, sum(map(len, rows)))
    written |= _decoded(model, settings, begun(), token_chooser(0.0, 0, max_new_tokens))
    whole = [[score for score in user_scores if score is not None] for user_scores in scores]
    return whole, [[written.get((user, n)) for n in range(len(rows[user]))] for user in range(users)]


def _decoded(
    model: RowModel, settings: Decoding, begun: Iterator[BegunRows], choose: ChooseToken
) -> dict[tuple[int, int], Generated]:
    """The answers of `Decoding.run`; each step is reported to `AdaptedModel.on_rows`."""
    reported = 0.0

    def step(tokens: Sequence[int], cache: RowCache, places: Sequence[int], counts: Sequence[int]) -> Tensor:
        nonlocal reported
        part = len(tokens) / settings.max_new_tokens
        reported += part
        model.on_rows(part, 0)
        return model.step(tokens, cache, places, counts)

    written = settings.run(begun, step, choose, model.base.device)
    model.on_rows(len(written) - reported, 0)
    return written


def _decoding(model: RowModel, rows: Sequence[Sequence[Row]], max_new_tokens: int) -> Decoding:
    capacity = max(max(row.length, len(row.prompt) + max_new_tokens) for user in rows for row in user)
    most = max(1, model.tokens_per_generation // capacity)
    return Decoding(len(rows), model.base.eos_ids, model.base.context, max_new_tokens, capacity, most)


def decode_answers(
    model: RowModel,
    prompts: Sequence[Sequence[tuple[int, ...]]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[list[Generated]]:
    """Answers as of `AdaptedModel.generate`, without padding."""
    rows = [[Row(prompt, (0,)) for prompt in user_prompts] for user_prompts in prompts]
    settings = _decoding(model, rows, max_new_tokens)
    choose = token_chooser(temperature, seed, max_new_tokens)
    written: dict[tuple[int, int], Generated] = {}

    def begun() -> Iterator[BegunRows]:
        for pass_rows in plan_passes(rows, model.tokens_per_pass):
            batch = model.batch([EMPTY if n is None else rows[user][n] for user, n in pass_rows], len(rows))
            passed = list[LayerTokens]()
            logits = model.logits(batch, (), passed)
            answers = [BegunAnswer(user, n, len(prompts[user][n]), []) for user, n in pass_rows if n is not None]
            for answer, token in zip(answers, choose(logits.float(), answers), strict=True):
                answer.ids.append(token)
            written.update(((a.user, a.number), settings.generated(a)) for a in answers if settings.over(a))
            left = [n for n, answer in enumerate(answers) if not settings.over(answer)]
            model.on_rows(len(answers) - len(left), 0)
            if left:
                lengths = [answers[n].cached for n in left]
                places = [batch.row_places[n] for n in left]
                yield BegunRows([answers[n] for n in left], model.cached_tokens(places, lengths, passed, False))

    model.on_rows(0.0, sum(map(len, rows)))
    written |= _decoded(model, settings, begun(), choose)
    return [[written[user, n] for n in range(len(user_prompts))] for user, user_prompts in enumerate(prompts)]


def stepped_logits(model: RowModel, rows: Sequence[Row]) -> Float[Tensor, "tokens vocabulary"]:
    """Logits as of `AdaptedModel.logits`, row by row: of the first token by a pass, of each later one by a step."""
    passed = list[LayerTokens]()
    batch = model.batch([row._replace(completion=row.completion[:1]) for row in rows], 1)
    logits = [[first] for first in model.logits(batch, (), passed)]
    cache = RowCache(max(row.length for row in rows), model.base.device)
    lengths = [len(row.prompt) for row in rows]
    slots = cache.admit(model.cached_tokens(batch.row_places, lengths, passed, False), lengths, [])
    for place in range(max(len(row.completion) for row in rows) - 1):
        left = [n for n, row in enumerate(rows) if len(row.completion) > place + 1]
        tokens = [rows[n].completion[place] for n in left]
        for n, following in zip(left, model.step(tokens, cache, [slots[n] for n in left], [len(left)]), strict=True):
            logits[n].append(following)
    return torch.stack([each for of_row in logits for each in of_row])
