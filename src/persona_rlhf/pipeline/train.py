"""THE line: prepare -> train -> judge -> release, chunk by chunk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from persona_rlhf.config.experiment import Config, read_run_config
from persona_rlhf.data.tokenize import UserRows
from persona_rlhf.evaluation.evaluator import WarmStartInterpolation
from persona_rlhf.evaluation.metrics import REQUIREMENT_PROMPTS
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.fast_paths import keep_large_blocks
from persona_rlhf.pipeline.distributed import WorkShare
from persona_rlhf.pipeline.inputs import RunInputs, read_inputs
from persona_rlhf.pipeline.monitoring import Progress, Tracking, check_trackers
from persona_rlhf.pipeline.prepare import Chunk, Prepared, chunks_of, prepare, prepare_users
from persona_rlhf.pipeline.release import Cohort, judge, write
from persona_rlhf.pipeline.run_dir import PAIRS, RunDir, identity_of
from persona_rlhf.policy.policy import Policy
from persona_rlhf.release import integrity
from persona_rlhf.release.adapter import read_adapter
from persona_rlhf.release.integrity import ended, screened, write_run_manifest
from persona_rlhf.release.report import SCREENS, write_report
from persona_rlhf.release.results import RESULTS, Result, RunResults, read_results, summarise, write_results
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

# ----------------------------------------------------------------------------------------------------
# Work that goes on in another thread while this one makes the next piece of it.
# ----------------------------------------------------------------------------------------------------

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


def overlapped(work: Callable[[_Item], _Found], items: Iterable[_Item]) -> Iterator[_Found]:
    """What `work` makes of every item, in their order; a thread is at it while the next item is being made.

    What `work` raises comes out in its result's place. Where the making of an item raises, or is interrupted, the one
    before it is still given first.
    """
    items = iter(items)
    with ThreadPoolExecutor(1) as thread:
        for item in items:
            doing = thread.submit(work, item)
            break
        else:
            return
        while True:
            try:
                item = next(items)
            except StopIteration:
                yield doing.result()
                return
            except (Exception, KeyboardInterrupt):
                yield doing.result()
                raise
            yield doing.result()
            doing = thread.submit(work, item)


# ----------------------------------------------------------------------------------------------------
# The whole line, from a config to released adapters; each arrow of it is a public function.
# ----------------------------------------------------------------------------------------------------


def train(
    config: Config,
    run: Path,
    resume: bool,
    console: Console,
    materials: RunInputs | None = None,
    share: WorkShare | None = None,
    trail: Path | None = None,
) -> RunResults | None:
    """Pairs and policy in, a run folder with one adapter per user out; the results in the order of the users.

    `materials` are read from the config where they are not given. A process with a `share` of the run trains its own
    users; None comes from all but the one that puts the whole run together. `trail` is the run whose audit trail tells
    of all this, where its users are to join that one. Raises InputError for whatever is wrong
    with the input, before anything is written.
    """
    keep_large_blocks()
    share = share or WorkShare()
    folder = RunDir(run, share, trail)
    folder.check_place(resume)
    check_trackers(config.run.report_to, share.workers)
    roll = folder.roll
    if materials is None or roll.out or roll.more:
        materials = read_inputs(config, roll)
    ready = prepare(config, materials, check=share.rank == 0)
    if share.rank > 0:
        folder.wait_until_ready()
    identity = identity_of(config, ready.policy, ready.pairs, ready.adapted.base.weights_hash)
    if folder.begun:
        folder.check_same(identity)
    if folder.finished:
        folder.clear()
        return RunResults(run) if share.rank == 0 and share.shards == 1 else None
    size = folder.chunk_size if folder.begun else share.chunk_size(ready.pairs.users, config.fleet.chunk)
    chunks = chunks_of(ready.pairs.users, size)
    todo = [number for number in share.mine(len(chunks)) if not folder.is_done(number)]
    prepared = ((number, prepare_users(ready, ready.pairs.of(chunks[number]))) for number in todo)
    first = list(islice(prepared, 1))  # what is wrong with all of its users is said before anything is written
    bank = shared_bank(ready, folder)
    folder.begin(config, ready.policy, ready.pairs, identity, size)
    if share.rank == 0:
        folder.write(run / SCREENS, json.dumps([own.to_json() for own in ready.screens], indent=2) + "\n")
    if bank is not None:
        folder.write(folder.bank, constraint_data_to_json(bank))
    start = shared_start(ready, bank, folder)
    place = config.fleet.reference_cache
    cache = None if place is None else shared_reference(ready.adapted, Path(place))
    known = Reference(ready.adapted, folder.reference, cache)
    if bank is not None and len(chunks) > 1:  # a lone chunk scores them in the same passes as its own rows
        known.add(bank.rows())
    folder.set_ready()
    tracking = Tracking(config, run)
    users = sum(len(chunks[number]) for number in todo)
    with Progress(console, folder.metrics, users, share, tracking) as progress:
        if ready.adapted.notice is not None and share.rank == 0:
            progress.say(ready.adapted.notice)
        for number, chunk in chain(first, prepared):
            of = f" of {ready.pairs.users:,}" if len(chunks) > 1 else ""
            found = f"{len(chunk.dropped)} found by the screen"
            progress.say(f"{len(chunk.rows)}{of} users, {chunk.pairs:,} pairs, {found}")
            reference = train_chunk(ready, folder, number, chunk, bank, known, start, progress)
            if cache is not None:
                cache.learn(reference)
    if share.rank > 0:
        return None
    folder.wait_for(share.job(len(chunks)))
    if share.shards > 1:
        return None
    folder.join(len(chunks))
    write_report(run)
    integrity.append(folder.trail, "finished", users=sum(map(len, chunks)))
    write_run_manifest(run)
    folder.clear()
    results = RunResults(run)
    tracking.end(summarise(results), progress.taken)
    return results


def shared_bank(ready: Prepared, folder: RunDir) -> ConstraintData | None:
    """The run's constraint bank: from the folder, where a process before this one has written it, else made now."""
    if folder.bank.exists():
        try:
            return constraint_data_from_json(folder.bank.read_text())
        except ValueError:
            pass  # a damaged file is written anew
    return constraint_bank(ready.config, ready.policy, ready.adapted)


def shared_start(ready: Prepared, bank: ConstraintData | None, folder: RunDir) -> WarmStart | None:
    """What every user of the run begins with, where there are requirements to teach: from the folder, else made now."""
    if folder.start.exists():
        return WarmStart(**checkpoint.load(folder.start, ready.adapted.base.device)[0])
    config = ready.config
    start = train_warm_start(ready.adapted, bank, config.dpo, config.constraint, config.seed)
    if start is not None:
        checkpoint.save(folder.start, start._asdict(), {})
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
    asked = (policy.hash, constraint.refusals_per_probe, OPENING_LENGTH, seed, tokens)
    return cached_constraint_data(adapted, Path(config.fleet.reference_cache), asked, made)


def with_reference(
    adapted: AdaptedModel,
    users: Iterable[UserRows],
    bank: ConstraintData | None,
    file: Path | None = None,
    known: Reference | None = None,
) -> Reference:
    """The base's log-probabilities of what training compares with, once for all users (see `rows_ahead`)."""
    reference = Reference(adapted, file, known)
    reference.add(rows_ahead(adapted, users, bank.rows() if bank else ()))
    return reference


def train_chunk(
    ready: Prepared,
    folder: RunDir,
    number: int,
    chunk: Chunk,
    bank: ConstraintData | None,
    known: Reference,
    start: WarmStart | None,
    progress: Progress,
) -> Reference:
    """Trains, judges and writes some users, a cohort after the other. Returns their reference."""
    config, place = ready.config, folder.chunk(number)
    integrity.append_all(folder.trail, screened(number, len(chunk.rows), chunk.pairs, chunk.dropped))
    reference = with_reference(ready.adapted, chunk.rows, bank, place / "reference.safetensors", known)
    constraint = None if bank is None else LagrangianConstraint(bank, config.constraint, config.seed)
    engine = Engine(
        ready.adapted,
        chunk.rows,
        reference,
        constraint,
        config.dpo,
        config.fleet,
        config.seed,
        place,
        start,
    )
    results = read_results(place) if (place / RESULTS).exists() else []
    judged = {result.user_id for result in results}
    steps = {schedule.rows.user_id: schedule.steps for schedule in engine.schedules.values()}
    progress.begin(steps, engine.finished, len(chunk.rows))
    retreat = None if start is None else interpolation_of(ready, start)
    fleet = (user for user in engine.run(progress.step, progress.say) if user.user_id not in judged)

    def decided() -> Iterator[Cohort]:
        for users in cohorts(fleet, engine.count):
            for user in users:
                progress.end(user.user_id, user.steps)
            progress.say(f"judging {', '.join(user.user_id[:32] for user in users)}")
            yield judge(ready, folder.path, chunk, users, retreat, folder.trail)

    for done in overlapped(write, decided()):  # adapters are written while the next users train
        results += done
        write_results(place, results)
    idle = [chunk.untrained(rows) for rows in chunk.rows if not rows.train]
    integrity.append_all(folder.trail, map(ended, idle))
    results += idle
    order = {user.user_id: n for n, user in enumerate(chunk.rows)}
    results.sort(key=lambda result: order[result.user_id])
    write_results(place, results)
    folder.finish(number, chunk.dropped)
    ready.examination.forget_users()
    return reference


def interpolation_of(ready: Prepared, start: WarmStart) -> WarmStartInterpolation:
    """The way back to what every user begins with, for those whose answers lack what the policy requires."""
    gate, rules = ready.config.gate, ready.policy.requirements
    prompts, tokens = REQUIREMENT_PROMPTS, gate.max_new_tokens
    return WarmStartInterpolation(ready.adapted, start.adapter, rules, prompts, tokens, ready.config.seed)


def cohorts(users: Iterable[TrainedUser], size: int) -> Iterator[list[TrainedUser]]:
    """Users in groups of up to `size`, as they come."""
    users = iter(users)
    while group := list(islice(users, max(1, size))):
        yield group


def evaluate(run: Path) -> list[Result]:
    """Measures a run again from the adapters in its folders; what the gate decided stays as it is.

    The certify probes are not looked at again: a second look would have to be paid for. Raises InputError where the
    users' pairs are no longer those of the run.
    """
    config = read_run_config(run)
    folder = RunDir(run)
    ready = prepare(config, read_inputs(config, folder.roll), check=False)  # the run did, of the same pairs
    folder.check_same({PAIRS: ready.pairs.fingerprint})
    before, results = iter(RunResults(run)), list[Result]()
    for users in chunks_of(ready.pairs.users, folder.chunk_size):
        rows = {user.user_id: user for user in prepare_users(ready, ready.pairs.of(users)).rows}
        for result in islice(before, len(rows)):
            if result.path is None:
                results.append(result)
                continue
            flat = read_adapter(run / result.path, list(ready.adapted.spans.values())).to(ready.adapted.base.device)
            [found] = ready.examination.measures(flat[None], [rows[result.user_id]], [1.0])
            results.append(replace(result, measures=found))
        ready.examination.forget_users()
    return results
