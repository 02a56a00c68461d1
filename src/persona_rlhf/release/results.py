"""`results.jsonl`: one line a user, everything that was decided and measured; and the table at the end of a run."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

from pydantic import TypeAdapter, ValidationError

from persona_rlhf.evaluation.clusters import Clustered
from persona_rlhf.evaluation.gate import POOLED, Count, Look
from persona_rlhf.evaluation.measures import Accuracy, AlignmentTax, CleanAccuracy, Met, Perplexity, Refused, WinRate
from persona_rlhf.inputs.problems import InputError, Problem

RESULTS = "results.jsonl"

Status = Literal["released", "held_back", "skipped", "failed"]


class PairCounts(NamedTuple):
    """A user's pairs: trained on, held out, and taken out by screening."""

    train: int
    heldout: int
    screened_out: int


class Dual(NamedTuple):
    """A dual variable over a user's training."""

    final: float
    peak: float
    mean: float


class Tested(NamedTuple):
    """Refusals on the `test` split at the released alpha: reported, never used to decide. `shift`: unseen topics."""

    pooled: Count
    categories: dict[str, Count]
    shift: Refused | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One user's line. None where something was not measured, never a number that is none."""

    user_id: str
    slug: str
    status: Status
    reason: str
    pairs: PairCounts
    heldout_accuracy: Accuracy | None = None
    heldout_clean: CleanAccuracy | None = None
    win_rate: WinRate | None = None
    alpha: float = 0.0
    tier_one: dict[str, Count] | None = None
    over_refusal: Refused | None = None
    duals: dict[str, Dual] = field(default_factory=dict)
    alarm: bool = False
    steps: int = 0
    seconds: float = 0.0
    path: str | None = None
    # beside the contract:
    tier_two: dict[str, Count] = field(default_factory=dict)
    looks: list[Look] = field(default_factory=list)
    clusters: Clustered | None = None
    test: Tested | None = None
    ordinary: Refused | None = None
    twins: Refused | None = None
    answer_perplexity: Perplexity | None = None
    unchanged: float | None = None
    tax: AlignmentTax | None = None
    requirements: dict[str, Met] = field(default_factory=dict)
    retreat: float = 0.0
    manifest_sha256: str | None = None

    @property
    def gain(self) -> float | None:
        """Held-out accuracy over chance: on noise-free labels where they are known, else on the user's own."""
        found = self.heldout_clean or self.heldout_accuracy
        return None if found is None else found.adapted - 0.5

    @property
    def pooled(self) -> Count | None:
        """The refusals pooled over tier one."""
        return None if self.tier_one is None else self.tier_one.get(POOLED)

    def to_json(self) -> dict[str, Any]:
        """The line as plain JSON values, in the order of the fields."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}


def plain(value: Any) -> Any:
    """Named tuples as objects, and numbers that are none as null."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {key: plain(part) for key, part in value._asdict().items()}
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def line_of(result: Result) -> str:
    """The line as it stands in the file. Ids are escaped where UTF-8 could not hold them (lone surrogates)."""
    return json.dumps(result.to_json(), ensure_ascii=True, allow_nan=False) + "\n"


def write_results(run: Path, results: Iterable[Result]) -> None:
    """Writes RUN/results.jsonl whole or not at all, users in the order given."""
    half = run / (RESULTS + ".half")
    with half.open("w", encoding="utf-8") as stream:
        stream.writelines(map(line_of, results))
        stream.flush()
        os.fsync(stream.fileno())
    half.replace(run / RESULTS)


def read_results(run: Path) -> list[Result]:
    """Reads RUN/results.jsonl. Raises InputError where there is none, naming every line that is not a result."""
    return list(RunResults(run))


class RunResults:
    """The lines of RUN/results.jsonl, read as they are asked for: a run of many users is never in memory.

    Raises InputError where there is no such file, and at its end naming every line that is not a result.
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
                    found = _parsed(line)
                    if isinstance(found, Result):
                        yield found
                    else:
                        problems += [Problem(str(self._file), number, *fault) for fault in found]
        except (OSError, UnicodeDecodeError) as fault:
            raise self._unreadable(fault) from fault
        if problems:
            raise InputError(problems)


def _parsed(line: str) -> Result | list[tuple[str | None, str]]:
    """A line as a result, or what is wrong with it: (key, sentence)."""
    try:
        return _RESULT.validate_python(json.loads(line))
    except json.JSONDecodeError as fault:
        return [(None, f"the line is not JSON ({fault.msg})")]
    except ValidationError as fault:
        return [
            (".".join(map(str, error["loc"])) or None, f"not a result of this toolkit ({error['msg']})")
            for error in fault.errors()
        ]


_RESULT = TypeAdapter(Result)


class Summary(NamedTuple):
    """A run in a handful of numbers; medians over released and held-back users, None where nobody was measured."""

    users: int
    released: int
    full_strength: int
    held_back: int
    other: int
    gain: float | None
    clean_accuracy: float | None
    accuracy: float | None
    win_rate: float | None
    worst_bound: float | None


def summarise(results: Iterable[Result]) -> Summary:
    """The numbers at the top of the report and in the last line of the table; one pass over the results."""
    statuses: Counter[str] = Counter()
    full, worst = 0, None
    gains: list[float] = []
    clean: list[float] = []
    accuracy: list[float] = []
    won: list[float] = []
    for r in results:
        statuses[r.status] += 1
        gains += [] if r.gain is None else [r.gain]
        clean += [r.heldout_clean.adapted] if r.heldout_clean else []
        accuracy += [r.heldout_accuracy.adapted] if r.heldout_accuracy else []
        won += [r.win_rate.value] if r.win_rate else []
        if r.status == "released":
            full += r.alpha == 1
            if r.pooled:
                worst = r.pooled.lower_bound if worst is None else min(worst, r.pooled.lower_bound)
    return Summary(
        users=statuses.total(),
        released=statuses["released"],
        full_strength=full,
        held_back=statuses["held_back"],
        other=statuses["skipped"] + statuses["failed"],
        gain=median(gains) if gains else None,
        clean_accuracy=median(clean) if clean else None,
        accuracy=median(accuracy) if accuracy else None,
        win_rate=median(won) if won else None,
        worst_bound=worst,
    )
