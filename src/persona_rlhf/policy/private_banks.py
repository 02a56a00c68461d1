"""Private banks of certify probes: a folder outside every repository, and draws from it.

A folder holds files CATEGORY.jsonl and CATEGORY.NAME.jsonl in the form of `hazards.read_probes`, the *pool*, and files
`draw-0001.json`, `draw-0002.json`, ... The probes of the newest draw take the place of the public `certify` probes, of
which none decides any more: they join `test`. A draw takes whole units, as the gate counts them: a topic, a new
phrasing, or a single new combination. Units that no earlier draw used come first.

With `gate.sequential` no draw decides: each look draws for itself from the whole pool (`evaluation.sequential`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random, SystemRandom
from typing import Any, Literal, NamedTuple

from persona_rlhf.common.clock import now
from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write, shipped_root
from persona_rlhf.config.experiment import PolicySettings
from persona_rlhf.policy.hazards import Novelty, Probe, bank_hash, read_probes
from persona_rlhf.policy.judges import plain
from persona_rlhf.policy.rules import Restriction

FOLDER, KEY = "policy.private_banks", "policy.split_key"
DRAW = "draw-{:04}.json"
PER_CATEGORY = 180
"""Probes of each category that a draw has by default."""

ROTATE = "`persona-rlhf policy bank rotate CONFIG`"
_DRAW_MORE = "draw more with `persona-rlhf policy bank rotate CONFIG --per-category N`, or add rows to the folder"


class BankChoice(NamedTuple):
    """The folder of private banks and the split key (32 bytes); None for the public ones.

    draw_anew: probes of each category of a new draw, which takes the place of the newest one on the disk
    whole_pool: whether the whole pool certifies, and no draw of it (`gate.sequential`)
    leave_out: (category, id) of rows that a new draw does not take
    """

    folder: Path | None = None
    split_key: bytes | None = None
    draw_anew: int | None = None
    whole_pool: bool = False
    leave_out: frozenset[tuple[str, str]] = frozenset()


PUBLIC = BankChoice()


class BankInfo(NamedTuple):
    """The origin of the `certify` probes, without any text of them.

    sha256: of the `certify` probes
    draw: number of the draw from a private bank
    split_key: hash of the split key of one's own
    pool: units of the pool from which each look draws for itself (`gate.sequential`)
    """

    kind: Literal["public", "private"]
    sha256: str
    draw: int | None = None
    split_key: str | None = None
    pool: int | None = None

    def __str__(self) -> str:
        """`private, draw 3`, or `private, a pool of 1,900 units`."""
        draw = "" if self.draw is None else f", draw {self.draw}"
        draw += "" if self.pool is None else f", a pool of {self.pool:,} units"
        return f"{self.kind}{draw}{', split by a key of its own' if self.split_key else ''}"


class Draw(NamedTuple):
    """A selection of a pool: its number, its time (UTC), the ids by category, and the hash of the probes."""

    number: int
    drawn: str
    ids: dict[str, tuple[str, ...]]
    sha256: str

    @property
    def members(self) -> frozenset[tuple[str, str]]:
        """(category, id) of every probe."""
        return frozenset((category, name) for category, names in self.ids.items() for name in names)

    def to_json(self) -> dict[str, Any]:
        """The content of its file."""
        return {"format": 1, **self._asdict()}


class PrivatePool(NamedTuple):
    """The probes of a folder that may certify, its draws from the first to the newest, and the rows left out."""

    folder: Path
    probes: tuple[Probe, ...]
    draws: tuple[Draw, ...]
    left_out: int = 0

    @property
    def used(self) -> frozenset[tuple[str, str]]:
        """(category, id) of every probe of a draw."""
        return frozenset(member for draw in self.draws for member in draw.members)

    def units_in(self, draws: Iterable[Draw]) -> frozenset[str]:
        """The names of the units of which some of these draws had a probe."""
        members = {member for draw in draws for member in draw.members}
        return frozenset(unit_name(probe) for probe in self.probes if (probe.category, probe.id) in members)


class PrivateBank(NamedTuple):
    """A pool, and the draw of it that is in force; None where the whole pool is (`gate.sequential`)."""

    pool: PrivatePool
    draw: Draw | None

    @property
    def name(self) -> str:
        """`draw 3 of the private banks`."""
        return "the pool of the private banks" if self.draw is None else f"draw {self.draw.number} of the private banks"

    @property
    def remedy(self) -> str:
        """The remedy for too few probes."""
        return "add rows to the folder" if self.draw is None else _DRAW_MORE

    @property
    def drawn(self) -> list[Probe]:
        """The probes that certify."""
        members = self._members
        return [probe for probe in self.pool.probes if (probe.category, probe.id) in members]

    @property
    def reserve(self) -> list[Probe]:
        """The rest of the pool, which certifies nothing now."""
        members = self._members
        return [probe for probe in self.pool.probes if (probe.category, probe.id) not in members]

    @property
    def _members(self) -> frozenset[tuple[str, str]]:
        everything = frozenset((probe.category, probe.id) for probe in self.pool.probes)
        return everything if self.draw is None else self.draw.members

    @property
    def fresh(self) -> list[Probe]:
        """The probes of the pool of whose unit neither this draw nor an earlier one had a probe."""
        used = self.pool.used | (frozenset() if self.draw is None else self.draw.members)
        units = {_unit_of(probe) for probe in self.pool.probes if (probe.category, probe.id) in used}
        return [probe for probe in self.pool.probes if _unit_of(probe) not in units]

    def certifying(self, restrictions: Sequence[Restriction]) -> list[Restriction]:
        """The restrictions with the draw as their `certify` probes; the public ones of these join `test`."""
        drawn = self.drawn
        return [
            replace(
                rule,
                probes=(
                    *(probe._replace(split="test") if probe.split == "certify" else probe for probe in rule.probes),
                    *(probe for probe in drawn if probe.category == rule.category),
                ),
            )
            for rule in restrictions
        ]


def need_outside(path: Path, key: str, run: Path | None = None) -> None:
    """Raises InputError for a path inside a repository, the toolkit's own files or a run: it would be published."""
    try:
        place = path.expanduser().resolve()
        inside = next((folder for folder in (place, *place.parents) if (folder / ".git").exists()), None)
    except OSError as fault:  # such as a name too long
        raise InputError([Problem(str(path), None, key, f"this path cannot be used ({fault.strerror})")]) from None
    why = None if inside is None else f"it lies in the repository {inside}, so a commit would publish it"
    if place.is_relative_to(shipped_root().resolve()):
        why = "it lies among the toolkit's own files"
    if run is not None and place.is_relative_to(run.resolve()):
        why = f"it lies in the run {run}, which is shared and reported"
    if why is not None:
        raise InputError([Problem(str(path), None, key, f"{why}; move it to a folder of its own")])


def need_private(settings: PolicySettings, run: Path) -> None:
    """Raises InputError where the private banks or the split key of a config lie inside a run."""
    for path, key in ((settings.private_banks, FOLDER), (settings.split_key, KEY)):
        if path is not None:
            need_outside(path, key, run)


def private_bank(choice: BankChoice, restrictions: Sequence[Restriction]) -> PrivateBank | None:
    """The private bank of a choice; None where it names no folder. Raises InputError with every problem of the folder.

    A new draw is not written.
    """
    if choice.folder is None:
        return None
    pool = read_pool(choice.folder, restrictions)
    if choice.whole_pool:
        return PrivateBank(pool, None)
    if choice.draw_anew is not None:
        rest = tuple(probe for probe in pool.probes if (probe.category, probe.id) not in choice.leave_out)
        return PrivateBank(pool, draw_probes(pool._replace(probes=rest), choice.draw_anew))
    if not pool.draws:
        raise InputError([Problem(str(choice.folder), None, FOLDER, f"no probes were drawn yet; run {ROTATE}")])
    newest = pool.draws[-1]
    bank = PrivateBank(pool, newest)
    if bank_hash(bank.drawn) != newest.sha256:
        sentence = f"probes of draw {newest.number} were changed or removed; restore their rows, or run {ROTATE}"
        raise InputError([Problem(str(choice.folder), None, FOLDER, sentence)])
    return bank


def read_pool(folder: Path, restrictions: Sequence[Restriction]) -> PrivatePool:
    """The pool and the draws of a folder. Raises InputError with every problem.

    Rows are left out that a base may have learnt, or that are of an unseen topic of the documents' `dev` and `test`.
    """
    need_outside(folder, FOLDER)
    if not folder.is_dir():
        raise InputError([Problem(str(folder), None, FOLDER, "there is no such folder of private banks")])
    problems: list[Problem] = []
    probes: list[Probe] = []
    left_out = 0
    by_category = {rule.category: rule for rule in restrictions}
    ledgers = {file.stem for file in folder.glob("*.key")}  # a ledger of looks may lie beside the banks
    for file in sorted(file for file in folder.glob("*.jsonl") if file.stem not in ledgers):
        rule = by_category.get(file.name.split(".")[0])
        if rule is None:
            names = ", ".join(by_category)
            sentence = f"the policy restricts no such category; name files CATEGORY.jsonl, of {names}"
            problems.append(Problem(str(file), None, FOLDER, sentence))
            continue
        try:
            rows = read_probes(file, rule.category)
            eligible = _eligible(rows, rule)
            probes += eligible
            left_out += len(rows) - len(eligible)
        except InputError as fault:
            problems += fault.problems
    problems += _clashes(folder, probes, restrictions)
    for category in by_category if not problems else ():
        if not any(probe.category == category for probe in probes):
            sentence = f"there is no bank of `{category}`; every restricted category needs {category}.jsonl"
            problems.append(Problem(str(folder), None, FOLDER, sentence))
    if problems:
        raise InputError(problems)
    return PrivatePool(folder, tuple(probes), tuple(_read_draws(folder)), left_out)


def _eligible(probes: Sequence[Probe], rule: Restriction) -> list[Probe]:
    """The probes that may certify, each with the part of it that is unseen among the probes that train.

    Left out are trained topics in trained phrasings, and unseen topics that the documents' banks use in other splits.
    """
    trained = [probe for probe in rule.probes if probe.split == "train"]
    topics, phrasings = {probe.topic for probe in trained}, {probe.phrasing for probe in trained}
    elsewhere = {probe.topic for probe in rule.probes if probe.novelty == "topic" and probe.split != "certify"}
    kept = []
    for probe in probes:
        novelty: Novelty = "topic" if probe.topic not in topics else probe.novelty
        if novelty == "combination" and probe.phrasing not in phrasings:
            novelty = "phrasing"
        trained_topic = probe.topic in topics and probe.novelty == "topic"
        if trained_topic or probe.topic in elsewhere or (probe.split, novelty) == ("train", "combination"):
            continue
        kept.append(probe._replace(split="certify", novelty=novelty))
    return kept


def _clashes(folder: Path, probes: Sequence[Probe], restrictions: Sequence[Restriction]) -> list[Problem]:
    """Probes of a pool that stand in it twice, or that everybody can read in a bank of the documents."""
    public = {plain(probe.prompt) for rule in restrictions for probe in rule.probes}
    ids, prompts = set[tuple[str, str]](), set[str]()
    problems = []
    for probe in probes:
        words = plain(probe.prompt)
        why = "a bank of the documents has its prompt, so it is not private" if words in public else None
        why = "another row has its prompt" if words in prompts else why
        why = "another row has its id" if (probe.category, probe.id) in ids else why
        if why is not None:
            problems.append(Problem(str(folder), None, FOLDER, f"probe `{probe.id}`: {why}; remove the row"))
        ids.add((probe.category, probe.id))
        prompts.add(words)
    return problems


def _read_draws(folder: Path) -> list[Draw]:
    """The draws by number. Raises InputError where one is missing or no draw."""
    draws = []
    for number, file in enumerate(sorted(folder.glob("draw-*.json")), 1):
        try:
            content = json.loads(file.read_bytes())
            ids = {category: tuple(map(str, names)) for category, names in content["ids"].items()}
            draw = Draw(int(content["number"]), str(content["drawn"]), ids, str(content["sha256"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as fault:
            sentence = f"this is no record of a draw ({type(fault).__name__}); restore the file"
            raise InputError([Problem(str(file), None, FOLDER, sentence)]) from None
        if (draw.number, file.name) != (number, DRAW.format(number)):
            sentence = f"draw {number} is missing, so its probes would count as fresh; restore {DRAW.format(number)}"
            raise InputError([Problem(str(folder), None, FOLDER, sentence)])
        draws.append(draw)
    return draws


def _unit_of(probe: Probe) -> Hashable:
    """The unit that is drawn whole: a topic, a new phrasing with all its categories, or the probe alone."""
    if probe.novelty == "topic":
        return "topic", probe.category, probe.topic
    if probe.novelty == "phrasing" and probe.phrasing != probe.prompt:
        return "phrasing", probe.phrasing
    return "probe", probe.category, probe.id


def unit_name(probe: Probe) -> str:
    """The name of a probe's unit. A look of `gate.sequential` asks a unit once, under whatever other rows it has."""
    return json.dumps(_unit_of(probe))


def draw_probes(pool: PrivatePool, per_category: int, rng: Random | None = None) -> Draw:
    """A draw of at least `per_category` probes of each category, of fresh units as far as there are any.

    After them come the units whose last draw is the longest ago. Raises InputError where the pool has too few probes.
    """
    sizes = Counter(probe.category for probe in pool.probes)
    short = {name: n for name, n in sizes.items() if n < per_category}
    if short:
        counts = ", ".join(f"{name} has {n}" for name, n in sorted(short.items()))
        sentence = f"a draw of {per_category} probes a category needs more rows: {counts}; add rows, or draw fewer"
        raise InputError([Problem(str(pool.folder), None, "--per-category", sentence)])
    units: dict[Hashable, list[Probe]] = {}
    for probe in pool.probes:
        units.setdefault(_unit_of(probe), []).append(probe)
    last = {member: draw.number for draw in pool.draws for member in draw.members}
    order = list(units.values())
    (rng or SystemRandom()).shuffle(order)
    order.sort(key=lambda unit: max(last.get((probe.category, probe.id), 0) for probe in unit))
    drawn, taken = list[Probe](), Counter[str]()
    for unit in order:
        if any(taken[probe.category] < per_category for probe in unit):
            drawn += unit
            taken.update(probe.category for probe in unit)
    ids = {name: tuple(sorted(p.id for p in drawn if p.category == name)) for name in sorted(sizes)}
    return Draw(len(pool.draws) + 1, now(), ids, bank_hash(drawn))


def write_draw(bank: PrivateBank) -> Path:
    """Writes the draw of a bank beside the earlier ones, whole or not at all; it is in force from then on."""
    assert bank.draw is not None, "a whole pool is no draw"
    file = bank.pool.folder / DRAW.format(bank.draw.number)
    atomic_write(file, json.dumps(bank.draw.to_json(), indent=1) + "\n", private=True)
    return file
