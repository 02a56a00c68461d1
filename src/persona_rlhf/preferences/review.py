"""What a person decided about quarantined pairs: a file of decisions, with reasons, that a later run is given."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.preferences.pairs import PreferencePair

REVIEWS = "reviews.jsonl"
Decision = Literal["accept", "reject"]


class Review(NamedTuple):
    """One decision: of whose pair, which one (`mark_of`), what, why, by whom and when (UTC); no text of the pair."""

    user_id: str
    pair: str
    decision: Decision
    reason: str
    reviewer: str
    at: str


def mark_of(pair: PreferencePair) -> str:
    """What a pair is called in reviews: a hash of whose it is and of all its texts, so that no other pair passes."""
    told = [pair.user_id, pair.prompt, pair.chosen, pair.rejected]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def decide(file: Path, pair: PreferencePair, decision: Decision, reason: str, reviewer: str) -> Review:
    """Adds a decision to the file; on the disk when this returns. A later one about the same pair goes before it."""
    at = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    review = Review(pair.user_id, mark_of(pair), decision, reason, reviewer, at)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(review._asdict()) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    return review


def read_reviews(file: Path) -> dict[str, Review]:
    """The last decision about each pair, by its mark. Raises InputError naming every line that is none."""
    found: dict[str, Review] = {}
    problems: list[Problem] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            review = Review(**row)
            sound = all(isinstance(value, str) for value in review) and review.decision in get_args(Decision)
        except (json.JSONDecodeError, TypeError):
            sound = False
        if sound:
            found[review.pair] = review
        else:
            sentence = f"a line is an object with texts {', '.join(Review._fields)}, `decision` being accept or reject"
            problems.append(Problem(str(file), number, None, sentence))
    if problems:
        raise InputError(problems)
    return found


def accepted_by(reviews: Mapping[str, Review], pair: PreferencePair) -> Review | None:
    """The decision that lets a quarantined pair be trained on; None where there is none."""
    review = reviews.get(mark_of(pair)) if reviews else None
    return review if review is not None and review.decision == "accept" else None
