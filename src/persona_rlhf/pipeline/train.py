"""The line of a run: prepare, train, judge and release its users, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path

from persona_rlhf.common.errors import counted
from persona_rlhf.config.experiment import Config
from persona_rlhf.evaluation.ledger import LookPlan
from persona_rlhf.models.heap import keep_large_blocks, return_free_blocks
from persona_rlhf.pipeline.distributed import WorkShare
from persona_rlhf.pipeline.inputs import RunInputs, read_inputs
from persona_rlhf.pipeline.kept_answers import write_answers
from persona_rlhf.pipeline.looks import GateLooks, gate_looks, users_of
from persona_rlhf.pipeline.monitoring import (
    OnProgress,
    ProgressEvent,
    Tracking,
    TrainingMonitor,
    check_trackers,
    silent,
)
from persona_rlhf.pipeline.prepare import (
    Chunk,
    Prepared,
    check_gpus,
    chunks_of,
    label_pairs,
    prepare,
    prepare_users,
)
from persona_rlhf.pipeline.release import Cohort, cohorts, judge, overlapped, write
from persona_rlhf.pipeline.run_dir import RunDir, identity_of
from persona_rlhf.pipeline.shared_values import (
    SharedValues,
    interpolation_of,
    shared_bank,
    shared_values,
    with_reference,
)
from persona_rlhf.policy.policy import uncounted_phrasings
from persona_rlhf.policy.private_banks import need_private
from persona_rlhf.release import integrity
from persona_rlhf.release.integrity import ended, screened, write_run_manifest
from persona_rlhf.release.report import write_report
from persona_rlhf.release.results import RESULTS, Result, RunResults, read_results, summarise, write_results
from persona_rlhf.training.cache import Reference
from persona_rlhf.training.constraint import constraint_of
from persona_rlhf.training.engine import Engine, TrainedUser

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
    plan: LookPlan | None = None,
) -> RunResults | None:
    """Trains the users of one process; the results, or None where other processes still have to complete the run.

    `inputs` saves reading the files of the config again. `audit_run` is the run whose audit trail records the work,
    where the users are trained for a run that exists already. `plan` are the looks planned with those of other runs.
    """
    keep_large_blocks()
    if share.rank == 0:
        check_gpus(config)
    need_private(config.policy, run)
    with RunDir.open(run, share, resume, audit_run) as run_dir:
        check_trackers(config.run.report_to, share.workers)
        on_progress(ProgressEvent("preparing"))
        selection = run_dir.selection
        if inputs is None or selection.excluded or selection.later_files:
            inputs = read_inputs(config, selection)
        answers = run_dir.base_answers
        ready = prepare(config, inputs, check=share.rank == 0, on_progress=on_progress, answers=answers)
        if share.rank > 0:
            run_dir.wait_until_ready()
        identity = identity_of(config, ready.policy, ready.pairs, ready.adapted.base.weights_hash)
        if ready.start is not None:
            identity["adapter of users.start"] = ready.start.digest
        if run_dir.begun:
            run_dir.check_same(identity)
        users = users_of(ready.pairs)
        looks = gate_looks(config, ready.policy, ready.examination, run_dir.audit_run, users, plan)
        if not looks.ledger.file.exists() and config.gate.ledger is not None and share.rank == 0:
            on_progress(ProgressEvent("preparing", f"{looks.ledger.file} is new: no look before counts"))
        if not run_dir.finished:
            _train_chunks(ready, run_dir, identity, looks, on_progress)
    return RunResults(run) if share.rank == 0 and share.shards == 1 else None


def _train_chunks(
    ready: Prepared, run_dir: RunDir, identity: Mapping[str, str], looks: GateLooks, on_progress: OnProgress
) -> None:
    """Trains the chunks of this process that are not done; the first process then completes the run."""
    config, share = ready.config, run_dir.share
    size = run_dir.chunk_size if run_dir.begun else share.chunk_size(ready.pairs.users, config.fleet.chunk)
    chunks = chunks_of(ready.pairs.users, size)
    todo = [number for number in share.mine(len(chunks)) if not run_dir.is_done(number)]

    def prepared_chunk(number: int) -> tuple[int, Chunk]:
        with ready.watched(ProgressEvent("screening"), on_progress):
            return number, prepare_users(ready, ready.pairs.of(chunks[number]))

    prepared = map(prepared_chunk, todo)
    first = list(islice(prepared, 1))  # faults of the data that concern all users are raised before anything is written
    with ready.watched(ProgressEvent("constraint data"), on_progress):
        bank = shared_bank(ready, run_dir)
    run_dir.begin(config, ready.policy, ready.pairs, identity, size)
    with ready.watched(ProgressEvent("shared values"), on_progress):
        shared = shared_values(ready, run_dir, bank, len(chunks))
    write_answers(ready.examination, ready.policy, run_dir.base_answers)
    return_free_blocks()  # those of the base's answers
    run_dir.set_ready()
    tracking = Tracking(config, run_dir.path)
    users = sum(len(chunks[number]) for number in todo)
    with TrainingMonitor(run_dir.metrics, users, on_progress, tracking) as monitor:
        if ready.adapted.notice is not None and share.rank == 0:
            monitor.log(ready.adapted.notice)
        notices = [*uncounted_phrasings(ready.policy), *ready.examination.without_limit]
        for sentence in notices if share.rank == 0 else ():
            monitor.log(sentence)
        for number, chunk in chain(first, prepared):
            of_all = f" of {ready.pairs.users:,}" if len(chunks) > 1 else ""
            screened_out = f"{len(chunk.dropped)} found by the screen"
            users_here = f"{len(chunk.rows)}{of_all} users" if of_all else counted(len(chunk.rows), "user")
            monitor.log(f"{users_here}, {counted(chunk.pairs, 'pair')}, {screened_out}")
            train_chunk(ready, run_dir, number, chunk, shared, looks, monitor)
    if share.rank == 0:
        run_dir.wait_for(share.job(len(chunks)))
        if share.shards == 1:
            _complete(run_dir, len(chunks), ready.pairs.users)
            tracking.end(summarise(RunResults(run_dir.path)), monitor.taken)


def _complete(run_dir: RunDir, chunks: int, users: int) -> None:
    """Joins the results of all chunks, and writes report and manifest."""
    run_dir.join(chunks)
    write_report(run_dir.path)
    integrity.append(run_dir.audit_run, "finished", users=users)
    write_run_manifest(run_dir.path)


def train_chunk(
    ready: Prepared,
    run_dir: RunDir,
    number: int,
    chunk: Chunk,
    shared: SharedValues,
    looks: GateLooks,
    monitor: TrainingMonitor,
) -> None:
    """Trains, judges and releases the users of a chunk, one cohort after the other."""
    folder, chunk = run_dir.chunk(number), label_pairs(ready, chunk, shared.pool)
    integrity.append_all(run_dir.audit_run, screened(number, len(chunk.rows), chunk.pairs, chunk.dropped))
    with ready.watched(ProgressEvent("reference"), monitor.on_progress):
        reference = with_reference(
            ready.adapted, chunk.rows, shared.bank, folder / "reference.safetensors", shared.reference
        )
    engine = _engine(ready, chunk, reference, shared, folder)
    results = read_results(folder) if (folder / RESULTS).exists() else []
    trained = _train(engine, chunk, {result.user_id for result in results}, monitor)
    verdicts = _judge(ready, run_dir, chunk, cohorts(trained, engine.count), shared, looks, monitor)
    for released in overlapped(write, verdicts):  # adapters are written while the next users train
        results += released
        write_results(folder, results)
    _finish_chunk(run_dir, number, chunk, results)
    ready.examination.forget_users()
    if shared.cache is not None:
        shared.cache.learn(reference)


def _engine(ready: Prepared, chunk: Chunk, reference: Reference, shared: SharedValues, folder: Path) -> Engine:
    """The training loop over the users of a chunk; its checkpoints lie in `folder`."""
    config, bank = ready.config, shared.bank
    constraint = None if bank is None else constraint_of(bank, config.constraint, config.seed)
    settings = (config.dpo, config.fleet, config.seed)
    pool = () if shared.pool is None else shared.pool.distinct_rows
    begin = ready.first_adapter
    return Engine(
        ready.adapted, chunk.rows, reference, constraint, *settings, folder, shared.start, pool=pool, begin=begin
    )


def _train(engine: Engine, chunk: Chunk, judged: set[str], monitor: TrainingMonitor) -> Iterator[TrainedUser]:
    """The users of a chunk as their training ends, without those that were judged before a kill."""
    steps = {schedule.rows.user_id: schedule.steps for schedule in engine.schedules.values()}
    resumed = {user: taken for user, taken in zip(engine.slots.users, engine.slots.steps, strict=True) if user}
    monitor.begin(steps, engine.finished, len(chunk.rows), resumed)
    return (user for user in engine.run(monitor.step, monitor.log) if user.user_id not in judged)


def _judge(
    ready: Prepared,
    run_dir: RunDir,
    chunk: Chunk,
    trained: Iterable[list[TrainedUser]],
    shared: SharedValues,
    looks: GateLooks,
    monitor: TrainingMonitor,
) -> Iterator[Cohort]:
    """The verdicts of the gate, cohort by cohort."""
    interpolation = None if shared.start is None else interpolation_of(ready, shared.start)
    kept = 0  # answers of the base in the run's file: most are written at the first cohort, and later ones are rare
    for users in trained:
        for user in users:
            monitor.end(user.user_id, user.steps)
        monitor.log(f"judging {', '.join(user.user_id[:32] for user in users)}")
        with ready.watched(monitor.last._replace(phase="judging", scope="these users"), monitor.on_progress):
            judged = judge(ready, run_dir.path, chunk, users, interpolation, looks, shared.prior)
        if (answers := sum(map(len, ready.examination.base_answers))) > kept:
            write_answers(ready.examination, ready.policy, run_dir.base_answers)
            kept = answers
        yield judged


def _finish_chunk(run_dir: RunDir, number: int, chunk: Chunk, results: list[Result]) -> None:
    """Adds the users without a pair to train on, and writes the results in the order of the users."""
    idle = [chunk.untrained(rows) for rows in chunk.rows if not rows.train]
    integrity.append_all(run_dir.audit_run, map(ended, idle))
    order = {user.user_id: n for n, user in enumerate(chunk.rows)}
    write_results(run_dir.chunk(number), sorted([*results, *idle], key=lambda result: order[result.user_id]))
    run_dir.finish(number, chunk.dropped)
