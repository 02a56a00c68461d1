"""`data check`: a summary of preference files, and one pair as a model's chat template renders it."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from persona_rlhf.common.errors import InputError, Problem, collecting
from persona_rlhf.config.experiment import PatternSettings
from persona_rlhf.data.answer_patterns import AnswerPattern, answer_patterns
from persona_rlhf.data.columns import UserSpellings
from persona_rlhf.data.pairs import PreferencePair, ReadPairs, RowNotes, first_problems, parsed_rows, read
from persona_rlhf.data.personal_data import counted_kinds
from persona_rlhf.data.screening import unfit_to_teach
from persona_rlhf.data.tokenize import ChatTokenizer, control_tokens, tokenize

if TYPE_CHECKING:
    from rich.panel import Panel
    from rich.table import Table


class Spread(NamedTuple):
    """Median, 95th percentile (nearest rank) and extremes of a count."""

    minimum: int
    median: float
    p95: int
    maximum: int


class Distributions(NamedTuple):
    """Values that a summary condenses: pairs of each user, words of each text, and by user the share of pairs of
    unequal length whose chosen answer is the longer one."""

    pairs_per_user: list[int]
    words: dict[str, list[int]]  # of prompt, chosen, rejected
    longer_by_user: list[float]


@dataclass(frozen=True)
class DataSummary:
    """Counts and shares of preference files; lengths are in words, and no text is in it."""

    pairs: int
    users: int
    pairs_per_user: Spread
    splits: dict[str, int]
    users_without_train: int
    users_without_heldout: int
    words: dict[str, Spread]  # of prompt, chosen, rejected
    screened_out: dict[str, int]  # by reason
    ties: int  # pairs whose answers the user holds alike
    on_both_sides: int  # prompts that a user's `split` column puts in train and in heldout
    chosen_is_longer: (
        float  # share of the pairs of unequal length, in characters: near 0 or 1, length alone predicts the choice
    )
    clean_labels: float | None  # share of labels that agree with the noise-free utility; None without such labels
    unknown_columns: dict[str, int]  # ignored, with the rows that have them
    read_as: dict[str, int]  # other layouts that were read, with their rows
    patterns: list[AnswerPattern]  # users whose choices follow a place or a length, or change
    columns: dict[str, dict[str, int]]  # by role, the columns that it was read from, with their rows
    personal_data: dict[str, int]  # pairs with an address or number that names a person, by its kind
    distributions: Distributions

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain = asdict(self)
        del plain["distributions"]
        plain["pairs_per_user"] = self.pairs_per_user._asdict()
        plain["patterns"] = [pattern.to_json() for pattern in self.patterns]
        plain["words"] = {name: spread._asdict() for name, spread in self.words.items()}
        return plain


def check(paths: Sequence[Path | str], heldout: float = 0.25) -> DataSummary:
    """The summary of all files, read as `train` reads them.

    `heldout` is the share of prompts held out if rows have no `split`. Raises InputError naming the bad rows of all
    files.
    """
    readings: list[ReadPairs] = []
    problems: list[Problem] = []
    users = UserSpellings()
    for path in paths:
        with collecting(problems):
            readings.append(read(path, heldout, users))
    if problems:
        raise InputError(first_problems(problems))
    pairs = [pair for reading in readings for pair in reading.pairs]
    notes = RowNotes.none()
    for reading in readings:
        notes.unknown.update(reading.unknown)
        notes.read_as.update(reading.read_as)
        notes.taken.update(reading.taken)
    return _summary(pairs, notes)


def _summary(pairs: list[PreferencePair], notes: RowNotes) -> DataSummary:
    splits: dict[str, Counter[str]] = {}
    splits_of_prompt: dict[tuple[Any, ...], set[str]] = {}
    for pair in pairs:
        splits.setdefault(pair.user_id, Counter())[pair.split] += 1
        splits_of_prompt.setdefault((pair.user_id, pair.prompt), set()).add(pair.split)
    words = {
        "prompt": [sum(len(message.content.split()) for message in pair.prompt) for pair in pairs],
        "chosen": [len(pair.chosen.split()) for pair in pairs],
        "rejected": [len(pair.rejected.split()) for pair in pairs],
    }
    longer: dict[str, list[bool]] = {}
    for pair in pairs:
        if len(pair.chosen) != len(pair.rejected) and not pair.tie:
            longer.setdefault(pair.user_id, []).append(len(pair.chosen) > len(pair.rejected))
    unequal = [chosen for of_user in longer.values() for chosen in of_user]
    per_user = [counts.total() for counts in splits.values()]
    labels = [pair.clean_choice for pair in pairs if pair.clean_choice is not None]
    _, dropped = unfit_to_teach(pairs)
    columns: dict[str, dict[str, int]] = {}
    for (role, name), rows in notes.taken.items():
        columns.setdefault(role, {})[name] = rows
    return DataSummary(
        pairs=len(pairs),
        users=len(splits),
        pairs_per_user=_spread(per_user),
        splits={split: sum(counts[split] for counts in splits.values()) for split in ("train", "heldout")},
        users_without_train=sum(not counts["train"] for counts in splits.values()),
        users_without_heldout=sum(not counts["heldout"] for counts in splits.values()),
        words={name: _spread(counts) for name, counts in words.items()},
        screened_out=dict(Counter(pair.kind for pair in dropped)),
        ties=sum(pair.tie for pair in pairs),
        on_both_sides=sum(len(sides) > 1 for sides in splits_of_prompt.values()),
        chosen_is_longer=sum(unequal) / len(unequal) if unequal else 0.5,
        clean_labels=sum(labels) / len(labels) if labels else None,
        unknown_columns=dict(notes.unknown),
        read_as=dict(notes.read_as),
        patterns=answer_patterns(pairs, PatternSettings()),
        columns=columns,
        personal_data=dict(Counter(counted_kinds(pairs)).most_common()),
        distributions=Distributions(per_user, words, [sum(chosen) / len(chosen) for chosen in longer.values()]),
    )


def _spread(counts: list[int]) -> Spread:
    ranked = sorted(counts)
    return Spread(ranked[0], median(ranked), ranked[-(-95 * len(ranked) // 100) - 1], ranked[-1])


def render(summary: DataSummary) -> Table:
    """The summary as a table for people."""
    from rich.table import Table

    table = Table("measure", "value", title="Preferences", title_justify="left")

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
    for role, names in summary.columns.items():
        taken = ", ".join(name if rows == summary.pairs else f"{name} ({rows:,} rows)" for name, rows in names.items())
        table.add_row(f"column, {role}", taken)
    for name, count in notes_of(summary).items():
        table.add_row(name, f"{count:,}")
    return table


def notes_of(summary: DataSummary) -> dict[str, int]:
    """Counts of users, pairs and rows that deserve a look, by their names; those of none are left out."""
    patterns = Counter(pattern.kind for pattern in summary.patterns)
    notes = {
        "users with nothing to train on": summary.users_without_train,
        "users with nothing held out": summary.users_without_heldout,
        "pairs that are ties": summary.ties,
        "prompts in train and held out": summary.on_both_sides,
        **{f"will be dropped, {kind}": count for kind, count in summary.screened_out.items()},
        **{f"users who {_PATTERNS[kind]}": count for kind, count in patterns.items()},
        **{f"pairs with personal data, {kind}": count for kind, count in summary.personal_data.items()},
        **{f"read {layout}, rows": rows for layout, rows in summary.read_as.items()},
        **{f"{_column(name)}, ignored, rows": rows for name, rows in summary.unknown_columns.items()},
    }
    return {name: count for name, count in notes.items() if count}


_PATTERNS = {
    "place": "choose the same place",
    "longer": "choose the longer answer",
    "changed": "change their choices",
}


def _column(name: str) -> str:
    return f"unknown column `{name}`" if name else "column without a name"


class RenderedPart(NamedTuple):
    """A part of a row: its decoded text, its number of tokens, and the index of the first one in the row."""

    text: str
    tokens: int
    begins: int


class Rendered(NamedTuple):
    """The pair at a `place` (file and row), rendered for `base`: its prompt and two answers."""

    place: str
    user_id: str
    base: str
    parts: dict[str, RenderedPart]  # prompt, chosen, rejected
    control: re.Pattern[str]  # the template's control tokens

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        parts = {name: part._asdict() for name, part in self.parts.items()}
        return {"place": self.place, "user_id": self.user_id, "base": self.base, **parts}

    def panel(self) -> Panel:
        """A panel for people: control tokens are highlighted, and other control characters are escaped."""
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        lines = [Text(_harmless(f"{self.place}, user {self.user_id}"), "dim")]
        for name, part in self.parts.items():
            position = f", from token {part.begins} on" if part.begins else ""
            text = Text(_harmless(part.text))
            text.highlight_regex(self.control, "bold cyan")
            lines += [Text(f"{name}: {part.tokens} tokens{position}", "bold"), text]
        return Panel(Group(*lines), title=Text(f"as {self.base} sees it"), title_align="left")


def _harmless(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def first_pair(path: Path | str) -> PreferencePair:
    """The first pair of a path. Raises InputError if its first row is wrong."""
    row = next(parsed_rows(path))
    if isinstance(row, Problem):
        raise InputError([row])
    return row[0]


def rendered(pair: PreferencePair, base: str, tokenizer: ChatTokenizer) -> Rendered:
    """A pair as the model `base` sees it. Raises InputError if its chat template rejects the pair."""
    [user] = tokenize([pair], tokenizer, sys.maxsize)
    [row] = user.train + user.heldout

    def part(ids: tuple[int, ...], begins: int) -> RenderedPart:
        text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return RenderedPart(str(text), len(ids), begins)

    prompt = row.chosen.prompt
    parts = {
        "prompt": part(prompt, 0),
        "chosen": part(row.chosen.completion, len(prompt)),
        "rejected": part(row.rejected.completion, len(prompt)),
    }
    return Rendered(f"{pair.file}:{pair.line}", pair.user_id, base, parts, control_tokens(tokenizer))
