"""A config read to the end, and its users made ready for training, some at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.config.experiment import Config
from persona_rlhf.data.feedback import Review
from persona_rlhf.data.pairs import PreferencePair, first_problems
from persona_rlhf.data.screening import Dropped, fit, screen
from persona_rlhf.data.store import PairStore
from persona_rlhf.data.tokenize import UserRows, halved, prompt_problems, tokenize
from persona_rlhf.evaluation.evaluator import Evaluator
from persona_rlhf.evaluation.refusals import load_classifier
from persona_rlhf.evaluation.request_screens import CalibratedScreen, screens_of
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import load_base
from persona_rlhf.pipeline.inputs import RunInputs, read_inputs
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.policy.policy import Policy
from persona_rlhf.release.manifest import DataInfo
from persona_rlhf.release.results import Result, untrained
from persona_rlhf.release.signing import Signer, signer


class Prepared(NamedTuple):
    """What all users of a run have in common, read and checked: nothing is written yet, and nothing in it is wrong."""

    config: Config
    policy: Policy
    adapted: AdaptedModel
    examination: Evaluator
    pairs: PairStore
    screens: Sequence[CalibratedScreen] = ()
    reviews: Mapping[str, Review] = MappingProxyType({})
    sign: Signer | None = None


class Chunk(NamedTuple):
    """Users to be trained together, how many `pairs` they had, what the screen found in these, and why some users
    cannot be trained at all."""

    pairs: int
    rows: list[UserRows]
    dropped: list[Dropped]
    failed: dict[str, str]

    def data_of(self, user: UserRows) -> DataInfo:
        """What is said of a user's pairs: counts and a fingerprint, no text."""
        out = sum(found.pair.user_id == user.user_id and not found.trained for found in self.dropped)
        return DataInfo.of([row.pair for row in (*user.train, *user.heldout, *user.deciding)], out)

    def untrained(self, user: UserRows) -> Result:
        """The line of a user without a pair to train on."""
        fault, against = self.failed.get(user.user_id), self.against_policy(user.user_id)
        return untrained(user.user_id, self.data_of(user).pairs, fault, against)

    def against_policy(self, user_id: str) -> int:
        """How many pairs of a user the screen found to teach against the policy, whatever became of them."""
        return sum(found.pair.user_id == user_id and found.alarming for found in self.dropped)


def prepare(config: Config, materials: RunInputs | None = None, check: bool = True) -> Prepared:
    """Reads everything that a config names. With `check`, every prompt is tried, and the base asked its own refusals.

    Raises InputError for whatever is wrong.
    """
    policy, pairs, utilities, ordinary, facts, reviews, rules = materials or read_inputs(config)
    sign = None if config.release.signing_key is None else signer(config.release.signing_key)
    adapted = AdaptedModel(load_base(config.base), config.lora)
    classifier = config.gate.classifier
    second = None if classifier is None else load_classifier(classifier, adapted.base.device)
    examination = Evaluator(
        adapted,
        policy,
        is_refusal,
        config.gate,
        config.evaluation,
        users=pairs.users,
        ordinary=ordinary,
        facts=facts,
        utilities=utilities,
        second=second,
        seed=config.seed,
    )
    ready = Prepared(config, policy, adapted, examination, pairs, reviews=reviews, sign=sign)
    if check:
        _check_prompts(ready)
        if config.gate.enabled:
            examination.check_base()
    return ready._replace(screens=screens_of(config, policy, adapted, examination, rules, measure=check))


def _check_prompts(ready: Prepared) -> None:
    """Whatever the base cannot read is said before it is asked anything."""
    base, problems = ready.adapted.base, list[Problem]()
    for users in chunks_of(ready.pairs.users, 256):
        problems += prompt_problems(ready.pairs.of(users), base.tokenizer, base.context)
    if problems:
        raise InputError(first_problems(problems))


def chunks_of(users: int, size: int) -> list[range]:
    """The users of a run, by their numbers, in chunks of `size`."""
    return [range(start, min(start + size, users)) for start in range(0, users, size)]


def prepare_users(ready: Prepared, pairs: Sequence[PreferencePair]) -> Chunk:
    """Screens and tokenizes users' pairs. A user who makes that raise fails alone; where all do, it is not theirs."""
    try:
        return _prepared(ready, pairs)
    except OSError:
        raise
    except Exception:
        owners = list(dict.fromkeys(pair.user_id for pair in pairs))
        whole = Chunk(len(pairs), [], [], {})
        for owner in owners:
            try:
                own = _prepared(ready, [pair for pair in pairs if pair.user_id == owner])
            except Exception as fault:
                whole.failed[owner] = f"could not be prepared ({type(fault).__name__}: {fault})"
                whole.rows.append(UserRows(owner, [], []))
            else:
                whole.rows.extend(own.rows)
                whole.dropped.extend(own.dropped)
        if len(whole.failed) == len(owners):
            raise
        return whole


def _prepared(ready: Prepared, pairs: Sequence[PreferencePair]) -> Chunk:
    base = ready.adapted.base
    screens = [own.screen for own in ready.screens]
    screened = screen(pairs, ready.policy, ready.config.screening, screens, ready.reviews)
    fitted = fit(tokenize(screened.kept, base.tokenizer, base.context), base.tokenizer, base.context)
    tokenized = fitted.rows if ready.config.dpo.early_stop is None else [halved(user) for user in fitted.rows]
    known = {user.user_id: user for user in tokenized}
    owners = dict.fromkeys(pair.user_id for pair in pairs)
    rows = [known.get(owner) or UserRows(owner, [], []) for owner in owners]
    return Chunk(len(pairs), rows, [*screened.dropped, *fitted.dropped], {})
