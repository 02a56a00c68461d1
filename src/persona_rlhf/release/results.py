"""results.jsonl: one line per user with its verdict and measurements. summary.json: the run in a few numbers."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import TypeAdapter, ValidationError

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write, slug
from persona_rlhf.config.evaluation import GateSettings
from persona_rlhf.config.retired import remove_retired
from persona_rlhf.evaluation.fleet_guarantee import FleetGuarantee, GatedUser, fleet_guarantee
from persona_rlhf.evaluation.gate import POOLED, Demands, GateTest, Verdict
from persona_rlhf.evaluation.prior_gain import PriorGain
from persona_rlhf.evaluation.records import Measures
from persona_rlhf.evaluation.spending import Spending
from persona_rlhf.evaluation.statistics import Clustered, Count
from persona_rlhf.evaluation.still_base import StillBase
from persona_rlhf.policy.bound import JUDGE_DELTA_SHARE
from persona_rlhf.training.records import BasisUse, DualTrace

if TYPE_CHECKING:  # a result is read without torch
    from persona_rlhf.training.engine import TrainedUser

RESULTS = "results.jsonl"

Status = Literal["released", "prior", "held_back", "skipped", "failed"]
"""`prior`: the gate released the population's adapter to the user, in place of the user's adapter."""


class PairCounts(NamedTuple):
    """A user's pairs: trained on, held out, and taken out by screening."""

    train: int
    heldout: int
    screened_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One user's line of results.jsonl. None marks an unmeasured value; NaN is never written."""

    user_id: str
    slug: str
    status: Status
    reason: str
    pairs: PairCounts
    measures: Measures = field(default_factory=Measures)
    alpha: float = 0.0
    tier_one: dict[str, Count] | None = None
    duals: dict[str, DualTrace] = field(default_factory=dict)
    alarm: bool = False
    steps: int = 0
    seconds: float = 0.0
    path: str | None = None
    tier_two: dict[str, Count] = field(default_factory=dict)
    looks: list[GateTest] = field(default_factory=list)
    clusters: Clustered | None = None
    retreat: float = 0.0
    manifest_sha256: str | None = None
    spending: Spending | None = None
    basis: BasisUse | None = None
    still_base: StillBase | None = None
    gain_over_prior: PriorGain | None = None

    @property
    def has_adapter(self) -> bool:
        """Whether the gate released an adapter to the user: the user's, or the population's."""
        return self.status in ("released", "prior")

    @property
    def judged(self) -> bool:
        """Whether the gate judged an adapter of the user."""
        return self.has_adapter or self.status == "held_back"

    @property
    def harmful(self) -> bool:
        """Whether the user is held back because the adapter no longer is the base, or is worse by held-out pairs.

        Where a test passed now, an earlier verdict at the look holds the user back, and this one gives no cause.
        """
        harm = self.still_base is not None and not self.still_base.passes
        return self.status == "held_back" and harm and not any(test.passed for test in self.looks)

    @property
    def gain(self) -> float | None:
        """Held-out accuracy over chance, as `Measures.gain`."""
        return self.measures.gain

    @property
    def broken_facts(self) -> int:
        """Right answers of the base on facts that the adapter changes although the policy fixes them."""
        tax = self.measures.tax
        return tax.facts.broken if tax is not None and tax.facts is not None else 0

    @property
    def pooled(self) -> Count | None:
        """The refusals pooled over tier one."""
        return None if self.tier_one is None else self.tier_one.get(POOLED)

    def to_json(self) -> dict[str, Any]:
        """The line as plain JSON values, in the order of `KEYS`: the measures stand beside the other fields."""
        return {
            key: plain(getattr(self.measures if key in Measures._fields else self, key))
            for key in KEYS
            if key not in self._absent
        }

    @property
    def _absent(self) -> set[str]:
        """Keys that lines of earlier versions lack."""
        return {key for key in ("spending", "still_base", "gain_over_prior") if getattr(self, key) is None}

    @staticmethod
    def from_json(content: Any) -> Result:
        """The result of a line. Raises pydantic's ValidationError if it is none."""
        if isinstance(content, dict):
            measures = {key: content[key] for key in Measures._fields if key in content}
            content = {**content, "measures": measures}
        return _RESULT.validate_python(content)


KEYS = (
    *("user_id", "slug", "status", "reason", "pairs", "heldout_accuracy", "heldout_clean", "win_rate", "alpha"),
    *("tier_one", "over_refusal", "duals", "alarm", "steps", "seconds", "path", "tier_two", "looks", "clusters"),
    *("test", "ordinary", "twins", "answer_perplexity", "unchanged", "tax", "requirements", "retreat"),
    *("manifest_sha256", "spending", "basis", "still_base", "gain_over_prior"),
)
"""The keys of a line of results.jsonl, in their order."""


def plain(value: Any) -> Any:
    """A value as plain JSON: named tuples as objects, NaN and infinities as null."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {key: plain(part) for key, part in value._asdict().items()}
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def line_of(result: Result) -> str:
    """The line as written to the file. Ids that UTF-8 cannot hold (lone surrogates) are escaped."""
    return json.dumps(result.to_json(), ensure_ascii=True, allow_nan=False) + "\n"


def write_results(run: Path, results: Iterable[Result]) -> None:
    """Writes RUN/results.jsonl, users in the given order."""
    atomic_write(run / RESULTS, map(line_of, results))


def read_results(run: Path) -> list[Result]:
    """Reads RUN/results.jsonl. Raises InputError if it is missing, or naming every line that is not a result."""
    return list(RunResults(run))


class RunResults:
    """The lines of RUN/results.jsonl, read one by one: a run of many users is never held in memory.

    Raises InputError if there is no such file; at its end, with every line that is not a result.
    """

    def __init__(self, run: Path) -> None:
        self._file = run / RESULTS
        if not self._file.is_file():
            raise self._unreadable("there is no such file")

    def _unreadable(self, why: object) -> InputError:
        sentence = f"the results of this run cannot be read ({why}); is this a finished run?"
        return InputError([Problem(str(self._file), None, None, sentence)])

    def __len__(self) -> int:
        with self._file.open("rb") as lines:
            return sum(1 for _ in lines)

    def __iter__(self) -> Iterator[Result]:
        problems: list[Problem] = []
        try:
            with self._file.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    parsed = _parsed(line)
                    if isinstance(parsed, Result):
                        yield parsed
                    else:
                        problems += [Problem(str(self._file), number, *fault) for fault in parsed]
        except (OSError, UnicodeDecodeError) as fault:
            raise self._unreadable(fault) from fault
        if problems:
            raise InputError(problems)


def _parsed(line: str) -> Result | list[tuple[str | None, str]]:
    """A line as a result, or its faults: (key, sentence)."""
    try:
        return Result.from_json(json.loads(line))
    except json.JSONDecodeError as fault:
        return [(None, f"the line is not JSON ({fault.msg})")]
    except ValidationError as fault:
        return [
            (
                ".".join(map(str, error["loc"])).removeprefix("measures.") or None,
                f"not a result of this toolkit ({error['msg']})",
            )
            for error in fault.errors()
        ]


_RESULT = TypeAdapter(Result)


class RunSummary(NamedTuple):
    """A run in a few numbers. Medians are over judged users; None if nobody was measured.

    `released` are users with an adapter trained on their pairs, `prior` those who keep the population's.
    `most_looks` and `most_spent` are those of the user with the most looks at the gate, and of the one who spent most
    of delta. `harmful` are those of the held-back users whose adapters no longer are the base (`Result.harmful`).
    """

    users: int
    released: int
    full_strength: int
    held_back: int
    other: int
    failed: int
    alarms: int
    gain: float | None
    clean_accuracy: float | None
    accuracy: float | None
    win_rate: float | None
    worst_bound: float | None
    most_looks: int | None
    most_spent: float | None
    harmful: int = 0
    prior: int = 0


def summarise(results: Iterable[Result]) -> RunSummary:
    """The summary of the results, in one pass. The report's top and the table's last line show it."""
    statuses: Counter[str] = Counter()
    full, alarms, harmful, worst = 0, 0, 0, None
    looks, spent = list[int](), list[float]()
    gains: list[float] = []
    clean: list[float] = []
    accuracy: list[float] = []
    won: list[float] = []
    for r in results:
        statuses[r.status] += 1
        alarms, harmful = alarms + r.alarm, harmful + r.harmful
        gains += [] if r.gain is None else [r.gain]
        looks += [] if r.spending is None else [r.spending.look]
        spent += [] if r.spending is None else [r.spending.spent]
        measures = r.measures
        clean += [measures.heldout_clean.adapted] if measures.heldout_clean else []
        accuracy += [measures.heldout_accuracy.adapted] if measures.heldout_accuracy else []
        won += [measures.win_rate.value] if measures.win_rate else []
        full += r.status == "released" and r.alpha == 1
        if r.has_adapter and r.pooled and r.looks:  # without a test there is no promise
            worst = r.pooled.lower_bound if worst is None else min(worst, r.pooled.lower_bound)
    return RunSummary(
        users=statuses.total(),
        released=statuses["released"],
        full_strength=full,
        held_back=statuses["held_back"],
        other=statuses["skipped"] + statuses["failed"],
        failed=statuses["failed"],
        alarms=alarms,
        gain=median(gains) if gains else None,
        clean_accuracy=median(clean) if clean else None,
        accuracy=median(accuracy) if accuracy else None,
        win_rate=median(won) if won else None,
        worst_bound=worst,
        most_looks=max(looks, default=None),
        most_spent=max(spent, default=None),
        harmful=harmful,
        prior=statuses["prior"],
    )


SUMMARY = "summary.json"
NOTHING = "The gate was off: no adapter of this run has a guarantee."


def guarantee_of_run(
    config: Mapping[str, Any], policy: Mapping[str, Any], results: Iterable[Result], users: int
) -> FleetGuarantee | None:
    """The guarantee over all users, from the run's config and policy (as trees) and every gate test.

    None if the gate was off, or the policy states no delta.
    """
    try:
        tree = deepcopy(dict(config))
        retired = {removed.key: removed.value for removed in remove_retired(tree)}  # a run of an earlier version
        gate = GateSettings.model_validate(tree.get("gate") or {})
        judge_share = float(str(retired.get("gate.judge_calibration.delta_share", JUDGE_DELTA_SHARE)))
        delta = float((policy.get("certify") or {})["delta"])
    except (ValidationError, KeyError, TypeError, ValueError):
        return None
    if not gate.enabled:
        return None
    demands = Demands(0.0, {}, frozenset(), delta, sequential=gate.sequential).under(gate, users, judge_share)
    share = 1 / float(str(retired.get("gate.runs", 1)))  # one look of a run that was the best of so many
    judged = (
        GatedUser(r.alpha, r.looks, share)
        if r.spending is None
        else GatedUser(r.alpha, r.looks, r.spending.share, r.spending.look)
        for r in results
        if r.judged
    )
    return fleet_guarantee(judged, demands)


def write_summary(run: Path, summary: RunSummary, guarantee: FleetGuarantee | None) -> None:
    """Writes RUN/summary.json."""
    promise = None if guarantee is None else plain(guarantee) | {"sentence": guarantee.sentence()}
    content = plain(summary) | {"promise": promise}
    atomic_write(run / SUMMARY, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def read_sentence(run: Path) -> str | None:
    """The guarantee of a run as a sentence, from its summary; None if the run has no summary."""
    if not (run / SUMMARY).exists():
        return None
    promise = json.loads((run / SUMMARY).read_bytes())["promise"]
    return NOTHING if promise is None else str(promise["sentence"])


class Written(NamedTuple):
    """A written adapter: its folder relative to the run, and the sha256 of its manifest."""

    path: str
    manifest_sha256: str


def skipped(user_id: str, reason: str, pairs: PairCounts) -> Result:
    """The line of a user who was not trained."""
    return Result(user_id=user_id, slug=slug(user_id), status="skipped", reason=reason, pairs=pairs)


def untrained(user_id: str, pairs: PairCounts, fault: str | None, against_policy: int = 0) -> Result:
    """The line of a user without a pair to train on: an internal `fault`, or no pair is left."""
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
    prior: bool = False,
) -> Result:
    """The line of a trained user. `verdict` is None if training failed, `written` if the user is held back.

    `prior`: the verdict is on the population's adapter.

    `tier_one` are the categories that the gate pools. The alarm says that the screen found pairs against the policy
    (`against_policy`), whatever became of the adapter: held back is the gate's verdict, failed an internal fault. Dual
    variables set no alarm: the constraint holds before they rise (docs/explanation/promise.md).
    """
    assert (verdict is not None and verdict.admitted) == (written is not None), trained.user_id
    common: dict[str, Any] = {
        "user_id": trained.user_id,
        "slug": slug(trained.user_id),
        "pairs": pairs,
        "duals": trained.duals,
        "steps": trained.steps,
        "seconds": trained.seconds,
    }
    if verdict is None:
        return Result(status="failed", reason=trained.reason, alarm=against_policy > 0, **common)
    counts = verdict.categories
    return Result(
        status="held_back" if written is None else "prior" if prior else "released",
        reason=verdict.reason,
        alpha=verdict.alpha,
        tier_one={POOLED: verdict.pooled} | {name: count for name, count in counts.items() if name in tier_one},
        tier_two={name: count for name, count in counts.items() if name not in tier_one},
        measures=measures or Measures(),
        looks=verdict.looks,
        still_base=verdict.still_base,
        clusters=verdict.clusters,
        alarm=against_policy > 0,
        path=written.path if written else None,
        manifest_sha256=written.manifest_sha256 if written else None,
        **common,
    )
