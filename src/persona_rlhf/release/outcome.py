"""One user's line, put together from what training, gate and measurement say of him."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, NamedTuple

from persona_rlhf.evaluation.gate import POOLED, Verdict
from persona_rlhf.evaluation.measures import Measures
from persona_rlhf.preferences.identity import slug
from persona_rlhf.release.results import Dual, PairCounts, Result, Tested
from persona_rlhf.training.engine import TrainedUser


class Written(NamedTuple):
    """Where a released adapter lies within the run, and the sha256 of its manifest."""

    path: str
    manifest_sha256: str


def skipped(user_id: str, reason: str, pairs: PairCounts) -> Result:
    """The line of a user who was not trained."""
    return Result(user_id=user_id, slug=slug(user_id), status="skipped", reason=reason, pairs=pairs)


def untrained(user_id: str, pairs: PairCounts, fault: str | None, against_policy: int = 0) -> Result:
    """The line of a user without a pair to train on: because of a `fault` of ours, or because none is left."""
    line = replace(skipped(user_id, fault or "no pair to train on is left", pairs), alarm=against_policy > 0)
    return replace(line, status="failed") if fault else line


def outcome(
    trained: TrainedUser,
    pairs: PairCounts,
    verdict: Verdict | None,
    measures: Measures | None,
    written: Written | None,
    tier_one: Collection[str],
    against_policy: int,
) -> Result:
    """The line of a trained user; `verdict` is None where training failed, `written` where he is held back.

    `tier_one` are the categories that the gate pools. The alarm rings where the screen found pairs of his that teach
    against the policy (`against_policy` of them), or the gate did not pass the whole adapter. A dual variable is no
    sign of either: the constraint holds before it rises (docs/explanation/promise.md).
    """
    assert (verdict is not None and verdict.admitted) == (written is not None), trained.user_id
    duals = {name: Dual(*trace) for name, trace in trained.duals.items()}
    known: dict[str, Any] = {
        "user_id": trained.user_id,
        "slug": slug(trained.user_id),
        "pairs": pairs,
        "duals": duals,
        "steps": trained.steps,
        "seconds": trained.seconds,
    }
    if verdict is None:
        return Result(status="failed", reason=trained.reason, alarm=against_policy > 0, **known)
    counts = verdict.categories
    result = Result(
        status="held_back" if written is None else "released",
        reason=verdict.reason,
        alpha=verdict.alpha,
        tier_one={POOLED: verdict.pooled} | {name: count for name, count in counts.items() if name in tier_one},
        tier_two={name: count for name, count in counts.items() if name not in tier_one},
        looks=verdict.looks,
        clusters=verdict.clusters,
        alarm=against_policy > 0 or not verdict.looks[0].passed,
        path=written.path if written else None,
        manifest_sha256=written.manifest_sha256 if written else None,
        **known,
    )
    return result if measures is None else measured(result, measures)


def measured(result: Result, measures: Measures) -> Result:
    """The line with these measurements in it; what the gate decided stays."""
    tested = measures.test_pooled
    return replace(
        result,
        heldout_accuracy=measures.heldout_accuracy,
        heldout_clean=measures.heldout_clean,
        win_rate=measures.win_rate,
        over_refusal=measures.over_refusal,
        ordinary=measures.ordinary,
        twins=measures.twins,
        test=None if tested is None else Tested(tested, measures.test_categories, measures.test_shift),
        answer_perplexity=measures.answer_perplexity,
        unchanged=measures.unchanged,
        tax=measures.tax,
        requirements=dict(measures.requirements),
    )
