"""Release of a cohort: users are judged and measured together, and the adapters that pass the gate are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import sha256_of
from persona_rlhf.config.experiment import Config
from persona_rlhf.evaluation.gate import Verdict
from persona_rlhf.evaluation.prior_gain import PriorGain
from persona_rlhf.evaluation.records import Measures
from persona_rlhf.evaluation.spending import Spending
from persona_rlhf.evaluation.warm_start import WarmStartInterpolation
from persona_rlhf.models.heap import return_free_blocks
from persona_rlhf.pipeline.looks import GateLooks, gate_looks, users_of
from persona_rlhf.pipeline.prepare import Chunk, Prepared
from persona_rlhf.pipeline.prior import AdapterLook, gains_over_prior, judge_beside_prior
from persona_rlhf.release import integrity
from persona_rlhf.release.adapter import AdapterFiles, Exporter
from persona_rlhf.release.integrity import Event, ended, judged
from persona_rlhf.release.manifest import BaseInfo, Provenance, Stamp
from persona_rlhf.release.results import Result, outcome
from persona_rlhf.release.revocation import last_day
from persona_rlhf.training.engine import TrainedUser

Prior = Float[Tensor, " params"] | None
"""The population's adapter; None where the run has no basis, and the base itself is the prior."""

_WRITERS = 8
_FEW = 1_000  # users whose folders lie side by side; those of more lie in subfolders by hash
_IN_MANIFEST = {"seed", "screening", "lora", "dpo", "constraint", "gate", "release"}  # sections that a manifest repeats


class JudgedUser(NamedTuple):
    """A judged user: the adapter (on the CPU), its verdict and its measures; None where training or judging failed.

    `retreat` is the share of the way that the adapter was interpolated to the warm start (`WarmStartInterpolation`),
    `spending` the part of delta that the look spent. `gain_over_prior` is that of the user's adapter as trained.
    `prior` and `other` are as in `AdapterLook`.
    """

    trained: TrainedUser
    adapter: Float[Tensor, " params"] | None = None
    verdict: Verdict | None = None
    measures: Measures | None = None
    retreat: float = 0.0
    spending: Spending | None = None
    gain_over_prior: PriorGain | None = None
    prior: bool = False
    other: Verdict | None = None


def judgements(user: JudgedUser) -> list[Event]:
    """The events on a user's looks in their order: the user's adapter comes before the population's."""
    verdicts = sorted(((user.prior, user.verdict), (not user.prior, user.other)), key=itemgetter(0))
    return [
        judged(user.trained.user_id, verdict, population) for population, verdict in verdicts if verdict is not None
    ]


class Cohort(NamedTuple):
    """Users judged together, with everything needed to write their adapters while the base computes on."""

    users: list[JudgedUser]
    chunk: Chunk
    exporter: Exporter
    tier_one: frozenset[str]
    audit_run: Path


def release(
    ready: Prepared,
    run: Path,
    chunk: Chunk,
    users: Sequence[TrainedUser],
    interpolation: WarmStartInterpolation | None = None,
    looks: GateLooks | None = None,
    prior: Prior = None,
) -> list[Result]:
    """Judges users and writes the adapters that pass: `judge` and `write`, one after the other."""
    return write(judge(ready, run, chunk, users, interpolation, looks, prior))


def judge(
    ready: Prepared,
    run: Path,
    chunk: Chunk,
    users: Sequence[TrainedUser],
    interpolation: WarmStartInterpolation | None = None,
    looks: GateLooks | None = None,
    prior: Prior = None,
) -> Cohort:
    """Judges users together, and measures them at the alpha that the gate allows.

    With a warm start, adapters that miss a requirement are first interpolated toward it. `looks` counts the looks of
    the users and names the audit trail that records them; without it, the gate is that of `run`. `prior` is the
    population's adapter, where there is one.

    On an exception each user is judged alone, and fails on a second one; raises where all users fail.
    """
    config, base = ready.config, ready.adapted.base
    looks = looks or gate_looks(config, ready.policy, ready.examination, run, users_of(ready.pairs))
    try:
        judged_users = _judged(ready, looks, chunk, users, interpolation, prior)
    except (InputError, OSError):
        raise
    except Exception:
        judged_users = _judged_alone(ready, looks, chunk, users, interpolation, prior)
    return_free_blocks()
    info = BaseInfo.of(base.name, base.weights_hash, config.base.quantization)
    used, conditions = looks.ledger.uses(looks.bank), ready.examination.conditions
    demands, settings = ready.examination.demands, manifest_settings(config)
    composition = ready.examination.composition
    provenance = Provenance.of(info, ready.policy, demands, settings, used, conditions, composition)
    head = integrity.append_all(looks.audit_run, [event for user in judged_users for event in judgements(user)])
    stamp, nested = Stamp(head, last_day(config.gate.valid_days)), ready.pairs.users > _FEW
    files = AdapterFiles(ready.adapted, config.lora, info)
    start = None if ready.start is None else ready.start.sha256
    exporter = Exporter(run, files, provenance, nested, stamp, ready.sign, start)
    return Cohort(judged_users, chunk, exporter, ready.examination.demands.in_pool, looks.audit_run)


def write(cohort: Cohort) -> list[Result]:
    """Writes the adapters that passed the gate; the results of all users of the cohort.

    A user whose adapter cannot be written fails; raises where that holds for all of them, and OSError for a full disk.
    """
    rows = {user.user_id: user for user in cohort.chunk.rows}
    faults: list[Exception] = []

    def written(user: JudgedUser) -> Result:
        name, verdict = user.trained.user_id, user.verdict
        data, place = cohort.chunk.data_of(rows[name]), None
        if verdict is not None and user.adapter is not None and verdict.admitted:
            try:
                place = cohort.exporter.write(
                    name, user.adapter, verdict, user.measures, data, user.spending, user.prior
                )
            except (InputError, OSError):
                raise
            except Exception as fault:
                faults.append(fault)
                return written(_failed(user.trained, "written", fault))
        against = cohort.chunk.against_policy(name)
        result = outcome(user.trained, data.pairs, verdict, user.measures, place, cohort.tier_one, against, user.prior)
        basis = cohort.chunk.basis_use.get(name)
        result = replace(result, retreat=user.retreat, spending=user.spending, basis=basis)
        return replace(result, gain_over_prior=user.gain_over_prior)

    with ThreadPoolExecutor(_WRITERS) as writers:  # a disk that is asked to keep many folders keeps them together
        results = list(writers.map(written, cohort.users))
    if len(faults) == len(cohort.users) > 1:
        raise faults[0]
    integrity.append_all(cohort.audit_run, map(ended, results))
    return results


def _judged(
    ready: Prepared,
    looks: GateLooks,
    chunk: Chunk,
    users: Sequence[TrainedUser],
    interpolation: WarmStartInterpolation | None,
    prior: Prior,
) -> list[JudgedUser]:
    rows = {user.user_id: user for user in chunk.rows}
    trained = [(user, user.adapter) for user in users if user.adapter is not None]
    if not trained:
        return [JudgedUser(user) for user in users]
    flat, shares = torch.stack([adapter for _, adapter in trained]).to(ready.adapted.base.device), [0.0] * len(trained)
    if interpolation is not None:
        flat, shares = interpolation(flat)
    of_trained = [rows[user.user_id] for user, _ in trained]
    gains = gains_over_prior(ready, of_trained, flat, prior)
    level = None if ready.config.basis is None else ready.config.basis.prior_level
    if prior is None or level is None:
        judged_looks = looks.judge([user.user_id for user in of_trained], flat, of_trained)
        ends = list(map(AdapterLook, judged_looks, flat))
    else:
        ends = judge_beside_prior(looks, of_trained, flat, gains, prior, level)
    alphas = [end.look.verdict.alpha for end in ends]
    measures = ready.examination.measures(torch.stack([end.adapter for end in ends]), of_trained, alphas)
    by_user = {
        user.user_id: JudgedUser(
            user,
            end.adapter.cpu(),
            end.look.verdict,
            measured,
            0.0 if end.prior else share,
            end.look.spending,
            gain,
            end.prior,
            end.other,
        )
        for (user, _), end, measured, share, gain in zip(trained, ends, measures, shares, gains, strict=True)
    }
    return [by_user.get(user.user_id) or JudgedUser(user) for user in users]


def _judged_alone(
    ready: Prepared,
    looks: GateLooks,
    chunk: Chunk,
    users: Sequence[TrainedUser],
    interpolation: WarmStartInterpolation | None,
    prior: Prior,
) -> list[JudgedUser]:
    """Each user judged alone; raises the exception of the last user where all fail."""
    judged_users = list[JudgedUser]()
    for user in users:
        try:
            judged_users += _judged(ready, looks, chunk, [user], interpolation, prior)
        except Exception as fault:
            judged_users.append(_failed(user, "judged", fault))
            if user is users[-1] and len(users) > 1 and all(one.trained.status == "failed" for one in judged_users):
                raise
    return judged_users


def _failed(user: TrainedUser, step: str, fault: Exception) -> JudgedUser:
    reason = f"could not be {step} ({type(fault).__name__}: {fault})"
    return JudgedUser(user._replace(adapter=None, status="failed", reason=reason))


def manifest_settings(config: Config) -> dict[str, Any]:
    """The settings that a manifest repeats; files and local models by name, without their paths."""
    settings = config.model_dump(mode="json", include=_IN_MANIFEST)
    del settings["release"]["signing_key"]
    del settings["gate"]["ledger"]
    settings["aligned_by"] = config.base.aligned_by
    if config.basis is not None:
        level = config.basis.prior_level
        of_prior = {} if level is None else {"prior_level": level}
        settings["basis"] = {"sha256": sha256_of(config.basis.file), "pairs": config.basis.pairs, **of_prior}
    models = (
        ("gate", "judge_model", config.gate.judge_model),
        ("screening", "classifier", config.screening.classifier),
    )
    for section, key, model in models:
        if model is not None:
            settings[section][key] = BaseInfo.of(model.model, "").name
    calibration = config.gate.calibration
    settings["gate"]["judge_calibration"] = None if calibration is None else calibration.model_dump()
    for key in ("rules", "reviews"):
        if (file := settings["screening"][key]) is not None:
            settings["screening"][key] = Path(file).name
    return settings


def cohorts(users: Iterable[TrainedUser], size: int) -> Iterator[list[TrainedUser]]:
    """Users in groups of up to `size`, as they come."""
    users = iter(users)
    while group := list(islice(users, max(1, size))):
        yield group


_Item = TypeVar("_Item")
_Product = TypeVar("_Product")


def overlapped(work: Callable[[_Item], _Product], items: Iterable[_Item]) -> Iterator[_Product]:
    """`work` applied to every item, in order; a thread works on one item while the next is being made.

    An exception of `work` is raised in place of its result. Where making an item raises or is interrupted, the result
    of the item before it is yielded first.
    """
    items = iter(items)
    with ThreadPoolExecutor(1) as thread:
        for item in items:
            running = thread.submit(work, item)
            break
        else:
            return
        while True:
            try:
                item = next(items)
            except StopIteration:
                yield running.result()
                return
            except (Exception, KeyboardInterrupt):
                yield running.result()
                raise
            yield running.result()
            running = thread.submit(work, item)
