"""The whole line, from a config to released adapters; each arrow of it is a public function."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from persona_rlhf.config import Config, read_config
from persona_rlhf.evaluation.examination import Examination
from persona_rlhf.evaluation.measures import Measures
from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.materials import Materials, read_materials
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.policy.tiers import Policy
from persona_rlhf.preferences.messages import Message, Prompt
from persona_rlhf.preferences.pairs import PreferencePair
from persona_rlhf.preferences.screening import Dropped, fit, screen
from persona_rlhf.preferences.tokens import UserRows, halved, prompt_ids, tokenize
from persona_rlhf.progress import Progress
from persona_rlhf.release.exporter import Exporter
from persona_rlhf.release.manifest import BaseInfo, DataInfo, Provenance
from persona_rlhf.release.outcome import measured, outcome, skipped
from persona_rlhf.release.peft_folder import read_adapter
from persona_rlhf.release.report import write_report
from persona_rlhf.release.results import Result, read_results, write_results
from persona_rlhf.release.seal import seal
from persona_rlhf.run_folder import RunFolder, identity_of
from persona_rlhf.training.allocator import keep_big_blocks
from persona_rlhf.training.base import load_base
from persona_rlhf.training.constraint import ConstraintBank, build_bank
from persona_rlhf.training.engine import Engine, TrainedUser
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.reference import Reference


class Prepared(NamedTuple):
    """A config read to the end: nothing is written yet, and nothing in it is wrong."""

    policy: Policy
    adapted: AdaptedModel
    examination: Examination
    pairs: list[PreferencePair]
    rows: list[UserRows]
    dropped: list[Dropped]


def train(
    config: Config, run: Path, resume: bool, console: Console, materials: Materials | None = None
) -> list[Result]:
    """Pairs and policy in, a run folder with one adapter per user out; the results in the order of the users.

    `materials` are read from the config where they are not given. Raises InputError for whatever is wrong with the
    input, before anything is written.
    """
    keep_big_blocks()
    folder = RunFolder(run)
    folder.check_place(resume)
    ready = prepare(config, materials)
    identity = identity_of(config, ready.policy, ready.pairs, ready.adapted.base.weights_hash)
    if resume:
        folder.check_same(identity)
    console.print(f"{len(ready.rows)} users, {len(ready.pairs)} pairs, {len(ready.dropped)} found by the screen")
    bank = constraint_bank(config, ready.policy, ready.adapted)
    folder.begin(config, ready.policy, ready.dropped, identity)
    reference = with_reference(ready.adapted, ready.rows, bank, folder.state / "reference.safetensors")
    engine = Engine(
        ready.adapted,
        ready.rows,
        reference,
        bank,
        config.dpo,
        config.constraint,
        config.fleet,
        config.seed,
        folder.state,
    )
    results = read_results(folder.state) if resume and (folder.state / "results.jsonl").exists() else []
    judged = {result.user_id for result in results}
    with Progress(console, folder.metrics, {s.rows.user_id: s.steps for s in engine.schedules.values()}) as progress:
        for user in engine.finished:
            progress.skip(user.user_id, user.steps)
        fleet = (user for user in engine.run(progress.step) if user.user_id not in judged)
        for cohort in cohorts(fleet, engine.count):
            for user in cohort:
                progress.end(user.user_id, user.steps)
            progress.say(f"judging {', '.join(user.user_id[:32] for user in cohort)}")
            results += release(config, run, ready, cohort)
            write_results(folder.state, results)
    for rows in ready.rows:
        if not rows.train:
            results.append(skipped(rows.user_id, "no pair to train on is left", data_of(rows, ready.dropped).pairs))
    order = {user.user_id: n for n, user in enumerate(ready.rows)}
    results.sort(key=lambda result: order[result.user_id])
    write_results(run, results)
    write_report(run)
    seal(run)
    return results


def prepare(config: Config, materials: Materials | None = None) -> Prepared:
    """Reads and checks everything that a config names: policy, pairs, base, tokens, and the base's own refusals."""
    policy, pairs, utilities, ordinary = materials or read_materials(config)
    adapted = AdaptedModel(load_base(config.base), config.lora)
    base = adapted.base
    users = len({pair.user_id for pair in pairs})
    examination = Examination(
        adapted,
        policy,
        is_refusal,
        config.gate,
        config.evaluation,
        users=users,
        ordinary=ordinary,
        utilities=utilities,
        seed=config.seed,
    )
    tokenize(pairs, base.tokenizer, base.context)  # whatever the base cannot read is said before it is asked anything
    if config.gate.enabled:
        examination.check_base()

    def refuses(prompts: Sequence[Prompt]) -> list[bool]:
        return examination.base_refuses([prompt_ids(prompt, base.tokenizer) for prompt in prompts])

    screened = screen(pairs, policy, config.screening, refuses)
    fitted = fit(tokenize(screened.kept, base.tokenizer, base.context), base.tokenizer, base.context)
    known = {user.user_id for user in fitted.rows}
    rows = [halved(user) for user in fitted.rows] if config.dpo.early_stop is not None else fitted.rows
    gone = [UserRows(user, [], []) for user in dict.fromkeys(pair.user_id for pair in pairs) if user not in known]
    dropped = [*screened.dropped, *fitted.dropped]
    return Prepared(policy, adapted, examination, pairs, [*rows, *gone], dropped)


def constraint_bank(config: Config, policy: Policy, adapted: AdaptedModel) -> ConstraintBank | None:
    """The policy's restrictions as anchors for training, from the base's own refusals; None where it is switched off.

    Raises InputError where the base refuses no train probe of a category.
    """
    if not config.constraint.enabled:
        return None
    limits = {rule.category: rule.limit for rule in policy.restrictions}
    try:
        return build_bank(
            adapted,
            list(limits),
            list(limits.values()),
            policy.probes("train"),
            lambda text: prompt_ids((Message("user", text),), adapted.base.tokenizer),
            is_refusal,
            config.constraint,
            config.seed,
            config.gate.max_new_tokens,
        )
    except ValueError as fault:
        raise InputError([Problem(adapted.base.name, None, "base.model", f"not certifiable: {fault}")]) from fault


def with_reference(
    adapted: AdaptedModel, users: Iterable[UserRows], bank: ConstraintBank | None, file: Path | None = None
) -> Reference:
    """The base's log-probabilities of everything that training compares with, once for all users."""
    reference = Reference(adapted, file)
    pairs = (pair for user in users for pair in (*user.train, *user.deciding))
    rows = [row for pair in pairs for row in (pair.chosen, pair.rejected)]
    reference.add(rows + (bank.rows() if bank else []))
    return reference


def cohorts(users: Iterable[TrainedUser], size: int) -> Iterator[list[TrainedUser]]:
    """Users in groups of up to `size`, as they come."""
    users = iter(users)
    while group := list(islice(users, max(1, size))):
        yield group


def release(config: Config, run: Path, ready: Prepared, cohort: Sequence[TrainedUser]) -> list[Result]:
    """Judges a cohort, measures it at the alpha that the gate allows, and writes the adapters that may leave."""
    rows = {user.user_id: user for user in ready.rows}
    examination, adapted = ready.examination, ready.adapted
    sound = [user for user in cohort if user.adapter is not None]
    verdicts, measures = {}, dict[str, Measures]()
    if sound:
        flat = torch.stack([user.adapter for user in sound if user.adapter is not None]).to(adapted.base.device)
        verdicts = dict(zip([user.user_id for user in sound], examination.verdicts(flat), strict=True))
        alphas = [verdict.alpha for verdict in verdicts.values()]
        found = examination.measures(flat, [rows[user.user_id] for user in sound], alphas)
        measures = dict(zip(verdicts, found, strict=True))
    base = BaseInfo.of(adapted.base.name, adapted.base.weights_hash)
    settings = config.model_dump(mode="json", include={"seed", "screening", "lora", "dpo", "constraint", "gate"})
    exporter = Exporter(run, adapted, config.lora, Provenance.of(base, ready.policy, examination.demands, settings))
    results = []
    for user in cohort:
        verdict = verdicts.get(user.user_id)
        data = data_of(rows[user.user_id], ready.dropped)
        written = None
        if user.adapter is not None and verdict is not None and verdict.admitted:
            written = exporter.write(user.user_id, user.adapter, verdict, measures[user.user_id], data)
        pool, ceiling = examination.demands.in_pool, config.constraint.ceiling
        results.append(outcome(user, data.pairs, verdict, measures.get(user.user_id), written, pool, ceiling))
    return results


def data_of(user: UserRows, dropped: Sequence[Dropped]) -> DataInfo:
    """What is said of a user's pairs: counts and a fingerprint, no text."""
    out = sum(found.pair.user_id == user.user_id and found.action != "flagged" for found in dropped)
    return DataInfo.of([row.pair for row in (*user.train, *user.heldout, *user.deciding)], out)


def evaluate(run: Path) -> list[Result]:
    """Measures a run again from the adapters in its folders; what the gate decided stays as it is.

    The certify probes are not looked at again: a second look would have to be paid for.
    """
    config = read_config(run / "config.yaml")
    ready = prepare(config)
    rows = {user.user_id: user for user in ready.rows}
    results = []
    for result in read_results(run):
        if result.path is None:
            results.append(result)
            continue
        flat = read_adapter(run / result.path, list(ready.adapted.spans.values())).to(ready.adapted.base.device)
        [found] = ready.examination.measures(flat[None], [rows[result.user_id]], [1.0])
        results.append(measured(result, found))
    return results
