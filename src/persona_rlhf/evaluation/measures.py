"""What was measured of one user, at the alpha he is released at."""

from __future__ import annotations

from typing import NamedTuple

from persona_rlhf.evaluation.gate import Count
from persona_rlhf.evaluation.personalisation import Accuracy, CleanAccuracy, WinRate
from persona_rlhf.evaluation.retention import Refused
from persona_rlhf.evaluation.samples import Perplexity


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
    answer_perplexity: Perplexity | None
    unchanged: float | None
    """Share of the test probes answered to the token as the base answers them."""

    @property
    def gain(self) -> float | None:
        """What personalisation bought over chance: on noise-free labels where they are known."""
        if self.heldout_clean is not None:
            return self.heldout_clean.adapted - 0.5
        return None if self.heldout_accuracy is None else self.heldout_accuracy.adapted - 0.5
