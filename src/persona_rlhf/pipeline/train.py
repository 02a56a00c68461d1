"""The line of a run: prepare, train, judge and release its users, chunk by chunk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple, TypeVar

from persona_rlhf.config.experiment import Config
from persona_rlhf.data.tokenize import UserRows
from persona_rlhf.evaluation.evaluator import WarmStartInterpolation
from persona_rlhf.evaluation.metrics import REQUIREMENT_PROMPTS
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.fast_paths import keep_large_blocks
from persona_rlhf.pipeline.distributed import WorkShare
from persona_rlhf.pipeline.inputs import RunInputs, read_inputs
from persona_rlhf.pipeline.monitoring import (
    OnProgress,
    ProgressEvent,
    Tracking,
    TrainingMonitor,
    check_trackers,
    silent,
)
from persona_rlhf.pipeline.prepare import Chunk, Prepared, chunks_of, prepare, prepare_users
from persona_rlhf.pipeline.release import Cohort, judge, write
from persona_rlhf.pipeline.run_dir import RunDir, identity_of
from persona_rlhf.policy.policy import Policy
from persona_rlhf.release import integrity
from persona_rlhf.release.integrity import ended, screened, write_run_manifest
from persona_rlhf.release.report import SCREENS, write_report
from persona_rlhf.release.results import RESULTS, RunResults, read_results, summarise, write_results
from persona_rlhf.training import checkpoint
from persona_rlhf.training.api import train_warm_start
from persona_rlhf.training.cache import Reference, rows_ahead, shared_reference
from persona_rlhf.training.constraint import OPENING_LENGTH, ConstraintData, LagrangianConstraint
from persona_rlhf.training.constraint_data import (
    cached_constraint_data,
    constraint_data_from_json,
    constraint_data_to_json,
    policy_constraint_data,
)
from persona_rlhf.training.engine import Engine, TrainedUser, WarmStart

_ONE_PROCESS = WorkShare()


def train(config: Config, run: Path, *, resume: bool = False, on_progress: OnProgress | None = None) -> RunResults:
    """Trains one adapter per user of a config and releases those that pass the gate; results in the users' order.

    The run folder `run` gets adapters, results, audit trail and report. `resume` goes on with an interrupted run.
    `on_progress` is called with a `ProgressEvent` after every step and before every long phase.

    Raises InputError with all problems of the input, before anything is written.
    """
    results = train_share(config, run, resume=resume, on_progress=on_progress or silent)
    assert results is not None  # one process trains the whole run
    return results


def train_share(
    config: Config,
    run: Path,
    *,
    resume: bool = False,
    on_progress: OnProgress = silent,
    inputs: RunInputs | None = None,
    share: WorkShare = _ONE_PROCESS,
    audit_run: Path | None = None,
) -> RunResults | None:
    """Trains the users of one process; the results, or None where other processes still have to complete the run.

    `inputs` saves reading the files of the config again. `audit_run` is the run whose audit trail records the work,
    where the users are trained for a run that exists already.
    """
    keep_large_blocks()
    with RunDir.open(run, share, resume, audit_run) as run_dir:
        check_trackers(config.run.report_to, share.workers)
        on_progress(ProgressEvent("preparing"))
        selection = run_dir.selection
        if inputs is None or selection.excluded or selection.later_files:
            inputs = read_inputs(config, selection)
        ready = prepare(config, inputs, check=share.rank == 0)
        if share.rank > 0:
            run_dir.wait_until_ready()
        identity = identity_of(config, ready.policy, ready.pairs, ready.adapted.base.weights_hash)
        if run_dir.begun:
            run_dir.check_same(identity)
        if not run_dir.finished:
            _train_chunks(ready, run_dir, identity, on_progress)
    return RunResults(run) if share.rank == 0 and share.shards == 1 else None


def _train_chunks(ready: Prepared, run_dir: RunDir, identity: Mapping[str, str], on_progress: OnProgress) -> None:
    """Trains the chunks of this process that are not done; the first process then completes the run."""
    config, share = ready.config, run_dir.share
    size = run_dir.chunk_size if run_dir.begun else share.chunk_size(ready.pairs.users, config.fleet.chunk)
    chunks = chunks_of(ready.pairs.users, size)
    todo = [number for number in share.mine(len(chunks)) if not run_dir.is_done(number)]
    prepared = ((number, prepare_users(ready, ready.pairs.of(chunks[number]))) for number in todo)
    first = list(islice(prepared, 1))  # faults of the data that concern all users are raised before anything is written
    bank = shared_bank(ready, run_dir)
    run_dir.begin(config, ready.policy, ready.pairs, identity, size)
    shared = _shared_values(ready, run_dir, bank, len(chunks))
    run_dir.set_ready()
    tracking = Tracking(config, run_dir.path)
    users = sum(len(chunks[number]) for number in todo)
    with TrainingMonitor(run_dir.metrics, users, on_progress, tracking) as monitor:
        if ready.adapted.notice is not None and share.rank == 0:
            monitor.log(ready.adapted.notice)
        for number, chunk in chain(first, prepared):
            of_all = f" of {ready.pairs.users:,}" if len(chunks) > 1 else ""
            screened_out = f"{len(chunk.dropped)} found by the screen"
            monitor.log(f"{len(chunk.rows)}{of_all} users, {chunk.pairs:,} pairs, {screened_out}")
            train_chunk(ready, run_dir, number, chunk, shared, monitor)
    if share.rank > 0:
        return
    run_dir.wait_for(share.job(len(chunks)))
    if share.shards > 1:
        return
    run_dir.join(len(chunks))
    write_report(run_dir.path)
    integrity.append(run_dir.audit_run, "finished", users=ready.pairs.users)
    write_run_manifest(run_dir.path)
    tracking.end(summarise(RunResults(run_dir.path)), monitor.taken)


class SharedValues(NamedTuple):
    """Values that all chunks of a run share: constraint rows, warm start, reference log-probabilities.

    `cache` keeps the log-probabilities for other runs (`fleet.reference_cache`).
    """

    bank: ConstraintData | None
    start: WarmStart | None
    reference: Reference
    cache: Reference | None


def _shared_values(ready: Prepared, run_dir: RunDir, bank: ConstraintData | None, chunks: int) -> SharedValues:
    """The shared values, read from the run folder or computed and written to it."""
    if run_dir.share.rank == 0:
        screens = [screen.to_json() for screen in ready.screens]
        run_dir.write(run_dir.path / SCREENS, json.dumps(screens, indent=2) + "\n")
    if bank is not None:
        run_dir.write(run_dir.bank, constraint_data_to_json(bank))
    start = shared_start(ready, bank, run_dir)
    folder = ready.config.fleet.reference_cache
    cache = None if folder is None else shared_reference(ready.adapted, Path(folder))
    reference = Reference(ready.adapted, run_dir.reference, cache)
    if bank is not None and chunks > 1:  # a single chunk scores them in the same passes as its own rows
        reference.add(bank.rows())
    return SharedValues(bank, start, reference, cache)


def shared_bank(ready: Prepared, run_dir: RunDir) -> ConstraintData | None:
    """The constraint bank of the run, read from its folder, or made where no earlier process has written it."""
    if run_dir.bank.exists():
        try:
            return constraint_data_from_json(run_dir.bank.read_text())
        except ValueError:
            pass  # a damaged file is written anew
    return constraint_bank(ready.config, ready.policy, ready.adapted)


def shared_start(ready: Prepared, bank: ConstraintData | None, run_dir: RunDir) -> WarmStart | None:
    """The warm start of all users, read from the run folder or trained; None without requirements to train."""
    if run_dir.start.exists():
        return WarmStart(**checkpoint.load(run_dir.start, ready.adapted.base.device)[0])
    config = ready.config
    start = train_warm_start(ready.adapted, bank, config.dpo, config.constraint, config.seed)
    if start is not None:
        checkpoint.save(run_dir.start, start._asdict(), {})
    return start


def constraint_bank(config: Config, policy: Policy, adapted: AdaptedModel) -> ConstraintData | None:
    """The constraint data of a policy, from the base's own refusals; None if the constraint is switched off.

    Raises InputError where the base refuses no train probe of a category.
    """
    if not config.constraint.enabled:
        return None
    constraint, seed, tokens = config.constraint, config.seed, config.gate.max_new_tokens

    def made() -> ConstraintData:
        return policy_constraint_data(adapted, policy, constraint, seed, tokens)

    if config.fleet.reference_cache is None:
        return made()
    key = (policy.hash, constraint.refusals_per_probe, OPENING_LENGTH, seed, tokens)
    return cached_constraint_data(adapted, Path(config.fleet.reference_cache), key, made)


def with_reference(
    adapted: AdaptedModel,
    users: Iterable[UserRows],
    bank: ConstraintData | None,
    file: Path | None = None,
    shared: Reference | None = None,
) -> Reference:
    """Log-probabilities of the rows under the base (see `rows_ahead`), computed once for all users and kept in `file`.

    Values that `shared` holds are taken from it.
    """
    reference = Reference(adapted, file, shared)
    reference.add(rows_ahead(adapted, users, bank.rows() if bank else ()))
    return reference


def train_chunk(
    ready: Prepared, run_dir: RunDir, number: int, chunk: Chunk, shared: SharedValues, monitor: TrainingMonitor
) -> None:
    """Trains, judges and releases the users of a chunk, one cohort after the other."""
    config, folder = ready.config, run_dir.chunk(number)
    integrity.append_all(run_dir.audit_run, screened(number, len(chunk.rows), chunk.pairs, chunk.dropped))
    reference = with_reference(
        ready.adapted, chunk.rows, shared.bank, folder / "reference.safetensors", shared.reference
    )
    constraint = None if shared.bank is None else LagrangianConstraint(shared.bank, config.constraint, config.seed)
    engine = Engine(
        ready.adapted,
        chunk.rows,
        reference,
        constraint,
        config.dpo,
        config.fleet,
        config.seed,
        folder,
        shared.start,
    )
    results = read_results(folder) if (folder / RESULTS).exists() else []
    judged = {result.user_id for result in results}
    steps = {schedule.rows.user_id: schedule.steps for schedule in engine.schedules.values()}
    monitor.begin(steps, engine.finished, len(chunk.rows))
    interpolation = None if shared.start is None else interpolation_of(ready, shared.start)
    fleet = (user for user in engine.run(monitor.step, monitor.log) if user.user_id not in judged)

    def judged_cohorts() -> Iterator[Cohort]:
        for users in cohorts(fleet, engine.count):
            for user in users:
                monitor.end(user.user_id, user.steps)
            monitor.log(f"judging {', '.join(user.user_id[:32] for user in users)}")
            yield judge(ready, run_dir.path, chunk, users, interpolation, run_dir.audit_run)

    for released in overlapped(write, judged_cohorts()):  # adapters are written while the next users train
        results += released
        write_results(folder, results)
    idle = [chunk.untrained(rows) for rows in chunk.rows if not rows.train]
    integrity.append_all(run_dir.audit_run, map(ended, idle))
    results += idle
    order = {user.user_id: n for n, user in enumerate(chunk.rows)}
    results.sort(key=lambda result: order[result.user_id])
    write_results(folder, results)
    run_dir.finish(number, chunk.dropped)
    ready.examination.forget_users()
    if shared.cache is not None:
        shared.cache.learn(reference)


def interpolation_of(ready: Prepared, start: WarmStart) -> WarmStartInterpolation:
    """Interpolation toward the warm start, for adapters that miss a requirement of the policy."""
    tokens, rules = ready.config.gate.max_new_tokens, ready.policy.requirements
    return WarmStartInterpolation(ready.adapted, start.adapter, rules, REQUIREMENT_PROMPTS, tokens, ready.config.seed)


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
