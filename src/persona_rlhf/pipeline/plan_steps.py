"""Times of steps for `plan`, fitted and extrapolated: of training, and of the decoding of answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, linear_regression
from time import perf_counter
from typing import NamedTuple

from torch import Tensor

from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.row_decoding import RowCache


class StepTime(NamedTuple):
    """Seconds of a step of a cohort: a fixed part, and a part for each computed token."""

    fixed: float
    each: float

    def of(self, tokens: int) -> float:
        return self.fixed + self.each * tokens


def fit(sizes: Sequence[int], seconds: Sequence[float]) -> StepTime:
    """Least squares with parts of at least zero."""
    each, fixed = linear_regression(sizes, seconds) if len(set(sizes)) > 1 else (0.0, -1.0)
    if fixed < 0:
        return StepTime(0.0, sum(seconds) / sum(sizes))
    return StepTime(fixed, each) if each >= 0 else StepTime(fmean(seconds), 0.0)


class SampledTime(NamedTuple):
    """Seconds of work on a sample of prompts: of each decoding step, and of all else.

    rows: of each step, each of which computes one token a row
    """

    rows: list[int]
    seconds: list[float]
    rest: float

    def of_all(self, share: float, most_rows: int) -> float:
        """Seconds of the same work on all prompts, where the sample is this share of them; see `decoding`."""
        return self.rest / share + self.decoding(share, most_rows)

    def decoding(self, share: float, most_rows: int) -> float:
        """Seconds of decoding the answers to all prompts. The tokens beyond the sample's come in steps of `most_rows`.

        A step of few rows costs little less than a large one. So the steps of a sample are not multiplied.
        """
        if not self.rows:
            return 0.0
        step, tokens = fit(self.rows, self.seconds), sum(self.rows)
        more = tokens / share - tokens
        return step.fixed * (len(self.rows) + more / most_rows) + step.each * (tokens + more)


def timed(adapted: AdaptedModel, work: Callable[[], object]) -> SampledTime:
    """The time of `work`, with the decoding steps of the model in it apart."""
    rows, seconds, step = list[int](), list[float](), adapted.step

    def timed_step(
        tokens: Sequence[int], cache: RowCache, slots: Sequence[int], rows_per_user: Sequence[int]
    ) -> Tensor:
        clock = perf_counter()
        logits = step(tokens, cache, slots, rows_per_user)
        seconds.append(perf_counter() - clock)
        rows.append(len(tokens))
        return logits

    adapted.step = timed_step  # type: ignore[method-assign]
    clock = perf_counter()
    try:
        work()
    finally:
        adapted.step = step  # type: ignore[method-assign]
    return SampledTime(rows, seconds, perf_counter() - clock - sum(seconds))
