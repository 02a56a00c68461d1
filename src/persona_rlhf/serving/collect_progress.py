"""The user's numbers and the state of the user's assistant, as the feedback page shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from persona_rlhf.data.choice_ledger import FAULT, FEW, HARM, SAFETY, Choice, ChoiceLedger, Update
from persona_rlhf.release.earlier_adapters import (
    BASE,
    NotRestoredError,
    adapter_name,
    other_adapter,
    restore,
    result_of,
)
from persona_rlhf.serving.answer_sampler import AnswerSampler
from persona_rlhf.serving.collect_forms import PageError

StopAdvice = Callable[[Sequence[Choice]], bool]
"""Whether more answers would change little, from a user's choices."""

CAUSES = {
    HARM: "the new one was worse by your choices, or no longer wrote like the common model",
    SAFETY: "the new one did not pass the safety test",
    FEW: "too few of your choices could be used",
    FAULT: "the training failed, and the operator sees why",
}
"""Causes for which no new adapter came of a training, in a user's words."""

RECEIVED = {
    "prior": "Answers come from an assistant that learnt from many people, as your own did not pass a test of quality.",
    "held_back": "Answers come from the common model, as your own assistant did not pass a test of safety or quality.",
}
"""What a user receives whose own adapter is not released, by the status of the user, in the user's words."""


def never(_: Sequence[Choice]) -> bool:
    """Advice where nothing tells when to stop."""
    return False


class OtherAssistant(NamedTuple):
    """The adapter that the user can change to: its name, whether it is the newer one, and whether it is the base."""

    adapter: str
    newer: bool
    base: bool


class UserProgress:
    """Numbers of choices, updates and advice of each user of a run."""

    def __init__(
        self,
        run: Path,
        ledger: ChoiceLedger,
        sampler: AnswerSampler,
        first_update: int,
        automatic: bool,
        advice: StopAdvice = never,
    ) -> None:
        """`first_update` choices are named as enough for an update, which begins by itself where it is `automatic`."""
        self._run, self._ledger, self._sampler, self._advice = run, ledger, sampler, advice
        self._first_update, self._automatic = first_update, automatic

    def content(self, user_id: str) -> dict[str, Any]:
        """The fields of the page's part on progress."""
        choices, updates = self._ledger.choices(user_id), self._ledger.updates(user_id)
        adapter = self._sampler.adapter(user_id)
        weights, result = None if adapter is None else adapter.weights_sha256, self._sampler.result(user_id)
        since = [choice for choice in choices if weights in (choice.left_by, choice.right_by)]
        trainings = [update for update in updates if update.event != "restored"]
        last = trainings[-1] if trainings else None
        return {
            "answered": len(choices),
            "preferred": sum(choice.preferred is not None for choice in choices),
            "first_update": self._first_update,
            "automatic": self._automatic,
            "adapted": weights is not None,
            "updated": weights is not None and bool(choices) and not since,
            "received": "" if result is None else RECEIVED.get(result.status, ""),
            "since": sum(choice.preferred is not None for choice in since),
            "training": last is not None and last.event == "begun",
            "cause": _cause(last, choices),
            "other": self._other(user_id, updates),
            "enough": self._advice(choices),
        }

    def _other(self, user_id: str, updates: Sequence[Update]) -> OtherAssistant | None:
        row = other_adapter(self._run, user_id)
        if row is None:
            return None
        released = [update.adapter for update in updates if update.event == "released"]
        return OtherAssistant(row.adapter, released[-1:] == [row.adapter], row.adapter == BASE)


def change_adapter(run: Path, ledger: ChoiceLedger, user_id: str, adapter: str) -> None:
    """Makes another adapter that is set aside the user's, and notes it in the ledger; nothing where it is already so.

    Raises PageError (403, 409) for a user without consent, and where it may not come back.
    """
    if ledger.consent(user_id) is None:
        raise PageError(403, "Your data was deleted, so nothing is changed.")
    if adapter_name(result_of(run, user_id)) == adapter:
        return
    try:
        restore(run, user_id, adapter)
    except NotRestoredError:
        sentence = "That assistant may not be used any more, so nothing was changed. The operator can see why."
        raise PageError(409, sentence) from None
    ledger.record_update(user_id, "restored", adapter)


def _cause(last: Update | None, choices: Sequence[Choice]) -> str:
    """The cause why the last training brought no new adapter, in words, until the next choice; else ""."""
    if last is None or last.event not in ("not_released", "failed") or any(one.at > last.at for one in choices):
        return ""
    return CAUSES[last.detail]
