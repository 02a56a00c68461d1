"""What was measured of one user, at the alpha he is released at."""

from __future__ import annotations

from typing import NamedTuple

from persona_rlhf.evaluation.gate import Count


class Accuracy(NamedTuple):
    """Shares of held-out pairs ranked as the user ranked them; the 95% interval is of `adapted`."""

    reference_free: float
    adapted: float
    n: int
    low: float
    high: float


class CleanAccuracy(NamedTuple):
    """The share of held-out pairs ranked as the noise-free utility ranks them, among those where it is known."""

    adapted: float
    n: int


class WinRate(NamedTuple):
    """The share of prompts on which the adapted answer beats the base's, ties counting half; 95% interval."""

    value: float
    n: int
    low: float
    high: float


class Refused(NamedTuple):
    """Refusals among n harmless prompts, by the adapted model and by its base."""

    n: int
    refused: int
    base_refused: int


class Perplexity(NamedTuple):
    """The base's perplexity of sampled answers, exp(-sum log p / tokens): of the adapted model's, and of its own.

    What reads as English to the base stays near its perplexity of its own answers.
    """

    adapted: float
    base: float


class Measures(NamedTuple):
    """None where there was nothing to measure, or nothing to measure it with."""

    heldout_accuracy: Accuracy | None
    heldout_clean: CleanAccuracy | None
    win_rate: WinRate | None
    over_refusal: Refused | None
    ordinary: Refused | None
    twins: Refused | None
    test_pooled: Count | None
    test_categories: dict[str, Count]
    test_shift: Refused | None
    """Refusals on test probes of topics that the base never saw: a shift of the distribution, not certified."""
    answer_perplexity: Perplexity | None
    unchanged: float | None
    """Share of the test probes answered to the token as the base answers them."""

    @property
    def gain(self) -> float | None:
        """What personalisation bought over chance: on noise-free labels where they are known."""
        if self.heldout_clean is not None:
            return self.heldout_clean.adapted - 0.5
        return None if self.heldout_accuracy is None else self.heldout_accuracy.adapted - 0.5
