"""`data screen`, `data review`, `data draft`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from persona_rlhf.common.errors import InputError, Problem, did_you_mean
from persona_rlhf.common.files import atomic_write, pseudonym
from persona_rlhf.config.experiment import Config, read_run_config
from persona_rlhf.data.feedback import REVIEWS, Decision, Review, decide, mark_of, read_reviews
from persona_rlhf.data.pairs import Message, PreferencePair
from persona_rlhf.data.store import PairStore
from persona_rlhf.data.tokenize import prompt_ids
from persona_rlhf.evaluation.prompt_sets import read_ordinary, some
from persona_rlhf.evaluation.refusals import answer_text
from persona_rlhf.evaluation.request_screens import CalibratedScreen, screens_table
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import load_base
from persona_rlhf.pipeline.inputs import RunInputs
from persona_rlhf.pipeline.prepare import chunks_of, prepare, prepare_users
from persona_rlhf.pipeline.run_dir import RunDir
from persona_rlhf.policy.enforcement import post_check, readable_tastes
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.policy.policy import Policy
from persona_rlhf.policy.properties import READABLE, distance
from persona_rlhf.policy.rules import Preference
from persona_rlhf.release import integrity
from persona_rlhf.release.render import printable

# ----------------------------------------------------------------------------------------------------
# Pairs for a user who has judged nothing yet: the base answers, and his stated tastes tell which answer he would like.
#
# Tier three says in words what pairs say in examples. For each prompt the base is sampled several times; the answer
# that
# is nearest to what the user wished for is chosen, the farthest rejected. Answers that break a requirement, and
# prompts
# that the base refuses, are left out: tastes stay inside the tiers above them. The pairs are ordinary ones. He can be
# trained on them, and they can be corrected before; each names the tastes it was drafted from.
# ----------------------------------------------------------------------------------------------------

ANSWERS = 8  # of the base to a prompt
_PROMPTS = 16  # answered in one pass


class Drafted(NamedTuple):
    """What was drafted: pairs and the prompts tried for them, the tastes they came from, and those that only the user
    can judge by."""

    user_id: str
    pairs: int
    prompts: int
    tastes: list[str]
    unread: list[str]
    path: Path

    def to_json(self) -> dict[str, Any]:
        """As an object of plain JSON values."""
        return {**self._asdict(), "path": str(self.path)}

    def sentences(self) -> Iterator[str]:
        """What to tell people."""
        yield f"{self.pairs} pairs drafted from {', '.join(self.tastes)} on {self.prompts} prompts: {self.path}"
        if self.unread:
            yield f"  Only the user can judge by {', '.join(self.unread)}."


def draft(config: Config, user_id: str, out: Path, pairs: int) -> Drafted:
    """Writes up to `pairs` pairs of a user to `out` (JSON lines), on prompts of `evaluation.ordinary`.

    Raises InputError where no program can read his tastes, where there are no prompts, where no two answers of the base
    differ by them, and where `out` exists.
    """
    policy = Policy.read(config.policy.documents)
    tastes = readable_tastes(policy, user_id)
    texts = read_ordinary(Path(config.evaluation.ordinary)) if config.evaluation.ordinary else []
    _check(policy, user_id, tastes, texts, out)
    adapted = AdaptedModel(load_base(config.base), config.lora)
    unread = [taste.id for taste in policy.for_user(user_id).preferences if taste not in tastes]
    tried = some(texts, len(texts))[::-1]  # the first ones are asked of every user when he is measured
    rows = list(islice(_drafts(config, policy, adapted, user_id, tastes, tried), pairs))
    if not rows:
        sentence = f"no two answers of the base differ by the tastes of `{user_id}`; state others, or judge pairs"
        raise InputError([Problem(str(out), None, "--user", sentence)])
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, (json.dumps(row, ensure_ascii=False) + "\n" for _, row in rows))
    return Drafted(user_id, len(rows), rows[-1][0] + 1, [taste.id for taste in tastes], unread, out)


def _check(policy: Policy, user_id: str, tastes: list[Preference], texts: list[str], out: Path) -> None:
    problems = []
    if not tastes:
        whose = "states no taste that a program can read and no requirement overrules"
        sentence = f"`{user_id}` {whose}; state one of {', '.join(READABLE)} in tier three, or judge pairs"
        problems.append(Problem(", ".join(document.path for document in policy.documents), None, "--user", sentence))
    if not texts:
        sentence = "there are no prompts to draft on; name a file of them"
        problems.append(Problem("config", None, "evaluation.ordinary", sentence))
    if out.exists() or out.suffix != ".jsonl":
        problems.append(Problem(str(out), None, None, "the output is one new file of JSON lines; name it *.jsonl"))
    if problems:
        raise InputError(problems)


def _drafts(
    config: Config, policy: Policy, adapted: AdaptedModel, user_id: str, tastes: list[Preference], texts: list[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Pairs as rows of a file, each with the number of its prompt among `texts`."""
    wishes = [taste.wish for taste in tastes if taste.wish is not None]
    source = "drafted: " + ", ".join(taste.id for taste in tastes)
    for start in range(0, len(texts), _PROMPTS):
        part = texts[start : start + _PROMPTS]
        asked = [prompt_ids((Message("user", text),), adapted.base.tokenizer) for text in part for _ in range(ANSWERS)]
        with adapted.using(None):
            [written] = adapted.generate([asked], config.gate.max_new_tokens, 1.0, config.seed)
        said = [answer_text(adapted, answer) for answer in written]
        for n, text in enumerate(part):
            answers = said[n * ANSWERS : (n + 1) * ANSWERS]
            if any(map(is_refusal, answers)):
                continue
            sound = [answer for answer in dict.fromkeys(answers) if answer and not post_check(policy, text, answer)]
            order = sorted(sound, key=lambda answer: distance(wishes, answer))
            if order and distance(wishes, order[0]) < distance(wishes, order[-1]):
                pair = {"prompt": text, "chosen": order[0], "rejected": order[-1]}
                yield start + n, {"user_id": user_id, **pair, "id": f"draft-{start + n:05}", "source": source}


# ----------------------------------------------------------------------------------------------------
# `data review`: the quarantine of a run, pair by pair, and what a person decides about it.
# ----------------------------------------------------------------------------------------------------


class QuarantinedPair(NamedTuple):
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


def quarantine(run: Path, user_id: str | None = None) -> list[QuarantinedPair]:
    """The quarantined pairs of a run, of one user or of all, with their texts from the users' own files.

    Raises InputError where the folder is no run, or its pairs are no longer where they were.
    """
    config = read_run_config(run)
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
        QuarantinedPair(pair, why, reviews.get(mark_of(pair)))
        for pair in PairStore(config.users.path, config.users.heldout, RunDir(run).roll)
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
    integrity.append(run, "review", **(made._asdict() | {"user_id": pseudonym(user_id)}))
    return made


def render_reviews(held: list[QuarantinedPair]) -> Table:
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


# ----------------------------------------------------------------------------------------------------
# What the screen of a config takes out of its users' pairs, before anything is trained.
# ----------------------------------------------------------------------------------------------------

_USERS = 256  # at a time


class ScreeningSummary(NamedTuple):
    """How many users and pairs were screened; what was done with how many pairs and why; users with an alarm."""

    users: int
    pairs: int
    found: dict[tuple[str, str], int]
    alarmed: int
    screens: Sequence[CalibratedScreen]

    def to_json(self) -> dict[str, Any]:
        found = [{"action": action, "why": why, "pairs": n} for (action, why), n in self.found.items()]
        screens = [own.to_json() for own in self.screens]
        return {"users": self.users, "pairs": self.pairs, "alarmed": self.alarmed, "found": found, "screens": screens}


def screen_dry_run(config: Config, materials: RunInputs) -> ScreeningSummary:
    """Screens all pairs as `train` would. Raises InputError for whatever is wrong."""
    ready = prepare(config, materials)
    pairs, alarmed, found = 0, 0, Counter[tuple[str, str]]()
    for users in chunks_of(ready.pairs.users, _USERS):
        chunk = prepare_users(ready, ready.pairs.of(users))
        pairs += chunk.pairs
        found.update((one.action, one.kind) for one in chunk.dropped)
        alarmed += len({one.pair.user_id for one in chunk.dropped if one.alarming})
    return ScreeningSummary(ready.pairs.users, pairs, dict(found.most_common()), alarmed, ready.screens)


def render_screening(sifted: ScreeningSummary) -> list[Table]:
    """The tables of `data screen`: what was found, and how well each screen tells."""
    table = Table(title=f"{sifted.users:,} users, {sifted.pairs:,} pairs; {sifted.alarmed:,} users with an alarm")
    for name, side in (("action", "left"), ("why", "left"), ("pairs", "right")):
        table.add_column(name, justify="right" if side == "right" else "left")
    for (action, why), n in sifted.found.items():
        table.add_row(action, why, f"{n:,}")
    return [table, screens_table(sifted.screens)]
