"""Earlier adapters of users, set aside by `add --keep-earlier`, and the way back to one and forward again.

RUN/state/earlier/lines.jsonl holds the line of results of each, in rows with a `user_id`, and HASH-SLUG its adapter's
folder. A user has at most two: those before and after the last update. An adapter comes back with the verdict that
released it, so no look is spent; the looks of the other one stay counted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write, pseudonym, slug, write_folder
from persona_rlhf.common.run_lock import WAIT_SECONDS, run_lock
from persona_rlhf.data.erasure import DataSubject, Trace
from persona_rlhf.release import integrity
from persona_rlhf.release.data_curve_file import DATA_CURVE
from persona_rlhf.release.integrity import AdapterRecord, audit_faults, write_run_manifest
from persona_rlhf.release.lifetimes import lapse_sentences
from persona_rlhf.release.redteam_report import REDTEAM
from persona_rlhf.release.report import REPORT, write_report
from persona_rlhf.release.results import RESULTS, PairCounts, Result, RunResults, line_of, skipped
from persona_rlhf.release.revocation import revoked
from persona_rlhf.release.verify import adapter_faults

BASE = "base"
"""The name of an earlier state without an adapter: answers came from the base."""

RESTORED_EVENT = "restored"
_EARLIER = Path("state") / "earlier"
_LINES = _EARLIER / "lines.jsonl"
_ORDER = _EARLIER / "order.jsonl"  # of a restoration under way: one row
_NONE = PairCounts(0, 0, 0)
_NO_RESULTS: Mapping[str, Result | None] = MappingProxyType({})


class NotRestoredError(InputError):
    """An adapter that does not come back: it is not there, or may not be released any more."""


class EarlierAdapter(NamedTuple):
    """An adapter set aside, by the sha256 of its manifest or BASE, with the user's line of results at the time.

    `audit` is the number of the last line of audit.jsonl then: a recertification after it did not test the adapter.
    """

    user_id: str
    adapter: str
    audit: int
    line: dict[str, Any]

    @property
    def result(self) -> Result:
        """The line of results."""
        return Result.from_json(self.line)

    @property
    def folder(self) -> Path:
        """The adapter's folder, relative to the run."""
        return _EARLIER / f"{self.adapter[:16]}-{slug(self.user_id)}"


def adapter_name(result: Result | None) -> str:
    """The sha256 of the manifest of a user's adapter; BASE for a user without one."""
    return BASE if result is None or result.manifest_sha256 is None else result.manifest_sha256


def result_of(run: Path, user_id: str) -> Result | None:
    """The user's line of results; None for a user who is not in the run."""
    return next((result for result in RunResults(run) if result.user_id == user_id), None)


def other_adapter(run: Path, user_id: str) -> EarlierAdapter | None:
    """The adapter that the user can change to: the one before, or after going back the newer one."""
    rows = [row for row in _rows(run) if row.user_id == user_id]
    present = adapter_name(result_of(run, user_id)) if rows else BASE
    return next((row for row in rows if row.adapter != present), None)


def set_aside(run: Path, present: Mapping[str, Result | None]) -> None:
    """Keeps adapters and lines of users as they are now; None is a user who is not in the run."""
    head = integrity.head(run)
    rows = {(row.user_id, row.adapter): row for row in _rows(run)}
    for user_id, result in present.items():
        line = skipped(user_id, "the user went back to the base", _NONE) if result is None else result
        row = EarlierAdapter(user_id, adapter_name(result), 0 if head is None else head.seq, json.loads(line_of(line)))
        rows[user_id, row.adapter] = row
        if line.path is not None and not (run / row.folder).exists():
            files = sorted((run / line.path).iterdir())
            write_folder(run / row.folder, {file.name: file.read_bytes() for file in files})
    (run / _EARLIER).mkdir(parents=True, exist_ok=True)
    _write(run, rows.values())


def drop_earlier(run: Path, user_ids: Collection[str], kept: Mapping[str, Result | None] = _NO_RESULTS) -> None:
    """Drops the earlier adapters of users, but for those of the results in `kept`."""
    names = {(user_id, adapter_name(result)) for user_id, result in kept.items()}
    rows = _rows(run)
    dropped = [row for row in rows if row.user_id in user_ids and (row.user_id, row.adapter) not in names]
    if dropped:
        _write(run, [row for row in rows if row not in dropped])
    for row in dropped:
        shutil.rmtree(run / row.folder, ignore_errors=True)


def restore(run: Path, user_id: str, adapter: str, wait: float = WAIT_SECONDS) -> Result:
    """Makes an earlier adapter the user's, and sets the present one aside; the user's line of results then.

    It can go on while other users are trained. The next start of a program completes it after a kill. Raises
    NotRestoredError where no such adapter is set aside, or it may not be released any more; InputError where the lock
    stays taken.
    """
    with run_lock(run, "restore", part="restoring", wait=wait):
        _finish(run)
        row = next((one for one in _rows(run) if _is(one, user_id, adapter)), None)
        if row is None:
            raise _refused(run, "no such earlier adapter of this user is kept")
        if reasons := _reasons(run, row):
            raise _refused(run, f"the earlier adapter may not come back: {'; '.join(reasons)}")
        present = result_of(run, user_id)
        if adapter_name(present) != adapter:
            set_aside(run, {user_id: present})
            order = {"user_id": user_id, "adapter": adapter, "audit": integrity.need_head(run).seq}
            atomic_write(run / _ORDER, json.dumps(order) + "\n", private=True)
            _finish(run)
        restored = result_of(run, user_id)
        assert restored is not None
        return restored


def is_restoring(run: Path) -> bool:
    """Whether a restoration was begun and is not complete."""
    return (run / _ORDER).exists()


def finish_restoring(run: Path, wait: float) -> None:
    """Completes a restoration that was interrupted; waits for one that is under way."""
    with run_lock(run, "restore", part="restoring", wait=wait):
        _finish(run)


def _finish(run: Path) -> None:
    """Puts the ordered adapter in its place. Each step is whole or not at all, and can be done again after a kill."""
    orders = (run / _ORDER).read_bytes().splitlines() if is_restoring(run) else []
    order = json.loads(orders[0]) if orders else {}
    row = next((one for one in _rows(run) if order and _is(one, order["user_id"], order["adapter"])), None)
    if row is not None:
        _install(run, row)
        facts = {"user": pseudonym(row.user_id), "manifest_sha256": row.result.manifest_sha256}
        if not any(entry.event == RESTORED_EVENT and entry.seq > order["audit"] for entry in integrity.read(run)):
            integrity.append(run, RESTORED_EVENT, **facts, alpha=row.result.alpha)
        for name in (RESULTS, REDTEAM, DATA_CURVE, REPORT, integrity.AUDIT):
            write_run_manifest(run, only=name)
    (run / _ORDER).unlink(missing_ok=True)  # without a row the user was forgotten meanwhile


def _install(run: Path, row: EarlierAdapter) -> None:
    """Adapter, line and report; files that covered the adapters before are removed."""
    from persona_rlhf.release.impact_report import remove_impact  # it needs numpy, and every verb imports this module

    result, present = row.result, result_of(run, row.user_id)
    if result.path is not None:
        files = sorted((run / row.folder).iterdir())
        write_folder(run / result.path, {file.name: file.read_bytes() for file in files})
    if present is not None and present.path not in (None, result.path):
        shutil.rmtree(run / str(present.path), ignore_errors=True)
    lines = (result if one.user_id == row.user_id else one for one in RunResults(run))
    atomic_write(run / RESULTS, map(line_of, lines))
    for earlier in (REDTEAM, DATA_CURVE):
        (run / earlier).unlink(missing_ok=True)
    remove_impact(run)
    write_report(run)


def _reasons(run: Path, row: EarlierAdapter) -> list[str]:
    """Every reason why an earlier adapter may not be released again; none for the base."""
    if row.adapter == BASE:
        return []
    policy_hash = json.loads((run / "policy.json").read_bytes())["hash"]
    reasons = adapter_faults(run / row.folder, row.result, policy_hash)
    reasons += audit_faults(run, [AdapterRecord(str(row.folder), row.user_id, row.adapter)])
    if (revocation := revoked(run).get(row.adapter)) is not None:
        reasons.append(revocation.sentence())
    reasons += lapse_sentences(run, row.result.slug, row.adapter)
    if any(entry.event == integrity.RECERTIFIED and entry.seq > row.audit for entry in integrity.read(run)):
        reasons.append("a recertification since did not test it")
    return reasons


def _rows(run: Path) -> list[EarlierAdapter]:
    file = run / _LINES
    lines = file.read_bytes().splitlines() if file.exists() else []
    return [EarlierAdapter(**json.loads(line)) for line in lines]


def _write(run: Path, rows: Iterable[EarlierAdapter]) -> None:
    atomic_write(run / _LINES, (json.dumps(row._asdict()) + "\n" for row in rows), private=True)


def _is(row: EarlierAdapter, user_id: str, adapter: str) -> bool:
    return (row.user_id, row.adapter) == (user_id, adapter)


def _refused(run: Path, sentence: str) -> NotRestoredError:
    return NotRestoredError([Problem(str(run), None, "--user", sentence)])


def earlier_traces(run: Path, user: DataSubject) -> Iterator[Trace]:
    """The folders of a user's earlier adapters; their lines are rows with the user's id."""
    for folder in sorted((run / _EARLIER).glob("*")):
        if folder.is_dir() and user.owns_slug(folder.name):
            yield Trace(folder, "earlier adapter", 1, partial(shutil.rmtree, folder))
