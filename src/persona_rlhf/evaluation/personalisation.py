"""Did the adapter learn the user's taste: on pairs held out, and in the text it writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from persona_rlhf.evaluation.intervals import interval
from persona_rlhf.evaluation.measures import Accuracy, CleanAccuracy, WinRate
from persona_rlhf.preferences.tokens import PairRow, Row, both_rows
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.scores import Score


class PairScores(NamedTuple):
    """Both sides of a held-out pair, scored under one model."""

    chosen: Score
    rejected: Score


def score_pairs(adapted: AdaptedModel, pairs: Sequence[Sequence[PairRow]]) -> list[list[PairScores]]:
    """Scores every user's pairs under the adapters that are switched on; without any, see `score_pairs_of_base`."""
    scores = adapted.score([both_rows(own) for own in pairs])
    return [[PairScores(c, r) for c, r in zip(own[::2], own[1::2], strict=True)] for own in scores]


def score_pairs_of_base(adapted: AdaptedModel, pairs: Sequence[Sequence[PairRow]]) -> list[list[PairScores]]:
    """Scores every user's pairs under the base alone; a row that users share is scored once."""
    rows: list[Row] = list(dict.fromkeys(both_rows(pair for own in pairs for pair in own)))
    with adapted.using(None):
        (scores,) = adapted.score([rows])
    known = dict(zip(rows, scores, strict=True))
    return [[PairScores(known[pair.chosen], known[pair.rejected]) for pair in own] for own in pairs]


_ROUNDING = 1e-4  # nats; the same row scored in passes of another shape differs by less in float32


def _points(value: float, tie: float = 0.0) -> float:
    """1 above zero, 0 below, half at a tie: an adapter that changes nothing is at chance, not at fault."""
    return 0.5 if abs(value) <= tie else float(value > 0)


def margin(base: PairScores, adapted: PairScores) -> float:
    """The reward margin over beta: log(pi/pi_ref) of the chosen answer less that of the rejected, in nats.

    Rafailov et al. 2023, the implicit reward of section 4; beta > 0 cannot change its sign.
    """
    return (adapted.chosen.logp - base.chosen.logp) - (adapted.rejected.logp - base.rejected.logp)


def heldout_accuracy(base: Sequence[PairScores], adapted: Sequence[PairScores]) -> Accuracy | None:
    """Held-out accuracy of one user; None where he has no held-out pair.

    `reference_free`: the base alone gives the chosen answer the higher log-probability per token. `adapted`: the
    reward margin is positive.
    """
    n = len(base)
    if n == 0:
        return None
    alone = sum(
        _points(s.chosen.logp / max(1, s.chosen.tokens) - s.rejected.logp / max(1, s.rejected.tokens)) for s in base
    )
    right = sum(_points(margin(b, a), _ROUNDING) for b, a in zip(base, adapted, strict=True))
    return Accuracy(alone / n, right / n, n, *interval(right, n))


def clean_accuracy(
    pairs: Sequence[PairRow], base: Sequence[PairScores], adapted: Sequence[PairScores]
) -> CleanAccuracy | None:
    """Accuracy against noise-free labels: where the user's own label was noise, the other answer is the better one."""
    points = [
        _points(margin(b, a) if row.pair.clean_choice else -margin(b, a), _ROUNDING)
        for row, b, a in zip(pairs, base, adapted, strict=True)
        if row.pair.clean_choice is not None
    ]
    return CleanAccuracy(sum(points) / len(points), len(points)) if points else None


def win_rate(utility: Callable[[str], float], answers: Sequence[str], base_answers: Sequence[str]) -> WinRate | None:
    """How often the utility prefers the adapted answer over the base's to the same prompt; None without a prompt."""
    n = len(answers)
    if n == 0:
        return None
    won = sum(_points(utility(own) - utility(other)) for own, other in zip(answers, base_answers, strict=True))
    return WinRate(won / n, n, *interval(won, n))
