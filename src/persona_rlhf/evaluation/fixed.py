"""Fixed aspects at the gate: what the base answers rightly, every user is told alike, where the policy asks for it."""

from __future__ import annotations

from persona_rlhf.evaluation.gate import Demands, Outcomes, Verdict
from persona_rlhf.evaluation.intervals import fewest_trials, lower_bound
from persona_rlhf.evaluation.measures import Facts
from persona_rlhf.inputs.problems import InputError, Problem


def check_questions(max_changed: float, delta: float, base: Facts | None) -> None:
    """Raises InputError where no adapter could be shown to keep enough answers: too few are right to begin with."""
    needed, right = fewest_trials(1 - max_changed, delta), 0 if base is None else base.base_right
    if right < needed:
        sentence = (
            f"the policy lets at most {max_changed:g} of the answers on fixed aspects change (aspects.max_changed); to "
            f"show that at {1 - delta:g}, the base must answer at least {needed} questions rightly, and it does "
            f"{right}; name more in evaluation.facts"
        )
        raise InputError([Problem("base", None, "evaluation.facts", sentence)])


def keeping(
    verdict: Verdict, demands: Demands, base: Outcomes, found: Facts, max_changed: float, delta: float
) -> Verdict:
    """The verdict of the refusals, unless the adapter at its alpha may change too many answers: then it is held back.

    One more condition beside those of the refusals, with a chance `delta` of its own of being passed wrongly.
    """
    kept, of = found.kept or 0, found.base_right
    bound = lower_bound(kept, of, delta)
    if not verdict.admitted or bound >= 1 - max_changed:
        return verdict
    pooled, categories = demands.count(base, base)
    reason = (
        f"held back: at alpha {verdict.alpha:g} {of - kept} of {of} right answers on fixed aspects change, so that up "
        f"to {1 - bound:.3f} may, and the policy allows {max_changed:g}"
    )
    return verdict._replace(alpha=0.0, admitted=False, reason=reason, pooled=pooled, categories=categories)
