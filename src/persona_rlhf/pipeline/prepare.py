"""Preparation of a run: policy, base and evaluator, then users screened and tokenized chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.common.errors import InputError, Problem, counted
from persona_rlhf.config.experiment import Config
from persona_rlhf.config.training import BasisSettings
from persona_rlhf.data.feedback import Review
from persona_rlhf.data.near_copies import NearCopyIndex
from persona_rlhf.data.pairs import PreferencePair, first_problems
from persona_rlhf.data.personal_data import Finder, treat
from persona_rlhf.data.presidio import Presidio
from persona_rlhf.data.screening import Dropped, fit, screen
from persona_rlhf.data.store import PairStore
from persona_rlhf.data.tokenize import UserRows, by_user, halved, tokenize_readable, unreadable_prompts
from persona_rlhf.evaluation.answer_judge import GateJudges, judges_of
from persona_rlhf.evaluation.evaluator import Evaluator
from persona_rlhf.evaluation.request_screens import CalibratedScreen, screens_of
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import load_base
from persona_rlhf.models.multi_lora import fresh_adapter
from persona_rlhf.pipeline.inputs import RunInputs, read_inputs
from persona_rlhf.pipeline.kept_answers import read_answers
from persona_rlhf.pipeline.monitoring import OnProgress, ProgressEvent, silent, watched
from persona_rlhf.policy.policy import Policy
from persona_rlhf.release.foreign_adapter import ForeignAdapter
from persona_rlhf.release.foreign_fit import fit_problems, started
from persona_rlhf.release.manifest import DataInfo
from persona_rlhf.release.results import Result, untrained
from persona_rlhf.release.signing import Signer, signer
from persona_rlhf.training.labelled_pairs import AnswerPool, with_labels
from persona_rlhf.training.records import BasisUse
from persona_rlhf.training.reward_basis import RewardBasis, load_basis
from persona_rlhf.training.user_state import user_generator


class Prepared(NamedTuple):
    """The parts that all users of a run share, read and checked; nothing is written yet."""

    config: Config
    policy: Policy
    adapted: AdaptedModel
    examination: Evaluator
    pairs: PairStore
    judges: GateJudges
    screens: Sequence[CalibratedScreen] = ()
    reviews: Mapping[str, Review] = MappingProxyType({})
    near_copies: NearCopyIndex | None = None
    sign: Signer | None = None
    basis: RewardBasis | None = None
    start: ForeignAdapter | None = None
    finder: Finder | None = None

    def first_adapter(self, user_id: str) -> Float[Tensor, " params"] | None:
        """The adapter that a user begins with by `users.start`; None where it names none."""
        if self.start is None:
            return None
        lora, spans = self.config.lora, self.adapted.spans
        fresh = fresh_adapter(list(spans.values()), user_generator(self.config.seed, user_id, "init"))
        return started(self.start, spans, lora.alpha / lora.rank, fresh)

    def watched(self, event: ProgressEvent, on_progress: OnProgress, texts: int = 0) -> AbstractContextManager[None]:
        """Reports the texts that the run's models score and write inside, as `monitoring.watched`."""
        return watched((self.adapted, self.examination.adapted), event, on_progress, texts)


class Chunk(NamedTuple):
    """Users to be trained together: number of pairs, token rows, dropped pairs, reasons of failed users.

    `basis_use` tells for each user with labelled pairs what they stand on.
    """

    pairs: int
    rows: list[UserRows]
    dropped: list[Dropped]
    failed: dict[str, str]
    basis_use: Mapping[str, BasisUse] = MappingProxyType({})

    def data_of(self, user: UserRows) -> DataInfo:
        """Counts and fingerprint of a user's pairs; no text."""
        out = sum(dropped.pair.user_id == user.user_id and not dropped.trained for dropped in self.dropped)
        return DataInfo.of([row.pair for row in (*user.judged, *user.heldout, *user.deciding)], out)

    def untrained(self, user: UserRows) -> Result:
        """The result of a user without a pair to train on."""
        against = self.against_policy(user.user_id)
        return untrained(user.user_id, self.data_of(user).pairs, self.failed.get(user.user_id), against)

    def against_policy(self, user_id: str) -> int:
        """The number of a user's pairs that teach against the policy, dropped, quarantined or trained on."""
        return sum(dropped.pair.user_id == user_id and dropped.alarming for dropped in self.dropped)


def prepare(
    config: Config,
    inputs: RunInputs | None = None,
    check: bool = True,
    on_progress: OnProgress = silent,
    answers: Path | None = None,
) -> Prepared:
    """Reads everything that a config names. With `check`, every prompt is tokenized, and the gate tests the base.

    `answers`: a file of `kept_answers`, which the base need not write again.
    Raises InputError with the problems of the inputs.
    """
    inputs = inputs or read_inputs(config)
    policy, pairs, _, ordinary, _, reviews, rules, start = inputs
    sign = None if config.release.signing_key is None else signer(config.release.signing_key)
    finder = None if config.screening.presidio is None else Presidio(config.screening.presidio)
    adapted = AdaptedModel(load_base(config.base), config.lora)
    if start is not None and check:
        problems = fit_problems(start, config.base, adapted.base.weights_hash, adapted.spans)
        if problems:
            raise InputError(problems)
    basis = None if config.basis is None else basis_of(config.basis, adapted.base.weights_hash)
    judges = judges_of(config.gate, adapted.base.device)
    examination = evaluator_of(config, inputs, _judged(adapted, config), judges)
    if answers is not None:
        read_answers(examination, answers)
    near_copies = NearCopyIndex.of(policy, ordinary)
    shared = (reviews, near_copies, sign, basis, start, finder)
    ready = Prepared(config, policy, adapted, examination, pairs, judges, (), *shared)
    with ready.watched(ProgressEvent("preparing"), on_progress):
        if check:
            check_prompts(ready)
            if config.gate.enabled:
                examination.check_base()
        return ready._replace(screens=screens_of(config, policy, adapted, examination, rules, measure=check))


def basis_of(settings: BasisSettings, weights_hash: str) -> RewardBasis:
    """The basis that a config names. Raises InputError where the file is none, or was fitted over another base."""
    basis = load_basis(settings.file)
    if basis.base != weights_hash:
        sentence = f"was fitted over the base {basis.base[:16]}, and base.model is {weights_hash[:16]}; fit it again"
        raise InputError([Problem(str(settings.file), None, "basis.file", sentence)])
    return basis


def check_gpus(config: Config) -> None:
    """Raises InputError for more processes than GPUs, each of which would plan with all memory of its GPU."""
    if config.base.device == "cpu" or not torch.cuda.is_available():
        return
    gpus, processes = torch.cuda.device_count(), config.fleet.processes
    if processes > gpus:
        sentence = f"is {processes}, but torch finds {counted(gpus, 'GPU')} here; write {gpus}, or `base.device: cpu`"
        raise InputError([Problem("config", None, "fleet.processes", sentence)])


def evaluator_of(
    config: Config, inputs: RunInputs, adapted: AdaptedModel, judges: GateJudges, every: int = 1
) -> Evaluator:
    """The evaluator of a run's users; see `Evaluator` for `every`."""
    return Evaluator(
        adapted,
        inputs.policy,
        judges.first,
        config.gate,
        config.evaluation,
        users=inputs.pairs.users,
        ordinary=inputs.ordinary,
        facts=inputs.facts,
        utilities=inputs.utilities,
        second=judges.second,
        seed=config.seed,
        every=every,
    )


def _judged(adapted: AdaptedModel, config: Config) -> AdaptedModel:
    """The model that the gate judges: the trained one, or one in `gate.dtype` with the same weights."""
    if config.gate.dtype in (None, str(adapted.base.model.dtype).removeprefix("torch.")):
        return adapted
    judged = AdaptedModel(load_base(config.judged_base), config.lora)
    torch.set_float32_matmul_precision("highest")  # of both models, whichever was loaded last
    return judged


def check_prompts(ready: Prepared) -> None:
    """Raises InputError if the base can read no user's prompts, before it computes anything.

    A single prompt that it cannot read costs its pair only (`_prepared`).
    """
    base, problems = ready.adapted.base, list[Problem]()
    for users in chunks_of(ready.pairs.users, 8):  # one prompt that it can read is enough
        pairs = ready.pairs.of(users)
        unreadable = unreadable_prompts(pairs, base.tokenizer, base.context)
        if len(unreadable) < len(pairs):
            return
        problems += [pair.problem for pair in unreadable]
    if problems:
        raise InputError(first_problems(problems))


def chunks_of(users: int, size: int) -> list[range]:
    """The numbers of a run's users in chunks of `size`."""
    return [range(start, min(start + size, users)) for start in range(0, users, size)]


def prepare_users(ready: Prepared, pairs: Sequence[PreferencePair]) -> Chunk:
    """Screens and tokenizes users' pairs. An exception fails its user alone; raises where all users fail."""
    try:
        return _prepared(ready, pairs)
    except OSError:
        raise
    except Exception:
        users = list(dict.fromkeys(pair.user_id for pair in pairs))
        chunk = Chunk(len(pairs), [], [], {})
        for user_id in users:
            try:
                alone = _prepared(ready, [pair for pair in pairs if pair.user_id == user_id])
            except Exception as fault:
                chunk.failed[user_id] = f"could not be prepared ({type(fault).__name__}: {fault})"
                chunk.rows.append(UserRows(user_id, [], []))
            else:
                chunk.rows.extend(alone.rows)
                chunk.dropped.extend(alone.dropped)
        if len(chunk.failed) == len(users):
            raise
        return chunk


def label_pairs(ready: Prepared, chunk: Chunk, pool: AnswerPool | None) -> Chunk:
    """The chunk with labelled pairs for every user who has pairs to train on; without a basis, the chunk itself."""
    if ready.basis is None or ready.config.basis is None or pool is None:
        return chunk
    rows, use = list[UserRows](), dict[str, BasisUse]()
    for user in chunk.rows:
        if user.train:
            user, use[user.user_id] = with_labels(user, ready.basis, pool)
        rows.append(user)
    return chunk._replace(rows=rows, basis_use=use)


def _prepared(ready: Prepared, given: Sequence[PreferencePair]) -> Chunk:
    base = ready.adapted.base
    pairs, personal = treat(given, ready.config.screening.personal_data, ready.finder)
    screens = [calibrated.screen for calibrated in ready.screens]
    unreadable = unreadable_prompts(pairs, base.tokenizer, base.context)  # no screen of a model can read them either
    left_out = {pair.pair for pair in unreadable}
    readable = [pair for pair in pairs if pair not in left_out]
    settings = ready.config.screening
    refuses = ready.judges.text_judge()
    screened = screen(readable, ready.policy, settings, screens, ready.reviews, ready.near_copies, refuses)
    tokenized = tokenize_readable(screened.kept, base.tokenizer)
    fitted = fit(by_user(tokenized.rows), base.tokenizer, base.context)
    split = fitted.rows if ready.config.dpo.early_stop is None else [halved(user) for user in fitted.rows]
    rows_of = {user.user_id: user for user in split}
    users = dict.fromkeys(pair.user_id for pair in given)
    rows = [rows_of.get(user_id) or UserRows(user_id, [], []) for user_id in users]
    unread = [Dropped(pair, reason, "dropped") for pair, _, reason in (*unreadable, *tokenized.unreadable)]
    return Chunk(len(given), rows, [*personal, *unread, *screened.dropped, *fitted.dropped], {})
