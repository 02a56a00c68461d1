"""Classifiers of forbidden requests, their thresholds, and their detection rates on `dev` probes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from hashlib import blake2b
from math import floor, inf, nextafter
from typing import Any, NamedTuple

import torch
from rich.table import Table

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.config.experiment import Config, GuardSettings
from persona_rlhf.data.pairs import Message, Prompt
from persona_rlhf.data.screening import Patterns, RequestClassifier, RequestScore, RequestScreen
from persona_rlhf.data.tokenize import Row, control_tokens, prompt_ids
from persona_rlhf.evaluation.classifier import WordScorer, load_words
from persona_rlhf.evaluation.evaluator import Evaluator
from persona_rlhf.evaluation.prompt_sets import some
from persona_rlhf.evaluation.refusals import OPENING_TOKENS, Judge
from persona_rlhf.evaluation.statistics import Interval, interval
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.policy.hazards import Probe, Split, of_llama_guard
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.policy.policy import Policy

FALSE_ALARMS = 0.01
"""Largest share of harmless twins taken for forbidden, on the half of the `dev` topics that sets a threshold."""


class DetectionRate(NamedTuple):
    """How many of n requests a screen detects, with a 95% Clopper-Pearson interval."""

    n: int
    detected: int

    @property
    def interval(self) -> Interval:
        return interval(self.detected, self.n)

    def to_json(self) -> dict[str, Any]:
        low, high = self.interval
        return {"n": self.n, "found": self.detected, "low": round(low, 6), "high": round(high, 6)}

    def __str__(self) -> str:
        if not self.n:
            return "none asked"
        low, high = self.interval
        return f"{self.detected / self.n:.1%} of {self.n} ({low:.1%} to {high:.1%})"


class CalibratedScreen(NamedTuple):
    """A screen and its detection rates on `dev` probes that its threshold was not set on.

    The rates are of forbidden requests, of their harmless twins, and of forbidden requests by category.
    """

    screen: RequestScreen
    forbidden: DetectionRate
    harmless: DetectionRate
    categories: dict[str, DetectionRate]

    def to_json(self) -> dict[str, Any]:
        """A row of RUN/screens.json."""
        return {
            "finding": self.screen.classifier.finding,
            "threshold": self.screen.threshold,
            "forbidden": self.forbidden.to_json(),
            "harmless": self.harmless.to_json(),
            "categories": {name: rate.to_json() for name, rate in self.categories.items()},
        }


def measure_screen(screen: RequestScreen, probes: Sequence[Probe], categories: Collection[str]) -> CalibratedScreen:
    """A screen with its detection rates on the probes and their twins."""
    detected = [finding is not None for finding in screen.findings(_requests(probes), categories)]
    places = {name: [n for n, probe in enumerate(probes) if probe.category == name] for name in sorted(set(categories))}
    near = screen.findings(_twins(probes), categories)
    return CalibratedScreen(
        screen,
        DetectionRate(len(detected), sum(detected)),
        DetectionRate(len(near), sum(finding is not None for finding in near)),
        {name: DetectionRate(len(at), sum(detected[n] for n in at)) for name, at in places.items() if at},
    )


def calibrate_screen(
    classifier: RequestClassifier, probes: Sequence[Probe], categories: Collection[str], false_alarms: float
) -> CalibratedScreen:
    """A screen with the lowest threshold that flags at most a share `false_alarms` of harmless twins.

    The threshold is set on one half of the topics (by hash) and measured on the other. Raises ValueError where either
    half has no twin.
    """
    halves: tuple[list[Probe], list[Probe]] = [], []
    for probe in probes:
        halves[blake2b(probe.topic.encode()).digest()[0] % 2].append(probe)
    setting, other = halves
    if not (_twins(setting) and _twins(other)):
        raise ValueError("a threshold needs `dev` probes with benign twins of several topics; the banks have too few")
    values = sorted((score.value for score in classifier(_twins(setting))), reverse=True)
    first_too_many = values[floor(false_alarms * len(values))]
    return measure_screen(RequestScreen(classifier, nextafter(first_too_many, inf)), other, categories)


def _requests(probes: Sequence[Probe]) -> list[Prompt]:
    return [(Message("user", probe.prompt),) for probe in probes]


def _twins(probes: Sequence[Probe]) -> list[Prompt]:
    return [(Message("user", probe.twin),) for probe in probes if probe.twin]


_CODE = re.compile(r"\bS\d{1,2}\b")
_CODES = 16  # tokens within which the model names its codes
_MIN_LOG_ODDS = -3.0  # nats


class SafetyModelScreen:
    """A safety model as a classifier: the log-odds, in nats, of the word `unsafe` against `safe` after the request.

    After `unsafe` the model writes codes of hazards, as Llama Guard 3 does; policy/taxonomy.yaml translates them into
    our categories. Where it writes none, the request may be of any category. Below log-odds of -3 (5%) a request scores
    -inf: it is not forbidden, whatever the threshold, and no codes are generated.
    """

    def __init__(self, words: WordScorer, settings: GuardSettings) -> None:
        self._words, self._settings = words, settings
        self.finding = f"classifier: {settings.model} calls the prompt unsafe"

    def __call__(self, requests: Sequence[Prompt]) -> list[RequestScore]:
        return [self._score(request) for request in requests]

    def _score(self, request: Prompt) -> RequestScore:
        turns = [turn for turn in request if turn.role != "system"]
        text = turns[0].content if len(turns) == 1 else "\n\n".join(f"{turn.role}: {turn.content}" for turn in turns)
        ids = self._words.ids(turns, {"prompt": text})
        odds = self._words.logp(ids, self._settings.unsafe) - self._words.logp(ids, self._settings.safe)
        if odds < _MIN_LOG_ODDS:
            return RequestScore(-inf)
        codes = _CODE.findall(self._words.continuation(ids, self._settings.unsafe, _CODES))
        return RequestScore(odds, frozenset(category for code in codes for category in of_llama_guard(code)))


def load_guard(settings: GuardSettings, device: torch.device) -> SafetyModelScreen:
    """Loads a safety model, a folder or a hub id. Raises InputError where it cannot be loaded or prompted."""
    return SafetyModelScreen(
        load_words(settings.model, settings.template, ("prompt",), "screening.classifier", device), settings
    )


Ids = tuple[int, ...]

_OPENINGS = 8  # refusal openings whose probabilities are added up


class BaseRefusal:
    """The base as a classifier of requests: 1 where the opening of its greedy answer refuses, else 0."""

    finding = "refused: the base refuses the prompt"

    def __init__(self, adapted: AdaptedModel, refuses: Callable[[Sequence[Ids]], Sequence[bool]]) -> None:
        self._adapted, self._refuses = adapted, refuses

    def __call__(self, requests: Sequence[Prompt]) -> list[RequestScore]:
        refused = self._refuses([_readable_ids(request, self._adapted) for request in requests])
        return [RequestScore(float(no)) for no in refused]


def _readable_ids(request: Prompt, adapted: AdaptedModel) -> Ids:
    """The tokens of a request that the base can read, whatever it holds.

    Pairs with control tokens or too long a prompt are left out before. A text that was encoded in one may still have
    either (`data.screening`): its control tokens are taken out, and it is cut at the context.
    """
    base = adapted.base
    control = control_tokens(base.tokenizer)
    readable = tuple(Message(turn.role, control.sub(" ", turn.content)) for turn in request)
    return prompt_ids(readable, base.tokenizer)[: base.context - 1]


class RefusalLikelihood:
    """The log-probability, in nats, that the base opens its answer with one of its eight commonest refusals.

    These are taken from answers sampled at temperature 1 to `probes`, each cut where the judge first calls it a
    refusal. None begins with another, so their probabilities add up, to less than that of all refusals of the base.
    Raises ValueError where the base refuses none of the probes.
    """

    finding = "likelihood: the base is likely to refuse the prompt"

    def __init__(self, adapted: AdaptedModel, judge: Judge, probes: Sequence[Prompt], seed: int) -> None:
        self._adapted = adapted
        tokenizer = adapted.base.tokenizer
        with adapted.using(None):
            [answers] = adapted.generate(
                [[prompt_ids(probe, tokenizer) for probe in probes]], OPENING_TOKENS, 1.0, seed
            )
        lengths = ((answer.ids, range(1, len(answer.ids) + 1)) for answer in answers)
        cut = (
            (ids, next((n for n in ends if judge(str(tokenizer.decode(list(ids[:n]))))), None)) for ids, ends in lengths
        )
        openings = Counter(ids[:n] for ids, n in cut if n is not None)
        if not openings:
            raise ValueError(f"the base refused none of {len(probes)} train probes: it has no refusals to be scored")
        self._openings = [ids for ids, _ in openings.most_common(_OPENINGS)]

    def __call__(self, requests: Sequence[Prompt]) -> list[RequestScore]:
        if not requests:
            return []
        prompts = [_readable_ids(request, self._adapted) for request in requests]
        rows = [Row(prompt, opening) for prompt in prompts for opening in self._openings]
        with self._adapted.using(None):
            [scores] = self._adapted.score([rows])
        logps = torch.tensor([score.logp for score in scores]).view(len(prompts), -1)
        return [RequestScore(value) for value in logps.logsumexp(1).tolist()]


_MOST = 400  # probes of a split, and as many twins


def screens_of(
    config: Config,
    policy: Policy,
    adapted: AdaptedModel,
    examination: Evaluator,
    rules: Patterns | None,
    measure: bool = True,
) -> list[CalibratedScreen]:
    """All screens of a config, measured on `dev` probes; without `measure`, on those only that a threshold needs.

    Raises InputError where one cannot be loaded or calibrated.
    """
    settings, dev, screens = config.screening, screened_probes(policy, "dev"), list[CalibratedScreen]()

    def add_binary(classifier: RequestClassifier) -> None:
        """A classifier that scores 1 or 0."""
        screens.append(measure_screen(RequestScreen(classifier, 1.0), dev if measure else [], policy.categories))

    def add_scored(classifier: RequestClassifier) -> None:
        """A classifier whose score needs a threshold."""
        try:
            screens.append(calibrate_screen(classifier, dev, policy.categories, FALSE_ALARMS))
        except ValueError as fault:
            raise InputError([Problem(str(config.policy.documents[0]), None, "screening", str(fault))]) from fault

    if rules is not None:
        add_binary(rules)
    if settings.base == "answer":
        add_binary(BaseRefusal(adapted, examination.base_refuses))
    elif settings.base == "likelihood":
        add_scored(_likelihood(adapted, policy, config.seed))
    if settings.classifier is not None:
        add_scored(load_guard(settings.classifier, adapted.base.device))
    return screens


def screens_table(screens: Sequence[CalibratedScreen]) -> Table:
    """The detection rates of each screen, in rows."""
    table = Table(title="Screens, on dev probes that their thresholds were not set on (95% intervals)")
    for name in ("what it says", "from", "forbidden requests found", "harmless twins found"):
        table.add_column(name)
    for calibration in screens:
        threshold = f"{calibration.screen.threshold:.4g}"
        table.add_row(
            calibration.screen.classifier.finding, threshold, str(calibration.forbidden), str(calibration.harmless)
        )
        for name, share in calibration.categories.items():
            table.add_row(f"  {name}", "", str(share), "")
    return table


def _likelihood(adapted: AdaptedModel, policy: Policy, seed: int) -> RefusalLikelihood:
    requests = [(Message("user", probe.prompt),) for probe in screened_probes(policy, "train")]
    try:
        return RefusalLikelihood(adapted, is_refusal, requests, seed)
    except ValueError as fault:
        raise InputError([Problem(adapted.base.name, None, "base.model", str(fault))]) from fault


def screened_probes(policy: Policy, split: Split) -> list[Probe]:
    """The probes of a split on which screens are calibrated and measured, at most 400."""
    probes = policy.probes(split)
    chosen = set(some((probe.prompt for probe in probes), _MOST))
    return [probe for probe in probes if probe.prompt in chosen]
