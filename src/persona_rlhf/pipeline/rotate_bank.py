"""The bank of a deployment: its state, and its rotation to `certify` probes that have not certified before."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.config.experiment import PolicySettings
from persona_rlhf.data.pool_copies import PoolCopy, pool_copies
from persona_rlhf.evaluation.ledger import Ledger, bank_uses
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.policy.policy import Policy
from persona_rlhf.policy.private_banks import (
    FOLDER,
    KEY,
    PER_CATEGORY,
    PUBLIC,
    BankChoice,
    BankInfo,
    need_outside,
    write_draw,
)
from persona_rlhf.policy.split_key import append_split_key, is_blank, key_bytes, read_split_key, read_split_keys

NO_RESET = (
    "The promise is per user, over all releases: a rotation does not reset delta, and every look still counts in the "
    "ledger."
)


_NAMED = 5
"""Near copies that the table names; the JSON names all."""


class BankStatus(NamedTuple):
    """A bank in numbers, by category.

    certify: the probes that certify; `repeated`: those of them that certified before, by an earlier draw or key
    fresh: the probes of a private folder that no draw has used yet
    left_out: rows of a private folder that cannot certify, since they are trained or of another split
    copies: rows of a private folder that no draw takes, since they are near copies of others
    looks: looks at the bank that the ledger of the config counts; None where it names none
    drawn: units of a pool that looks of one user have drawn, of the user who has drawn most (`gate.sequential`)
    """

    bank: BankInfo
    certify: Mapping[str, int]
    repeated: Mapping[str, int]
    fresh: Mapping[str, int]
    left_out: int
    looks: int | None = None
    drawn: int | None = None
    copies: Sequence[PoolCopy] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain JSON; near copies by their ids."""
        copies = [{"category": copy.probe.category, "id": copy.probe.id, "of": copy.of} for copy in self.copies]
        return {**self._asdict(), "bank": self.bank._asdict(), "copies": copies}

    def table(self) -> Table:
        """The numbers for a terminal."""
        left_out = [f"{self.left_out:,} rows are left out: trained, or of another split"] if self.left_out else []
        if self.copies:
            named = "; ".join(f"{copy.probe.id} of {copy.of}" for copy in self.copies[:_NAMED])
            rest = f"; and {len(self.copies) - _NAMED:,} more (--json)" if len(self.copies) > _NAMED else ""
            left_out.append(f"{len(self.copies):,} rows are left out as near copies: {named}{rest}; reword them")
        title = f"bank: {self.bank}" + ("" if self.looks is None else f", used for {self.looks:,} looks")
        title += "" if self.drawn is None else f"; {self.drawn:,} units drawn by the user with most"
        table = Table(
            "category", "certify", "certified before", "fresh", title=title, caption="\n".join(left_out) or None
        )
        for name, n in self.certify.items():
            fresh = "-" if self.bank.kind == "public" else f"{self.fresh.get(name, 0):,}"
            table.add_row(name, f"{n:,}", f"{self.repeated.get(name, 0):,}", fresh)
        return table


class Rotation(NamedTuple):
    """A bank after its rotation, and the file that records it."""

    status: BankStatus
    file: Path

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {**self.status.to_json(), "file": str(self.file), "note": NO_RESET}


def bank_status(settings: PolicySettings, ledger: Path | None = None, sequential: bool = False) -> BankStatus:
    """The bank of a config, and its looks in a ledger. Raises InputError as `Policy.of` and `Ledger.check` do.

    `sequential` (`gate.sequential`): looks draw from the whole pool.
    """
    policy, earlier = Policy.of(settings, sequential=sequential), set[tuple[str, str]]()
    if policy.private is not None and sequential:
        earlier = set(policy.private.pool.used)
    elif policy.private is not None:
        earlier = {member for draw in policy.private.pool.draws[:-1] for member in draw.members}
    elif settings.split_key is not None:
        earlier = _certified_before(settings, read_split_keys(settings.split_key)[:-1])
    status = _status(policy, earlier)
    if ledger is None:
        return status
    drawn = None
    if sequential:
        looks = Ledger(ledger)
        looks.check()
        drawn = looks.most_drawn
    return status._replace(looks=bank_uses(ledger, policy.bank.sha256), drawn=drawn)


def rotate_bank(settings: PolicySettings, per_category: int = PER_CATEGORY) -> Rotation:
    """Draws new `certify` probes from the private folder; without a folder, a new split key.

    Fresh probes come first. Documents and banks are checked under the new draw or key before it is written beside the
    old one. Raises InputError where a config names neither, or where they have too few probes for their demands.
    """
    if settings.private_banks is not None:
        key = None if settings.split_key is None else read_split_key(settings.split_key)
        copies = pool_copies(Policy.of(settings, sequential=True))
        leave_out = frozenset((copy.probe.category, copy.probe.id) for copy in copies)
        choice = BankChoice(settings.private_banks, key, per_category, leave_out=leave_out)
        policy = Policy.read(settings.documents, banks=choice)
        assert policy.private is not None
        return Rotation(_status(policy, policy.private.pool.used), write_draw(policy.private))
    if settings.split_key is None:
        sentence = f"there is no private bank to rotate; name a folder of banks here, or a key file as {KEY}"
        raise InputError([Problem("config", None, FOLDER, sentence)])
    need_outside(settings.split_key, KEY)
    earlier = [] if is_blank(settings.split_key) else read_split_keys(settings.split_key)
    line = secrets.token_hex(32)
    policy = Policy.read(settings.documents, banks=BankChoice(split_key=key_bytes(line)))
    status = _status(policy, _certified_before(settings, earlier))
    append_split_key(settings.split_key, line)
    return Rotation(status, settings.split_key)


def _status(policy: Policy, before: Iterable[tuple[str, str]]) -> BankStatus:
    certify, before = policy.probes("certify"), frozenset(before)
    repeated = [probe for probe in certify if (probe.category, probe.id) in before]
    if policy.private is None:
        return BankStatus(policy.bank, _sizes(certify), _sizes(repeated), {}, 0)
    copies = pool_copies(policy)
    near = {copy.probe for copy in copies}
    fresh = [probe for probe in policy.private.fresh if probe not in near]
    left_out = policy.private.pool.left_out
    return BankStatus(policy.bank, _sizes(certify), _sizes(repeated), _sizes(fresh), left_out, copies=copies)


def _sizes(probes: Iterable[Probe]) -> Counter[str]:
    return Counter(probe.category for probe in probes)


def _certified_before(settings: PolicySettings, keys: Iterable[bytes]) -> set[tuple[str, str]]:
    """(category, id) of the probes that certify under the public split or one of these keys."""
    policies = [
        Policy.read(settings.documents, banks=choice)
        for choice in (PUBLIC, *(BankChoice(split_key=key) for key in keys))
    ]
    return {(probe.category, probe.id) for policy in policies for probe in policy.probes("certify")}
