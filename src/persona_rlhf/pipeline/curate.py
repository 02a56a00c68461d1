"""Preference pairs before training: `data draft`, `data review` and `data screen`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from persona_rlhf.common.errors import InputError, Problem, counted, did_you_mean, visible
from persona_rlhf.common.files import atomic_write, pseudonym
from persona_rlhf.common.run_lock import locks_run
from persona_rlhf.config.experiment import Config, read_run_config
from persona_rlhf.data.answer_patterns import AnswerPattern, answer_patterns
from persona_rlhf.data.feedback import REVIEWS, Decision, Review, decide, mark_of, read_reviews
from persona_rlhf.data.pairs import Message, PreferencePair
from persona_rlhf.data.store import PairStore
from persona_rlhf.data.tokenize import prompt_ids
from persona_rlhf.evaluation.prompt_sets import read_ordinary, some
from persona_rlhf.pipeline.inputs import RunInputs
from persona_rlhf.pipeline.monitoring import OnProgress, ProgressEvent, UserCounter, silent, watched
from persona_rlhf.pipeline.run_dir import RunDir
from persona_rlhf.policy.enforcement import post_check, readable_tastes
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.policy.policy import Policy
from persona_rlhf.policy.properties import READABLE, distance
from persona_rlhf.policy.rules import Preference
from persona_rlhf.release import integrity

if TYPE_CHECKING:
    from persona_rlhf.evaluation.request_screens import CalibratedScreen
    from persona_rlhf.models.adapted_model import AdaptedModel

SAMPLES = 8  # answers of the base to a prompt
_PROMPTS = 16  # answered in one pass
_USERS = 256  # screened at a time


class Drafted(NamedTuple):
    """Drafted pairs of a user: their number, prompts tried, stated preferences used, and those no program can read."""

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
        """The draft in sentences."""
        yield f"{self.pairs} pairs drafted from {', '.join(self.tastes)} on {self.prompts} prompts: {self.path}"
        if self.unread:
            yield f"  Only the user can judge by {', '.join(self.unread)}."


def draft(config: Config, user_id: str, out: Path, pairs: int, on_progress: OnProgress = silent) -> Drafted:
    """Drafts up to `pairs` preference pairs of a user from the preferences stated in tier three, into `out` (JSONL).

    The base is sampled several times on each prompt of `evaluation.ordinary`. The answer nearest to the stated
    preferences is chosen, the farthest is rejected. Answers that break a requirement and prompts that the base refuses
    are left out. Each pair names the preferences it was drafted from; the user can correct it before training.

    Raises InputError where no program can read the stated preferences, there are no prompts, no two answers of the base
    differ by the preferences, or `out` exists.
    """
    policy = Policy.of(config.policy, sequential=config.gate.sequential)
    tastes = readable_tastes(policy, user_id)
    texts = read_ordinary(Path(config.evaluation.ordinary)) if config.evaluation.ordinary else []
    _check_draft(policy, user_id, tastes, texts, out)
    from persona_rlhf.models.adapted_model import AdaptedModel
    from persona_rlhf.models.base import load_base

    adapted = AdaptedModel(load_base(config.base), config.lora)
    unread = [taste.id for taste in policy.for_user(user_id).preferences if taste not in tastes]
    prompts = some(texts, len(texts))[::-1]  # the first ones are asked of every user at evaluation
    with watched([adapted], ProgressEvent("drafting"), on_progress, min(SAMPLES * pairs, SAMPLES * len(prompts))):
        rows = list(islice(_drafts(config, policy, adapted, user_id, tastes, prompts), pairs))
    if not rows:
        sentence = f"no two answers of the base differ by the tastes of `{user_id}`; state others, or judge pairs"
        raise InputError([Problem(str(out), None, "--user", sentence)])
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, (json.dumps(row, ensure_ascii=False) + "\n" for _, row in rows))
    return Drafted(user_id, len(rows), rows[-1][0] + 1, [taste.id for taste in tastes], unread, out)


def _check_draft(policy: Policy, user_id: str, tastes: list[Preference], texts: list[str], out: Path) -> None:
    problems = []
    if not tastes:
        why = "states no taste that a program can read and no requirement overrules"
        sentence = f"`{user_id}` {why}; state one of {', '.join(READABLE)} in tier three, or judge pairs"
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
    from persona_rlhf.evaluation.refusals import answer_text

    wishes = [taste.wish for taste in tastes if taste.wish is not None]
    source = "drafted: " + ", ".join(taste.id for taste in tastes)
    for start in range(0, len(texts), _PROMPTS):
        part = texts[start : start + _PROMPTS]
        prompts = [
            prompt_ids((Message("user", text),), adapted.base.tokenizer) for text in part for _ in range(SAMPLES)
        ]
        with adapted.using(None):
            [sampled] = adapted.generate([prompts], config.gate.max_new_tokens, 1.0, config.seed)
        samples = [answer_text(adapted, answer) for answer in sampled]
        for n, text in enumerate(part):
            answers = samples[n * SAMPLES : (n + 1) * SAMPLES]
            if any(map(is_refusal, answers)):
                continue
            allowed = [answer for answer in dict.fromkeys(answers) if answer and not post_check(policy, text, answer)]
            order = sorted(allowed, key=lambda answer: distance(wishes, answer))
            if order and distance(wishes, order[0]) < distance(wishes, order[-1]):
                pair = {"prompt": text, "chosen": order[0], "rejected": order[-1]}
                yield start + n, {"user_id": user_id, **pair, "id": f"draft-{start + n:05}", "source": source}


class QuarantinedPair(NamedTuple):
    """A pair in quarantine, the reason for it, and the last decision about it."""

    pair: PreferencePair
    why: str
    review: Review | None

    def to_json(self) -> dict[str, object]:
        """The pair by its place, its texts, the reason and the decision."""
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

    Raises InputError where the folder is no run, or its pairs moved since.
    """
    config = read_run_config(run)
    reasons: dict[tuple[str, str, int], str] = {}
    try:
        for line in (run / "screening.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["action"] == "quarantined" and user_id in (None, row["user_id"]):
                reasons[row["user_id"], row["file"], row["line"]] = row["reason"]
    except (OSError, ValueError, KeyError, TypeError) as fault:
        sentence = f"the quarantine cannot be read ({fault}); is this a finished run?"
        raise InputError([Problem(str(run / "screening.jsonl"), None, None, sentence)]) from fault
    reviews = read_reviews(run / REVIEWS) if (run / REVIEWS).exists() else {}
    if not reasons:
        return []
    return [
        QuarantinedPair(pair, why, reviews.get(mark_of(pair)))
        for pair in PairStore(config.users.path, config.users.heldout, RunDir(run).selection)
        if (why := reasons.get((pair.user_id, pair.file, pair.line))) is not None
    ]


@locks_run("data review")
def review(run: Path, user_id: str, pair_id: str, decision: Decision, reason: str, reviewer: str) -> Review:
    """Decides about one quarantined pair of a user, in RUN/reviews.jsonl and in the audit trail.

    Raises InputError where no such pair is in quarantine, and for the acceptance of a pair whose prompt is a probe of a
    restriction: no review may let it through.
    """
    pairs = quarantine(run, user_id)
    quarantined = next((entry for entry in pairs if entry.pair.id == pair_id), None)
    if quarantined is None:
        hint = did_you_mean(pair_id, [entry.pair.id for entry in pairs])
        sentence = f"no pair `{pair_id}` of `{user_id}` is in quarantine{hint}; `data review RUN` lists those that are"
        raise InputError([Problem(str(run), None, "--pair", sentence)])
    pair, why = quarantined.pair, quarantined.why
    if decision == "accept" and why.startswith("probe:"):
        sentence = f"cannot be accepted; {why.removeprefix('probe: ')}, and no review lifts that"
        raise InputError([Problem(pair.file, pair.line, "prompt", sentence)])
    decided = decide(run / REVIEWS, pair, decision, reason, reviewer)
    integrity.append(run, "review", **(decided._asdict() | {"user_id": pseudonym(user_id)}))
    return decided


def render_reviews(pairs: list[QuarantinedPair]) -> Table:
    """The quarantine as a table."""
    table = Table(title=f"{len(pairs)} pairs in quarantine", title_justify="left", show_lines=True)
    for name in ("user, pair", "prompt", "chosen", "rejected", "why", "decided"):
        table.add_column(name, overflow="fold")
    for entry in pairs:
        pair, last = entry.pair, entry.review
        cells = (
            f"{pair.user_id}, {pair.id}",
            pair.prompt[-1].content,
            pair.chosen,
            pair.rejected,
            entry.why,
            "" if last is None else f"{last.decision} by {last.reviewer}: {last.reason}",
        )
        table.add_row(*(escape(visible(text)) for text in cells))
    return table


class ScreeningSummary(NamedTuple):
    """Users and pairs screened; pairs by action and reason; users with an alarm; the calibrated screens.

    `patterns` are users whose choices follow a place or a length, or change; nothing is left out for them.
    """

    users: int
    pairs: int
    counts: dict[tuple[str, str], int]
    alarmed: int
    screens: Sequence[CalibratedScreen]
    patterns: Sequence[AnswerPattern] = ()

    def to_json(self) -> dict[str, Any]:
        """As an object of plain JSON values."""
        counts = [{"action": action, "why": why, "pairs": n} for (action, why), n in self.counts.items()]
        screens = [screen.to_json() for screen in self.screens]
        patterns = [pattern.to_json() for pattern in self.patterns]
        outcome = {"users": self.users, "pairs": self.pairs, "alarmed": self.alarmed, "found": counts}
        return {**outcome, "screens": screens, "patterns": patterns}


def screen_dry_run(config: Config, inputs: RunInputs, on_progress: OnProgress = silent) -> ScreeningSummary:
    """Screens all pairs as `train` would; nothing is written. Raises InputError for an error in the inputs."""
    from persona_rlhf.pipeline.prepare import chunks_of, prepare, prepare_users

    ready = prepare(config, inputs, on_progress=on_progress)
    pairs, alarmed, counts = 0, 0, Counter[tuple[str, str]]()
    patterns: list[AnswerPattern] = []
    counter = UserCounter("screening", ready.pairs.users, on_progress)
    for users in chunks_of(ready.pairs.users, _USERS):
        given = ready.pairs.of(users)
        patterns += answer_patterns(given, config.screening.patterns)
        with ready.watched(counter.event, on_progress):
            chunk = prepare_users(ready, given)
        counter(users.stop)
        pairs += chunk.pairs
        counts.update((dropped.action, dropped.kind) for dropped in chunk.dropped)
        alarmed += len({dropped.pair.user_id for dropped in chunk.dropped if dropped.alarming})
    return ScreeningSummary(ready.pairs.users, pairs, dict(counts.most_common()), alarmed, ready.screens, patterns)


def render_screening(summary: ScreeningSummary) -> list[Table]:
    """The tables of `data screen`: pairs by action and reason, error rates of each screen, and users with a pattern."""
    from persona_rlhf.evaluation.request_screens import screens_table

    alarmed = f"{counted(summary.alarmed, 'user')} with an alarm"
    table = Table(title=f"{counted(summary.users, 'user')}, {counted(summary.pairs, 'pair')}; {alarmed}")
    table.add_column("action")
    table.add_column("why")
    table.add_column("pairs", justify="right")
    for (action, why), n in summary.counts.items():
        table.add_row(action, why, f"{n:,}")
    reported = Table("user", "reported, not left out")
    for pattern in summary.patterns:
        reported.add_row(escape(visible(pattern.user_id)), pattern.reason)
    return [table, screens_table(summary.screens), *([reported] if summary.patterns else [])]
