"""What is in preference files, before anything is trained on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from persona_rlhf.inputs.problems import InputError
from persona_rlhf.preferences.pairs import PreferencePair, Reading, first_problems, read
from persona_rlhf.preferences.screening import unfit_to_teach

if TYPE_CHECKING:
    from rich.table import Table


class Spread(NamedTuple):
    """Median, 95th percentile (nearest rank) and extremes of a count."""

    minimum: int
    median: float
    p95: int
    maximum: int


@dataclass(frozen=True)
class Summary:
    """What `data check` found; lengths are in words, texts are not repeated."""

    pairs: int
    users: int
    pairs_per_user: Spread
    splits: dict[str, int]
    users_without_train: int
    users_without_heldout: int
    words: dict[str, Spread]  # of prompt, chosen, rejected
    screened_out: dict[str, int]  # by reason
    on_both_sides: int  # prompts that one user's own `split` puts in train and in heldout
    chosen_is_longer: float  # share of the pairs of unequal length, in characters: near 0 or 1, length says it all
    clean_labels: float | None  # share of the labels that agree with the noise-free utility, where that is known
    unknown_columns: dict[str, int]  # ignored, with the rows that have them

    def to_json(self) -> dict[str, Any]:
        """As an object of plain JSON values."""
        plain = asdict(self)
        plain["pairs_per_user"] = self.pairs_per_user._asdict()
        plain["words"] = {name: spread._asdict() for name, spread in self.words.items()}
        return plain


def check(paths: Sequence[Path | str], heldout: float = 0.25) -> Summary:
    """Reads everything, as `train` would, and counts it.

    `heldout` is the share of prompts held out where rows carry no `split`. Raises InputError naming the bad rows of
    all the files.
    """
    readings: list[Reading] = []
    problems = []
    for path in paths:
        try:
            readings.append(read(path, heldout))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(first_problems(problems))
    pairs = [pair for reading in readings for pair in reading.pairs]
    return _summary(pairs, sum((reading.unknown for reading in readings), Counter()))


def _summary(pairs: list[PreferencePair], unknown: Counter[str]) -> Summary:
    splits: dict[str, Counter[str]] = {}
    sides: dict[tuple[Any, ...], set[str]] = {}
    for pair in pairs:
        splits.setdefault(pair.user_id, Counter())[pair.split] += 1
        sides.setdefault((pair.user_id, pair.prompt), set()).add(pair.split)
    words = {
        "prompt": [sum(len(message.content.split()) for message in pair.prompt) for pair in pairs],
        "chosen": [len(pair.chosen.split()) for pair in pairs],
        "rejected": [len(pair.rejected.split()) for pair in pairs],
    }
    lengths = [(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    unequal = [ours > theirs for ours, theirs in lengths if ours != theirs]
    labels = [pair.clean_choice for pair in pairs if pair.clean_choice is not None]
    _, dropped = unfit_to_teach(pairs)
    return Summary(
        pairs=len(pairs),
        users=len(splits),
        pairs_per_user=_spread([counts.total() for counts in splits.values()]),
        splits={split: sum(counts[split] for counts in splits.values()) for split in ("train", "heldout")},
        users_without_train=sum(not counts["train"] for counts in splits.values()),
        users_without_heldout=sum(not counts["heldout"] for counts in splits.values()),
        words={name: _spread(counts) for name, counts in words.items()},
        screened_out=dict(Counter(found.kind for found in dropped)),
        on_both_sides=sum(len(found) > 1 for found in sides.values()),
        chosen_is_longer=sum(unequal) / len(unequal) if unequal else 0.5,
        clean_labels=sum(labels) / len(labels) if labels else None,
        unknown_columns=dict(unknown),
    )


def _spread(counts: list[int]) -> Spread:
    ranked = sorted(counts)
    return Spread(ranked[0], median(ranked), ranked[-(-95 * len(ranked) // 100) - 1], ranked[-1])


def render(summary: Summary) -> Table:
    """The summary as a table for people."""
    from rich.table import Table

    table = Table("what", "figure", title="Preferences", title_justify="left")

    def spread(counts: Spread) -> str:
        return f"median {counts.median:,.0f}, 95% up to {counts.p95:,}, {counts.minimum:,} to {counts.maximum:,}"

    table.add_row("pairs", f"{summary.pairs:,}")
    table.add_row("users", f"{summary.users:,}")
    table.add_row("pairs per user", spread(summary.pairs_per_user))
    table.add_row("train / held out", f"{summary.splits['train']:,} / {summary.splits['heldout']:,}")
    for name, counts in summary.words.items():
        table.add_row(f"words, {name}", spread(counts))
    table.add_row("chosen is the longer", f"{summary.chosen_is_longer:.1%} of the pairs of unequal length")
    if summary.clean_labels is not None:
        table.add_row("labels without noise", f"{summary.clean_labels:.1%}")
    notes = {
        "users with nothing to train on": summary.users_without_train,
        "users with nothing held out": summary.users_without_heldout,
        "prompts in train and held out": summary.on_both_sides,
        **{f"will be dropped, {kind}": count for kind, count in summary.screened_out.items()},
        **{f"unknown column `{name}`, ignored, rows": rows for name, rows in summary.unknown_columns.items()},
    }
    for name, count in notes.items():
        if count:
            table.add_row(name, f"{count:,}")
    return table
