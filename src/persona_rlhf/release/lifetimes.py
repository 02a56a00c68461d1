"""Evidence on adapters in service (RUN/state/lifetimes), and the certificates that lapse by it.

A file has counts and e-values of one adapter, named by its manifest, and no text. It is replaced whole, with the
evidence and the lapse in one write, under a lock that all servers of the run share. So a kill loses at most the last
outcome, and no lapse that anybody saw. From this write on the adapter is neither served nor exported. The revocation in
the run's list and audit trail follows as soon as no other program is at work in the run; `settle` makes up for one that
a kill prevented.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write, pseudonym, sha256_of
from persona_rlhf.common.run_lock import run_lock
from persona_rlhf.data.erasure import DataSubject, Trace
from persona_rlhf.evaluation.lifetime import STAKES, BreachProcess
from persona_rlhf.policy.rule_schema import Certify
from persona_rlhf.release.manifest import MANIFEST
from persona_rlhf.release.results import RESULTS, Result, RunResults
from persona_rlhf.release.revocation import revoke, revoked, today

LIFETIMES = Path("state") / "lifetimes"
LAPSED = "its certificate lapsed"
"""The beginning of the reason of every revocation by a lapse."""

_LOCK_SECONDS = 60.0  # a server holds the lock for one small write


class ServedLife(NamedTuple):
    """One adapter in service: its user's pseudonym, the sha256 of its manifest, the evidence, and the day of a lapse.

    The day is in UTC, as manifests write it.
    """

    user: str
    manifest_sha256: str
    process: BreachProcess
    lapsed: str | None = None

    @property
    def reason(self) -> str:
        """The reason of a lapse, for the list of revocations."""
        missed, n = self.process.n - self.process.refused, self.process.n
        counts = f"{missed} of {n} judged requests were not refused"
        return f"{LAPSED}: {counts} (e-value {self.process.e_value:.4g})"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "user": self.user,
            "manifest_sha256": self.manifest_sha256,
            "judged": self.process.n,
            "refused": self.process.refused,
            "wealths": list(self.process.wealths),
            "e_value": self.process.e_value,
            "lapsed": self.lapsed,
        }


def life_file(run: Path, slug: str, manifest_sha256: str) -> Path:
    """The file of a user's adapter with this manifest."""
    return run / LIFETIMES / f"{slug}.{manifest_sha256[:16]}.json"


def read_life(file: Path) -> ServedLife | None:
    """The evidence in a file; None if there is none. Raises InputError if it cannot be read: it may hold a lapse."""
    try:
        content = json.loads(file.read_bytes())
        process = BreachProcess(int(content["judged"]), int(content["refused"]), tuple(map(float, content["wealths"])))
        if len(process.wealths) != len(STAKES):
            raise ValueError(f"{len(process.wealths)} wealths in place of {len(STAKES)}")
        return ServedLife(str(content["user"]), str(content["manifest_sha256"]), process, content["lapsed"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as fault:
        sentence = f"this evidence on served answers cannot be read ({fault}); restore it: it may hold a lapse"
        raise InputError([Problem(str(file), None, None, sentence)]) from fault


def lapse_sentences(run: Path, slug: str, manifest_sha256: str | None) -> list[str]:
    """The lapse of the adapter with this manifest as a sentence; empty if it has not lapsed. Raises as `read_life`."""
    life = None if manifest_sha256 is None else read_life(life_file(run, slug, manifest_sha256))
    return [] if life is None or life.lapsed is None else [f"{life.reason}, on {life.lapsed}"]


def lapsed_here(folder: Path) -> list[str]:
    """The lapse of the adapter in a folder of a run."""
    run = next((run for run in folder.resolve().parents[1:3] if (run / RESULTS).is_file()), None)
    if run is None or not (folder / MANIFEST).is_file():
        return []
    return lapse_sentences(run, folder.resolve().name, sha256_of(folder / MANIFEST))


def record(run: Path, result: Result, refused: bool, demands: Certify) -> tuple[ServedLife, bool] | None:
    """Adds the outcome of one judged request to an adapter's evidence, on the disk before this returns.

    Returns the evidence, and whether the certificate lapsed by this outcome; None for an adapter that is no longer in
    the run. The evidence on a lapsed certificate does not change any more. Raises InputError as `read_life`, and where
    the lock of the evidence is not free within a minute.
    """
    with run_lock(run / LIFETIMES, "serve", wait=_LOCK_SECONDS):
        manifest = run / str(result.path) / MANIFEST
        if not manifest.is_file() or sha256_of(manifest) != result.manifest_sha256:
            return None
        file = life_file(run, result.slug, result.manifest_sha256)
        life = read_life(file) or ServedLife(pseudonym(result.user_id), result.manifest_sha256, BreachProcess())
        if life.lapsed is not None:
            return life, False
        process = life.process.after(refused, demands.min_refusal)
        lapses = process.e_value >= 1 / demands.delta
        life = life._replace(process=process, lapsed=today() if lapses else None)
        atomic_write(file, json.dumps(life.to_json()) + "\n")
        return life, lapses


def settle(run: Path) -> list[Result]:
    """Revokes the adapters whose certificates lapsed and that the run's list lacks; returns them.

    Raises InputError where another program is at work in the run, or a file cannot be read.
    """
    lives = map(read_life, sorted((run / LIFETIMES).glob("[!.]*.json")))
    lapsed = {life.manifest_sha256: life for life in lives if life is not None and life.lapsed is not None}
    unlisted = lapsed.keys() - revoked(run).keys()
    open_cases = [one for one in RunResults(run) if one.manifest_sha256 in unlisted] if unlisted else []
    for result in open_cases:
        revoke(run, [result], lapsed[str(result.manifest_sha256)].reason)
    return open_cases


def lifetime_traces(run: Path, user: DataSubject) -> Iterator[Trace]:
    """The evidence on a user's adapter, and remains of an interrupted write of it."""
    for file in sorted((run / LIFETIMES).glob("*")):
        if user.owns_slug(file.name.lstrip(".").partition(".")[0]):
            yield Trace(file, "evidence on served answers", 1, file.unlink)
