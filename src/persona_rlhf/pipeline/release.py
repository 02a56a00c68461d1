"""The end of the line: users are judged and measured together, and such of their adapters as may leave are written."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.experiment import Config
from persona_rlhf.evaluation.evaluator import WarmStartInterpolation
from persona_rlhf.evaluation.gate import Verdict
from persona_rlhf.evaluation.records import Measures
from persona_rlhf.pipeline.prepare import Chunk, Prepared
from persona_rlhf.release import integrity
from persona_rlhf.release.adapter import AdapterFiles, Exporter
from persona_rlhf.release.integrity import ended, judged
from persona_rlhf.release.manifest import BaseInfo, Provenance, Stamp
from persona_rlhf.release.results import Result, outcome
from persona_rlhf.release.revocation import last_day
from persona_rlhf.training.engine import TrainedUser

_WRITERS = 8
_FEW = 1_000  # users whose folders lie side by side; those of more lie in subfolders by hash
_ON_PAPER = {"seed", "screening", "lora", "dpo", "constraint", "gate", "release"}  # sections that a manifest repeats


class JudgedUser(NamedTuple):
    """A user of whom all is decided: the adapter that was judged (on the CPU), what the gate says of it and what was
    measured; None where training or judging failed. `retreat` is how far it went back (see `Retreat`)."""

    trained: TrainedUser
    adapter: Float[Tensor, " params"] | None = None
    verdict: Verdict | None = None
    measures: Measures | None = None
    retreat: float = 0.0


class Cohort(NamedTuple):
    """Users who were judged together, with all that writing their adapters takes: the base may compute meanwhile."""

    users: list[JudgedUser]
    chunk: Chunk
    exporter: Exporter
    tier_one: frozenset[str]
    trail: Path


def release(
    ready: Prepared,
    run: Path,
    chunk: Chunk,
    users: Sequence[TrainedUser],
    retreat: WarmStartInterpolation | None = None,
    trail: Path | None = None,
) -> list[Result]:
    """Judges users, and writes the adapters that may leave: `judge` and `write`, one after the other."""
    return write(judge(ready, run, chunk, users, retreat, trail))


def judge(
    ready: Prepared,
    run: Path,
    chunk: Chunk,
    users: Sequence[TrainedUser],
    retreat: WarmStartInterpolation | None = None,
    trail: Path | None = None,
) -> Cohort:
    """Judges users together, and measures them at the alpha that the gate allows.

    Where users begin as the provider's adapter, those who have strayed too far from it go back first (`retreat`).
    Every verdict, and what became of everybody, goes into the audit trail of `run`, or of another run that is to have
    these users (`trail`).

    Where that raises, each user is judged alone, and one who raises again has failed; where all do, it is not theirs.
    """
    trail = trail or run
    try:
        found = _judged(ready, chunk, users, retreat)
    except (InputError, OSError):
        raise
    except Exception:
        found = _judged_alone(ready, chunk, users, retreat)
    config, base = ready.config, ready.adapted.base
    info = BaseInfo.of(base.name, base.weights_hash, config.base.quantization)
    papers = Provenance.of(info, ready.policy, ready.examination.demands, on_paper(config))
    verdicts = [(own.trained.user_id, own.verdict) for own in found if own.verdict is not None]
    head = integrity.append_all(trail, [judged(user_id, verdict) for user_id, verdict in verdicts])
    stamp, nested = Stamp(head, last_day(config.gate.valid_days)), ready.pairs.users > _FEW
    exporter = Exporter(run, AdapterFiles(ready.adapted, config.lora, info), papers, nested, stamp, ready.sign)
    return Cohort(found, chunk, exporter, ready.examination.demands.in_pool, trail)


def write(cohort: Cohort) -> list[Result]:
    """Writes the adapters that may leave, and says of everybody what became of him.

    A user whose adapter cannot be written has failed; where all are such, it is not theirs. Raises OSError where the
    disk does not take them.
    """
    rows = {user.user_id: user for user in cohort.chunk.rows}
    faults: list[Exception] = []

    def written(user: JudgedUser) -> Result:
        name, verdict = user.trained.user_id, user.verdict
        data, place = cohort.chunk.data_of(rows[name]), None
        if verdict is not None and user.adapter is not None and verdict.admitted:
            try:
                place = cohort.exporter.write(name, user.adapter, verdict, user.measures, data)
            except (InputError, OSError):
                raise
            except Exception as fault:
                faults.append(fault)
                return written(_failed(user.trained, "written", fault))
        against = cohort.chunk.against_policy(name)
        result = outcome(user.trained, data.pairs, verdict, user.measures, place, cohort.tier_one, against)
        return replace(result, retreat=user.retreat)

    with ThreadPoolExecutor(_WRITERS) as writers:  # a disk that is asked to keep many folders keeps them together
        results = list(writers.map(written, cohort.users))
    if len(faults) == len(cohort.users) > 1:
        raise faults[0]
    integrity.append_all(cohort.trail, map(ended, results))
    return results


def _judged(
    ready: Prepared, chunk: Chunk, users: Sequence[TrainedUser], retreat: WarmStartInterpolation | None
) -> list[JudgedUser]:
    rows = {user.user_id: user for user in chunk.rows}
    sound = [(user, user.adapter) for user in users if user.adapter is not None]
    if not sound:
        return [JudgedUser(user) for user in users]
    flat, shares = torch.stack([adapter for _, adapter in sound]).to(ready.adapted.base.device), [0.0] * len(sound)
    if retreat is not None:
        flat, shares = retreat(flat)
    verdicts = ready.examination.verdicts(flat)
    alphas = [verdict.alpha for verdict in verdicts]
    measures = ready.examination.measures(flat, [rows[user.user_id] for user, _ in sound], alphas)
    columns = zip((user for user, _ in sound), flat.cpu(), verdicts, measures, shares, strict=True)
    known = {own.trained.user_id: own for own in map(JudgedUser._make, columns)}
    return [known.get(user.user_id) or JudgedUser(user) for user in users]


def _judged_alone(
    ready: Prepared, chunk: Chunk, users: Sequence[TrainedUser], retreat: WarmStartInterpolation | None
) -> list[JudgedUser]:
    """Each user by himself; raises what the last one raised where all do."""
    found = list[JudgedUser]()
    for user in users:
        try:
            found += _judged(ready, chunk, [user], retreat)
        except Exception as fault:
            found.append(_failed(user, "judged", fault))
            if user is users[-1] and len(users) > 1 and all(own.trained.status == "failed" for own in found):
                raise
    return found


def _failed(user: TrainedUser, what: str, fault: Exception) -> JudgedUser:
    reason = f"could not be {what} ({type(fault).__name__}: {fault})"
    return JudgedUser(user._replace(adapter=None, status="failed", reason=reason))


def on_paper(config: Config) -> dict[str, Any]:
    """The settings that a manifest repeats; of files and local models the names, for the way to them is nobody's
    business."""
    settings = config.model_dump(mode="json", include=_ON_PAPER)
    del settings["release"]["signing_key"]
    settings["aligned_by"] = config.base.aligned_by
    for section, classifier in (("gate", config.gate.classifier), ("screening", config.screening.classifier)):
        if classifier is not None:
            settings[section]["classifier"] = BaseInfo.of(classifier.model, "").name
    for key in ("rules", "reviews"):
        if (file := settings["screening"][key]) is not None:
            settings["screening"][key] = Path(file).name
    return settings
