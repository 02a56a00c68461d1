"""The sign-off packet: one page for the officer responsible for a run.

It shows rules with issuers, demanded and shown bounds, their limits, exceptions, counts, changes since an earlier run,
and fields for the decision. Users appear as pseudonyms and counts, without their texts. The page holds its own sha256
and the head of the run's audit.jsonl: a copy kept elsewhere is evidence of both.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from persona_rlhf.common.errors import InputError, Problem, visible
from persona_rlhf.common.files import atomic_write, pseudonym
from persona_rlhf.evaluation.gate import POOLED
from persona_rlhf.release import integrity
from persona_rlhf.release.render import render_template
from persona_rlhf.release.report import config_of, policy_of, screening_of, screens_in
from persona_rlhf.release.results import NOTHING, Result, RunResults, RunSummary, guarantee_of_run, summarise
from persona_rlhf.release.revocation import revoked
from persona_rlhf.release.signing import copy_of, read_signature, signature_of
from persona_rlhf.release.verify import revocation_notes, verify

_BLANK = "0" * 64
_SELF = re.compile(rb'<code id="sha256">([0-9a-f]{64})</code>')
_SLUG = re.compile(r"[a-z0-9-]+-[0-9a-f]{12}")
_MOST = 1000  # exceptions with a row of their own
_PLACES = {"document", "line", "bank", "narrowed_by"}  # of a rule: its place, not its content


class ExceptionCase(NamedTuple):
    """A user who was not released without conditions: pseudonym, status and reason."""

    user: str
    what: str
    why: str


class DemandEvidence(NamedTuple):
    """One demand of the gate, and the lower bounds of the released users."""

    name: str
    tier: int
    demand: float
    users: int
    lowest: float | None
    middle: float | None
    probes: int | None


class RunChange(NamedTuple):
    """One difference from an earlier run: its name, and the value then and now."""

    what: str
    before: str
    now: str


def write_packet(run: Path, out: Path, against: Path | None = None, approver: str | None = None) -> str:
    """Writes the packet of a finished run to `out`; returns the sha256 that it holds of itself.

    `against` is the run that was signed off before. Raises InputError if a run has no results or no policy, or `out`
    lies in the run, whose manifest covers all its files.
    """
    if run.resolve() in out.resolve().parents:
        sentence = "the manifest of a run covers all its files; write the packet outside the run"
        raise InputError([Problem(str(out), None, "--out", sentence)])
    page = render(run, against, approver).encode()
    digest = hashlib.sha256(page).hexdigest()
    atomic_write(out, _with_hash(page, digest))
    return digest


def packet_faults(file: Path) -> list[str]:
    """The fault of a packet that does not match its own hash; an empty list if it matches."""
    raw = file.read_bytes()
    match = _SELF.search(raw)
    if match is None:
        return ["this is no sign-off packet: it does not hold its own hash"]
    same = hashlib.sha256(_with_hash(raw, _BLANK)).hexdigest() == match[1].decode()
    return [] if same else ["the packet was changed: it does not match its own hash"]


def _with_hash(page: bytes, digest: str) -> bytes:
    """The page with this digest in place of its own hash."""
    match = _SELF.search(page)
    assert match is not None
    return page[: match.start(1)] + digest.encode() + page[match.end(1) :]


def render(run: Path, against: Path | None = None, approver: str | None = None) -> str:
    """The page, with zeros in place of its own hash."""
    results, policy, config = RunResults(run), policy_of(run), config_of(run)
    summary = summarise(results)
    promise = guarantee_of_run(config, policy, results, summary.users)
    cases = list(exceptions(run, results))
    return render_template(
        "packet.html.j2",
        name=visible(str(config.get("name", run.name))),
        day=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        blank=_BLANK,
        approver=approver,
        policy=policy,
        documents=[{**d, "signed": _signed(run, d)} for d in _upper(policy)],
        of_end_users=sum(d["tier"] > 2 for d in policy.get("documents", [])),
        gate={"enabled": True, "family": "each"} | (config.get("gate") or {}),
        summary=summary,
        shown=bounds_shown(policy, results),
        promise=NOTHING if promise is None else promise.sentence(),
        exceptions=cases[:_MOST],
        counts=Counter(case.what.partition(" at alpha")[0] for case in cases),
        screening=screening_of(run),
        screens=screens_in(run),
        against=None if against is None else visible(str(config_of(against).get("name", against.name))),
        changes=[] if against is None else changes(against, run),
        head=integrity.head(run),
        faults=_without_names(verify(run), results),
        notes=_without_names(revocation_notes(run), results),
    )


def _without_names(faults: Iterable[str], results: Iterable[Result]) -> list[str]:
    """Faults with pseudonyms in place of slugs, which show a part of the id."""
    pseudonyms = {result.slug: f"user {pseudonym(result.user_id)}" for result in results}
    return [visible(_SLUG.sub(lambda match: pseudonyms.get(match[0], match[0]), fault)) for fault in faults]


def bounds_shown(policy: Mapping[str, Any], results: Iterable[Result]) -> list[DemandEvidence]:
    """Every demand with the lowest and the median lower bound of the released users."""
    restrictions = policy.get("restrictions", [])
    demands = {POOLED: (1, policy["certify"]["min_refusal"], None)} | {
        rule["category"]: (rule["tier"], rule["min_refusal"], rule["probes"].get("certify", 0)) for rule in restrictions
    }
    shown: dict[str, list[float]] = {name: [] for name in demands}
    for result in results:
        if result.has_adapter:
            for name, count in {**(result.tier_one or {}), **result.tier_two}.items():
                shown.setdefault(name, []).append(count.lower_bound)
    return [
        DemandEvidence(
            name, tier, demand, len(bounds), min(bounds, default=None), median(bounds) if bounds else None, probes
        )
        for name, (tier, demand, probes) in demands.items()
        for bounds in [shown[name]]
    ]


def exceptions(run: Path, results: Iterable[Result]) -> Iterable[ExceptionCase]:
    """Users with the prior, held back, failed, skipped, with an alarm, below full strength or revoked since."""
    revocations = revoked(run)
    for one in results:
        user, revocation = pseudonym(one.user_id), revocations.get(one.manifest_sha256 or "")
        if revocation is not None:
            yield ExceptionCase(user, "revoked", revocation.sentence())
        if one.status == "held_back":
            yield ExceptionCase(user, "held back for harm" if one.harmful else "held back", one.reason)
        elif one.status == "prior":
            yield ExceptionCase(user, f"the population's adapter at alpha {one.alpha:g}", one.reason)
        elif one.status != "released":  # the reason of an internal fault may quote data
            yield ExceptionCase(user, one.status, "see the results of the run")
        elif one.alpha < 1:
            yield ExceptionCase(user, f"released at alpha {one.alpha:g}", one.reason)
        if one.alarm:
            yield ExceptionCase(user, "alarm", "pairs against the policy")


def changes(before: Path, now: Path) -> list[RunChange]:
    """Differences from an earlier run: documents, demands, rules by id, and counts of users."""
    one, two = policy_of(before), policy_of(now)
    return [
        *_changed("policy hash", one.get("hash"), two.get("hash")),
        *_by_key("document of tier", *({d["tier"]: _document(d) for d in _upper(p)} for p in (one, two))),
        *_by_key("gate demand:", one.get("certify", {}), two.get("certify", {})),
        *_by_key("rule", _rules(one), _rules(two)),
        *_by_key("users", _counts(before), _counts(now)),
    ]


def _counts(run: Path) -> dict[str, int]:
    summary: RunSummary = summarise(RunResults(run))
    return {
        "in all": summary.users,
        "released": summary.released,
        "with the population's adapter": summary.prior,
        "held back": summary.held_back,
        "of these for harm": summary.harmful,
        "failed": summary.failed,
        "skipped": summary.other - summary.failed,
        "in alarm": summary.alarms,
        "revoked": len(revoked(run)),
    }


def _by_key(what: str, before: Mapping[Any, object], now: Mapping[Any, object]) -> list[RunChange]:
    keys = dict.fromkeys([*before, *now])
    return [change for key in keys for change in _changed(f"{what} {key}", before.get(key), now.get(key))]


def _changed(what: str, before: object, now: object) -> list[RunChange]:
    if before == now:
        return []
    return [RunChange(what, *("none" if value is None else str(value) for value in (before, now)))]


def _rules(policy: Mapping[str, Any]) -> dict[str, object]:
    """The content of every rule of tiers one and two, by rule id and key."""
    rules: Sequence[Mapping[str, Any]] = [*policy.get("restrictions", []), *policy.get("requirements", [])]
    return {
        f"{rule['id']}: {key}": value
        for rule in rules
        for key, value in rule.items()
        if key not in {"id", *_PLACES} and value is not None
    }


def _document(document: Mapping[str, Any]) -> str:
    return f"{document['issuer']}, version {document['version']}, sha256 {document['sha256'][:16]}"


def _upper(policy: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The documents of tiers one and two."""
    return [document for document in policy.get("documents", []) if document["tier"] < 3]


def _signed(run: Path, document: Mapping[str, Any]) -> str:
    """The id of the key that signed a document; it does not say who holds the key."""
    try:
        return f"key {read_signature(signature_of(copy_of(run, document['sha256']))).key}"
    except (OSError, ValueError, KeyError, TypeError):
        return "no: self-declared"
