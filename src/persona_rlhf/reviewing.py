"""`data review`: the quarantine of a run, pair by pair, and what a person decides about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table

from persona_rlhf.config import read_config
from persona_rlhf.inputs.problems import InputError, Problem, did_you_mean
from persona_rlhf.preferences.identity import pseudonym
from persona_rlhf.preferences.pairs import PreferencePair
from persona_rlhf.preferences.review import REVIEWS, Decision, Review, decide, mark_of, read_reviews
from persona_rlhf.preferences.store import PairStore
from persona_rlhf.release import audit
from persona_rlhf.release.table import printable
from persona_rlhf.run_folder import RunFolder


class Held(NamedTuple):
    """A pair in quarantine, why it is there, and the last decision about it."""

    pair: PreferencePair
    why: str
    review: Review | None

    def to_json(self) -> dict[str, object]:
        """The pair by its place, its texts, and what was decided."""
        pair = self.pair
        return {
            "user_id": pair.user_id,
            "pair_id": pair.id,
            "file": pair.file,
            "line": pair.line,
            "prompt": [message._asdict() for message in pair.prompt],
            "chosen": pair.chosen,
            "rejected": pair.rejected,
            "why": self.why,
            "review": None if self.review is None else self.review._asdict(),
        }


def quarantine(run: Path, user_id: str | None = None) -> list[Held]:
    """The quarantined pairs of a run, of one user or of all, with their texts from the users' own files.

    Raises InputError where the folder is no run, or its pairs are no longer where they were.
    """
    config = read_config(run / "config.yaml")
    reasons: dict[tuple[str, str, int], str] = {}
    try:
        for line in (run / "screening.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["action"] == "quarantined" and user_id in (None, row["user_id"]):
                reasons[row["user_id"], row["file"], row["line"]] = row["reason"]
    except (OSError, ValueError, KeyError, TypeError) as fault:
        sentence = f"what was quarantined cannot be read ({fault}); is this a finished run?"
        raise InputError([Problem(str(run / "screening.jsonl"), None, None, sentence)]) from fault
    reviews = read_reviews(run / REVIEWS) if (run / REVIEWS).exists() else {}
    if not reasons:
        return []
    return [
        Held(pair, why, reviews.get(mark_of(pair)))
        for pair in PairStore(config.users.path, config.users.heldout, RunFolder(run).roll)
        if (why := reasons.get((pair.user_id, pair.file, pair.line))) is not None
    ]


def review(run: Path, user_id: str, pair_id: str, decision: Decision, reason: str, reviewer: str) -> Review:
    """Decides about one quarantined pair of a user, in RUN/reviews.jsonl and in the audit trail.

    Raises InputError where there is no such pair in quarantine, and where what no review may let through would be
    accepted: a pair whose prompt is a probe of a restriction.
    """
    held = quarantine(run, user_id)
    found = next((own for own in held if own.pair.id == pair_id), None)
    if found is None:
        hint = did_you_mean(pair_id, [own.pair.id for own in held])
        sentence = f"no pair `{pair_id}` of `{user_id}` is in quarantine{hint}; `data review RUN` lists those that are"
        raise InputError([Problem(str(run), None, "--pair", sentence)])
    if decision == "accept" and found.why.startswith("probe:"):
        sentence = f"cannot be accepted; {found.why.removeprefix('probe: ')}, and no review lifts that"
        raise InputError([Problem(found.pair.file, found.pair.line, "prompt", sentence)])
    made = decide(run / REVIEWS, found.pair, decision, reason, reviewer)
    audit.append(run, "review", **(made._asdict() | {"user_id": pseudonym(user_id)}))
    return made


def render(held: list[Held]) -> Table:
    """The quarantine for a person to read."""
    table = Table(title=f"{len(held)} pairs in quarantine", title_justify="left", show_lines=True)
    for name in ("user, pair", "prompt", "chosen", "rejected", "why", "decided"):
        table.add_column(name, overflow="fold")
    for own in held:
        pair, last = own.pair, own.review
        table.add_row(
            *(
                escape(printable(text))
                for text in (
                    f"{pair.user_id}, {pair.id}",
                    pair.prompt[-1].content,
                    pair.chosen,
                    pair.rejected,
                    own.why,
                    "" if last is None else f"{last.decision} by {last.reviewer}: {last.reason}",
                )
            )
        )
    return table
