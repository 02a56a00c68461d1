"""`data import` of a preference set: its rows as pairs of ours, and a reason for each comparison left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from persona_rlhf.common.errors import InputError, Problem, counted
from persona_rlhf.data.columns import columns_of
from persona_rlhf.data.imported_pairs import need_pairs_file, write_pairs
from persona_rlhf.data.judgements import Comparison, Judgement, PlacedJudgement, comparisons, gathered, judgements_of
from persona_rlhf.data.pairs import PreferencePair, parse_row
from persona_rlhf.data.preference_sets import PreferenceSet
from persona_rlhf.data.readers import RawRow, read_rows


class SetChoices(NamedTuple):
    """The choices of a caller: columns by role, one user for all rows, and the smallest difference of two scores."""

    columns: Mapping[str, str] = {}
    user: str | None = None
    min_gap: float | None = None


class SetImport(NamedTuple):
    """The outcome of an import: rows read, comparisons in them, pairs written, and comparisons left out by reason.

    A judgement that cannot be read counts as one comparison. `first` is the place of each reason's first row.
    """

    source: PreferenceSet
    rows: int
    comparisons: int
    pairs: int
    users: int
    left_out: dict[str, int]
    first: dict[str, str]
    path: Path

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        about = {"format": self.source.name, **{key: getattr(self.source, key) for key in ("title", "url", "licence")}}
        outcome = {**self._asdict(), "columns": self.source.roles_of_columns, "path": str(self.path)}
        return about | {key: value for key, value in outcome.items() if key != "source"}

    def sentences(self) -> Iterator[str]:
        """The outcome as sentences."""
        title = self.source.title
        yield f"{title[0].upper()}{title[1:]}. Licence: {self.source.licence}."
        yield f"{counted(self.rows, 'row')} read, {counted(self.comparisons, 'comparison')} in them."
        yield f"{counted(self.pairs, 'pair')} of {counted(self.users, 'user')} written to {self.path}."
        for reason, count in sorted(self.left_out.items(), key=lambda item: -item[1]):
            place = f" (first at {self.first[reason]})" if reason in self.first else ""
            yield f"  {count:,} left out: {reason}{place}"


def import_set(
    columns: PreferenceSet, src: Path, out: Path, min_pairs: int = 1, choices: SetChoices | None = None
) -> SetImport:
    """Converts a file or a folder of a set, row by row: the memory grows with the users, not with the rows.

    A row that cannot be read, or a judgement that makes no pair, is counted with its reason. Raises InputError, and
    writes nothing, if the set names no users and `choices` neither, or if no pair is left.
    """
    choices = choices or SetChoices()
    columns = columns.with_columns(choices.columns)
    if choices.user is not None:
        columns = columns.model_copy(update={"user_name": choices.user})
    if choices.min_gap is not None:
        columns = columns.model_copy(update={"gap": choices.min_gap})
    if not columns.user and columns.user_name is None:
        sentence = f"`{columns.name}` names no users; --user NAME makes all its pairs those of one user"
        raise InputError([Problem("data import", None, "--user", sentence)])
    if not src.exists():
        raise InputError([Problem(str(src), None, None, "there is no such file; check the path")])
    need_pairs_file(out, src)
    conversion = _Conversion(columns)
    try:
        users = write_pairs(src, out, conversion.pairs(read_rows(src)), min_pairs, conversion.left_out)
    except InputError as fault:
        raise conversion.named(fault) from None
    first = {reason: f"{problem.file}:{problem.line}" for reason, problem in conversion.first.items()}
    left_out, pairs = dict(conversion.left_out), users.total()
    compared = pairs + sum(left_out.values())
    return SetImport(columns, conversion.rows, compared, pairs, len(users), left_out, first, out)


class _Conversion:
    """The rows of a set on their way to pairs, with counts of all that was left out."""

    def __init__(self, columns: PreferenceSet) -> None:
        self._columns = columns
        self.rows = 0
        self._made = 0
        self.left_out: Counter[str] = Counter()
        self.first: dict[str, Problem] = {}

    def pairs(self, items: Iterable[RawRow | Problem]) -> Iterator[dict[str, Any]]:
        """The pairs as rows of our file."""
        judged = self._judgements(items)
        for file, line, judgement in gathered(judged) if self._columns.gathered else judged:
            if isinstance(judgement, str):
                self._leave_out(judgement, Problem(file, line, None, judgement))
                continue
            for comparison in comparisons(judgement.answers, self._columns.gap):
                if isinstance(comparison, str):
                    self._leave_out(comparison, Problem(file, line, None, comparison))
                    continue
                pair = _pair(self._columns, judgement, comparison, file, line)
                if isinstance(pair, Problem):
                    key = (pair.key or "row").partition("[")[0]
                    self._leave_out(f"a wrong `{key}`", pair)
                else:
                    self._made += 1
                    yield _row(pair, bool(judgement.id), judgement.split is not None)

    def named(self, fault: InputError) -> InputError:
        """The error of an import without any pair: the most frequent reason, and where it is first met."""
        if not self.first or self._made:
            return fault
        reason, count = self.left_out.most_common(1)[0]
        place = self.first[reason]
        known_by = f"; is this {self._columns.title}?" if place.key is None else ""
        sentence = f"{place.sentence}{known_by} No pair is left of {self.rows:,} rows ({count:,} times this reason)"
        return InputError([place._replace(sentence=f"{sentence}, so nothing is written")])

    def _judgements(self, items: Iterable[RawRow | Problem]) -> Iterator[PlacedJudgement]:
        for item in items:
            self.rows += 1
            if isinstance(item, Problem):
                self._leave_out("a row that cannot be read", item)
                continue
            try:
                row = columns_of(item.row)
            except ValueError as fault:
                self._leave_out("a row that cannot be read", Problem(item.file, item.line, None, str(fault)))
                continue
            for judgement in judgements_of(self._columns, row):
                if isinstance(judgement, Judgement) and judgement.split is None and item.part in ("train", "heldout"):
                    judgement = judgement._replace(split=item.part)
                yield PlacedJudgement(item.file, item.line, judgement)

    def _leave_out(self, reason: str, problem: Problem) -> None:
        self.left_out[reason] += 1
        self.first.setdefault(reason, problem)


def _pair(
    columns: PreferenceSet, judgement: Judgement, comparison: Comparison, file: str, line: int
) -> PreferencePair | Problem:
    """A comparison as the pair that `train` will read, or the first problem with it."""
    chosen, rejected = comparison
    row: dict[str, Any] = {"user_id": judgement.user, "chosen": chosen.text, "rejected": rejected.text}
    row |= {"prompt": judgement.prompt, "created_at": judgement.time, "split": judgement.split, "source": columns.name}
    if columns.in_order:
        row["place"] = f"{columns.answers.index(chosen.name) + 1}/{len(columns.answers)}"
    if judgement.id:
        names = () if columns.chosen else (chosen.name, rejected.name)
        row["id"] = "/".join(filter(None, (judgement.id, *names)))
    pair = parse_row(row, file, line)
    return pair[0] if isinstance(pair, list) else pair


def _row(pair: PreferencePair, with_id: bool, with_split: bool) -> dict[str, Any]:
    """A pair as a row of our file."""
    [first, *rest] = pair.prompt
    plain = not rest and first.role == "user"
    row: dict[str, Any] = {
        "user_id": pair.user_id,
        "prompt": first.content if plain else [message._asdict() for message in pair.prompt],
        "chosen": pair.chosen,
        "rejected": pair.rejected,
    }
    if with_id:
        row["id"] = pair.id
    if pair.created_at is not None:
        row["created_at"] = pair.created_at
    if with_split:
        row["split"] = pair.split
    if pair.place is not None:
        row["place"] = "/".join(map(str, pair.place))
    return row | {"source": pair.source}
