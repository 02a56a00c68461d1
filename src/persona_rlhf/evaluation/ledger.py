"""The ledger of looks: every adapter of a user that the gate tested, so that all looks of a user share one delta.

A look is written before the probes are asked, and closed with the alpha that its verdict allows. The same adapter
before the same exam is the same look, so a killed and resumed run pays once. A closed look keeps its first outcome: a
judgement that is repeated allows no more. Another adapter, probe, demand, judge or held-out pair makes a new look.

The ledger is chained (`common/chain.py`); heads of it are kept beside it and in the runs that use it. A ledger that
lacks one of them is an error: a restored backup would have forgotten looks.

looks.jsonl, looks.key and looks.head lie side by side. Users, adapters and units are named by HMACs (RFC 2104) under
the key, so that looks.jsonl alone names nobody. Deleting a user leaves these lines as they are.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from persona_rlhf.common.chain import NO_LINES, Chain, ChainEntry, ChainHead, LockedChain, entry_of
from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write, sha256_of
from persona_rlhf.evaluation.look_events import (
    BEGUN,
    CLOSED,
    OPENED,
    POOLED,
    RESTORE,
    Begun,
    Closed,
    Opened,
    Pooled,
    facts_of,
    line_fault,
)
from persona_rlhf.evaluation.spending import Look, PastLook, next_share

LOOKS = "looks.jsonl"
"""The name of a run's ledger in its folder, where `gate.ledger` names no other."""

_DIGITS, _UNIT_DIGITS = 32, 16  # hex digits of an HMAC; two of 10,000 units share theirs with a chance of 3e-12
_DAMAGED = f"this line was changed, or lines before it were removed; {RESTORE}"
_SHORTEST_KEY = 32  # bytes; a shorter key could be guessed by everybody who has a list of user ids


class LookKey(NamedTuple):
    """A look: the user's pseudonym (`common.files`), and sha256 of the adapter, of the certify probes and of the exam.

    The exam is all besides the adapter that decides the verdict: probes, demands, judge, base, held-out pairs.
    """

    user: str
    adapter: str
    bank: str
    exam: str


_NO_ENDS: Mapping[LookKey, int] = {}


class FreshUnit(NamedTuple):
    """A unit of a pool that no closed look of a user drew, and its place in the user's order."""

    name: str
    place: int


class LookPlan(NamedTuple):
    """Looks of each user that spend equal shares, such as those of a sweep."""

    name: str
    looks: int


class Family(NamedTuple):
    """The users who share one delta (`gate.family: all`), by pseudonym, and a name made of all of them."""

    name: str
    users: frozenset[str]

    @staticmethod
    def of(users: Iterable[str]) -> Family:
        """The family of these users, named by sha256 of their pseudonyms."""
        members = frozenset(users)
        return Family(hashlib.sha256("\x1f".join(sorted(members)).encode()).hexdigest(), members)


class KeptHead(NamedTuple):
    """A head of a ledger, the number of looks up to it, and its place."""

    head: ChainHead
    looks: int
    keeper: str


class _Taken(NamedTuple):
    """A look of a user as the ledger has it. `released` is the alpha that its verdict allows: 0 if failed or open.

    `family` is the digest of the family that it spends the delta of; empty where there is none, or none was recorded.
    `fresh`: the look draws fresh probes (`gate.sequential`), after the place `start` and up to `end`, None while open.
    """

    look: str
    share: float
    released: float
    plan: LookPlan | None
    family: str
    fresh: bool
    start: int = 0
    end: int | None = None

    @property
    def handed_on(self) -> bool:
        """Whether its share went to the next look: a pass does that on fresh probes, and a look that drew no probe."""
        return self.fresh and (self.released > 0 or self.end == self.start)


class Ledger:
    """A ledger of looks. Threads and processes may use one file at the same time.

    `kept` are heads that must be in it. Every method raises InputError for a ledger that lost a head, was damaged, or
    lies beside another key.
    """

    def __init__(self, file: Path, kept: Iterable[KeptHead] = ()) -> None:
        self.file, self._key_file, self._head_file = file, file.with_suffix(".key"), file.with_suffix(".head")
        self._kept = list(kept)
        self._reset()

    def _reset(self) -> None:
        """Begins to read the file anew."""
        self._offset, self._head, self._looks, self._key = 0, NO_LINES, 0, b""
        self._users: dict[str, list[_Taken]] = {}
        self._places: dict[str, tuple[str, int]] = {}  # by look: its user and its place
        self._open, self._banks, self._families = set[str](), Counter[str](), set[str]()
        self._pools, self._registered = list[list[str]](), set[str]()  # units in the order of their lines

    @property
    def head(self) -> KeptHead:
        """The head as last read or written."""
        return KeptHead(self._head, self._looks, "this program")

    @property
    def mark(self) -> str:
        """A hash that all copies of a ledger share, and no other one; empty where there is no ledger."""
        return sha256_of(self._key_file)[:_DIGITS] if self._key_file.is_file() else ""

    def uses(self, bank: str) -> int:
        """The number of looks at a bank (sha256 of its certify probes), as last read or written."""
        return self._banks[bank]

    def check(self, family: Family | None = None) -> None:
        """Reads the ledger, if there is one; nothing is written where there is none.

        Raises InputError where it has looks of other users than those of a `family`.
        """
        self._check_files()
        if self.file.exists():
            with self._locked():
                self._check_family(family)
        elif missing := self._all_kept():
            raise self._lost(missing)

    def open(
        self,
        keys: Sequence[LookKey],
        sequential: bool = False,
        plan: LookPlan | None = None,
        family: Family | None = None,
        pool: Iterable[str] = (),
    ) -> list[Look]:
        """Opens a look of each of several users, on the disk before this returns; one that is there stays as it is.

        `sequential` as in `next_share`. `pool`: the names of the units from which the looks draw. `family`: the users
        who share delta with these; raises as `check` does.
        """
        assert len({key.user for key in keys}) == len(keys), "two looks of one user at once"
        with self._locked() as chain:
            self._check_family(family)
            shared = {} if family is None else {"family": self._digest("family", family.name)}
            units = [unit for unit in map(self._unit, pool) if unit not in self._registered]
            new = list[tuple[str, dict[str, Any]]]([(POOLED, {"units": sorted(units)})] if units else [])
            for key in keys:
                if (name := self._name(key)) not in self._places:
                    user = self._digest("user", key.user)
                    planned = {} if plan is None else {"plan": plan.name, "planned": plan.looks}
                    facts = {
                        **({"fresh": True, "start": self._drawn(user)} if sequential else {}),
                        "user": user,
                        "look": name,
                        "bank": key.bank,
                        "number": len(self._users.get(user, ())) + 1,
                        "share": self._share(user, sequential, plan),
                    }
                    new.append((OPENED, facts | planned | shared))
            self._append(chain, new)
            return [self._look(self._name(key)) for key in keys]

    def fresh_units(self, key: LookKey, pool: Iterable[str]) -> list[FreshUnit]:
        """The units of a pool (names) that a look may draw, in an order of the user's that only the key foretells.

        It is over all units that ever were in a pool: later ones come behind it, and removed ones leave gaps. So no
        later look of the user draws a unit again.
        """
        user, place = self._places[self._name(key)]
        names, start = {self._unit(name): name for name in pool}, self._users[user][place].start
        order = (unit for units in self._pools for unit in sorted(units, key=partial(self._digest, "order", user)))
        return [FreshUnit(names[unit], n) for n, unit in enumerate(order, 1) if n > start and unit in names]

    @property
    def most_drawn(self) -> int:
        """The units that the user with the most has drawn."""
        return max(map(self._drawn, self._users), default=0)

    def _drawn(self, user: str) -> int:
        """The place up to which closed looks of a user drew units. Nobody has learnt an outcome of an open look."""
        return max((past.end or 0 for past in self._users.get(user, ())), default=0)

    def close(self, verdicts: Iterable[tuple[LookKey, float]], ends: Mapping[LookKey, int] = _NO_ENDS) -> list[float]:
        """Closes looks with the alphas that their verdicts allow, 0 for failed ones; returns the alphas recorded.

        `ends`: the places of the last units that they drew, or their starts, where they draw fresh ones.
        A closed look keeps its first verdict, which is the one returned; only its end advances where it is judged again
        and draws more. A pass in lines of early versions has no alpha, and is returned as 1, which bounds nothing.
        """
        with self._locked() as chain:
            named = {self._name(key): (key, alpha) for key, alpha in verdicts}
            closed = list[tuple[str, dict[str, Any]]]()
            for name, (key, alpha) in named.items():
                user, place = self._places[name]
                first, end, opened = self._users[user][place], ends.get(key), name in self._open
                if opened or (end or 0) > (first.end or 0):
                    kept = alpha if opened else first.released
                    facts = {"look": name, "passed": kept > 0, "alpha": float(kept)}
                    closed.append((CLOSED, facts if end is None else facts | {"end": end}))
            self._append(chain, closed)
            places = [self._places[name] for name in named]
            return [self._users[user][place].released for user, place in places]

    def _share(self, user: str, sequential: bool, plan: LookPlan | None) -> float:
        """The share of a user's next look.

        The looks of a plan have equal shares, of the same sum as without it. Shares of planned looks that were not
        taken yet are reserved.
        """
        taken = self._users.get(user, [])
        history = [PastLook(past.share, past.handed_on) for past in taken]
        plans: dict[LookPlan, list[float]] = {}
        for past in taken:
            if past.plan is not None:
                plans.setdefault(past.plan, []).append(past.share)
        if plan is not None and len(earlier := plans.get(plan, [])) in range(1, plan.looks):
            return earlier[0]
        for other, shares in plans.items():
            history += [PastLook(shares[0], False)] * (other.looks - len(shares))
        if plan is None or plan in plans:
            return next_share(history, sequential)
        for _ in range(plan.looks):
            history.append(PastLook(next_share(history, sequential), False))
        return sum(past.share for past in history[-plan.looks :]) / plan.looks

    def _look(self, name: str) -> Look:
        user, place = self._places[name]
        taken = self._users[user][: place + 1]
        spent = sum(past.share for past in taken if not past.handed_on or past.look == name)
        return Look(place + 1, taken[-1].share, spent, taken[-1].start)

    def _check_family(self, family: Family | None) -> None:
        """Raises InputError for a look that spent the delta of another family, or is of a user outside this one."""
        if family is None or self._families <= (digests := {self._digest("family", family.name)}):
            return
        members = {self._digest("user", user) for user in family.users}
        foreign = sum(
            any(past.family not in digests and (past.family or user not in members) for past in taken)
            for user, taken in self._users.items()
        )
        if foreign:
            sentence = (
                f"{foreign} of the {len(self._users)} users in this ledger are not of this run, or shared delta with "
                "others; with `gate.family: all` the users of one run share one delta, so name another ledger, or none"
            )
            raise InputError([Problem(str(self.file), None, "gate.ledger", sentence)])

    @contextmanager
    def _locked(self) -> Iterator[LockedChain]:
        """The ledger under a lock, read up to its end; begun where there is none."""
        self._check_files()
        if not self.file.exists() and (kept := self._all_kept()):
            raise self._lost(kept)
        with Chain(self.file).locked() as chain:
            if chain.head == NO_LINES:
                if kept := self._all_kept():
                    raise self._lost(kept)
                if not self._key_file.exists():
                    atomic_write(self._key_file, secrets.token_hex(32), private=True)
                self._append(chain, [(BEGUN, {"key": sha256_of(self._key_file)})])
            self._read(chain)
            if self._looks > 1 and not self._head_file.is_file():
                sentence = "this file is gone, so nobody can tell whether looks were lost; restore it with the ledger"
                raise InputError([Problem(str(self._head_file), None, "gate.ledger", sentence)])
            yield chain

    def _check_files(self) -> None:
        """Raises InputError where a folder or device has the name of one of the three files, or the key is short."""
        for file in (self.file, self._key_file, self._head_file):
            if file.exists() and not file.is_file():
                sentence = "this is no regular file, so nothing can be kept in it; move it away, or name another ledger"
                raise InputError([Problem(str(file), None, "gate.ledger", sentence)])
        if self._key_file.exists() and (size := self._key_file.stat().st_size) < _SHORTEST_KEY:
            why = f"this key has {size} bytes; one of fewer than {_SHORTEST_KEY} can be guessed by a list of user ids"
            sentence = f"{why}; restore the key of the ledger, or remove this one where there is no ledger yet"
            raise InputError([Problem(str(self._key_file), None, "gate.ledger", sentence)])

    def _append(self, chain: LockedChain, events: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Appends events, reads them back, and keeps the new head beside the ledger."""
        if events:
            chain.append(events)
            self._read(chain)
            kept = {"head": str(self._head), "looks": self._looks}
            atomic_write(self._head_file, json.dumps(kept) + "\n")

    def _read(self, chain: LockedChain) -> None:
        """Reads the lines since the last time, and checks that no kept head was lost."""
        before = self.head
        missing = {kept.head: kept for kept in self._all_kept() if kept.head.seq > before.head.seq}
        for line in chain.lines(self._offset):
            entry = entry_of(line)
            if entry is None or (entry.seq, entry.previous) != (self._head.seq + 1, self._head.hash):
                break
            self._offset, self._head = self._offset + len(line), entry.head
            self._apply(entry)
            missing.pop(entry.head, None)
        if self._head == chain.head and not missing:
            return
        if before.head == NO_LINES:
            raise self._lost(list(missing.values())) if missing else line_fault(self.file, self._head.seq + 1, _DAMAGED)
        self._kept.append(before)  # the file was replaced since the last time
        self._reset()
        self._read(chain)

    def _apply(self, entry: ChainEntry) -> None:
        match facts_of(entry, self.file):
            case Begun(key):
                self._key = self._read_key(key)
            case Pooled(units):
                self._pools.append(units)
                self._registered.update(units)
            case Opened() as opened:
                plan = None if opened.plan is None else LookPlan(opened.plan, opened.planned)
                taken = self._users.setdefault(opened.user, [])
                self._places[opened.look] = opened.user, len(taken)
                taken.append(_Taken(opened.look, opened.share, 0.0, plan, opened.family, opened.fresh, opened.start))
                self._families.add(opened.family)
                self._open.add(opened.look)
                self._looks += 1
                self._banks[opened.bank] += 1
            case Closed(look, passed, alpha, end):
                if look not in self._places:
                    raise line_fault(self.file, entry.seq, f"this line closes a look that no line opened; {RESTORE}")
                user, place = self._places[look]
                released = float(passed) if alpha is None else alpha
                self._users[user][place] = self._users[user][place]._replace(released=released, end=end)
                self._open.discard(look)

    def _read_key(self, digest: str) -> bytes:
        """The key. Raises InputError where it is gone, or another one: every user would be new to the ledger."""
        if not self._key_file.is_file() or sha256_of(self._key_file) != digest:
            why = "is not the key of this ledger" if self._key_file.exists() else "is gone"
            sentence = f"this file {why}; without it nobody's looks can be told: restore the key that lay beside it"
            raise InputError([Problem(str(self._key_file), None, "gate.ledger", sentence)])
        return self._key_file.read_bytes()

    def _name(self, key: LookKey) -> str:
        return self._digest("look", *key)

    def _unit(self, name: str) -> str:
        return self._digest("unit", name)[:_UNIT_DIGITS]

    def _digest(self, *parts: str) -> str:
        return hmac.digest(self._key, "\x1f".join(parts).encode(), "sha256").hex()[:_DIGITS]

    def _all_kept(self) -> list[KeptHead]:
        """The heads that must be in the ledger: those given, the one beside it, and the one last read."""
        kept = [*self._kept, *([] if self._head == NO_LINES else [self.head])]
        if not self._head_file.is_file():
            return kept
        try:
            beside = json.loads(self._head_file.read_bytes())
            kept.append(KeptHead(ChainHead.parse(str(beside["head"])), int(beside["looks"]), str(self._head_file)))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as fault:
            sentence = f"this file holds no head of a ledger ({type(fault).__name__}); restore it with the ledger"
            raise InputError([Problem(str(self._head_file), None, "gate.ledger", sentence)]) from None
        return kept

    def _lost(self, kept: Sequence[KeptHead]) -> InputError:
        """The error that the ledger lacks heads: the newest of them counts the looks that are missing."""
        newest = max(kept, key=lambda one: one.head.seq)
        entries = list(Chain(self.file))
        looks = newest.looks - sum(entry.event == OPENED for entry in entries)
        state = f"it ends at line {len(entries)}" if newest.head.seq > len(entries) else "that line is another one"
        amount = f"{looks} of {newest.looks} looks are missing" if looks > 0 else "looks were changed"
        sentence = (
            f"this ledger has forgotten looks: {newest.keeper} keeps its head {str(newest.head)[:20]}..., but "
            f"{state if self.file.exists() else 'there is no such file'}; {amount}. "
            "Restore its newest copy: without these looks delta would be spent twice"
        )
        return InputError([Problem(str(self.file), None, "gate.ledger", sentence)])


def bank_uses(ledger: Path, bank: str) -> int:
    """The number of looks at a bank (sha256 of its certify probes); 0 where there is no ledger."""
    return sum(entry.event == OPENED and entry.facts.get("bank") == bank for entry in Chain(ledger))
