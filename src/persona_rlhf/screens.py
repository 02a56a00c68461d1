"""The classifiers that a config screens requests with, each with its threshold."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from persona_rlhf.config import Config
from persona_rlhf.evaluation.calibration import Calibrated, calibrated, measured
from persona_rlhf.evaluation.examination import Examination
from persona_rlhf.evaluation.guards import load_guard
from persona_rlhf.evaluation.openings import Likelihood, Refuses
from persona_rlhf.evaluation.retention import some
from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.policy.hazards import Probe, Split
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.policy.tiers import Policy
from persona_rlhf.preferences.messages import Message
from persona_rlhf.preferences.patterns import Patterns
from persona_rlhf.preferences.requests import RequestClassifier, Screen
from persona_rlhf.training.fleet import AdaptedModel

_MOST = 400  # probes of a split that are asked, and their twins


def screens_of(
    config: Config,
    policy: Policy,
    adapted: AdaptedModel,
    examination: Examination,
    rules: Patterns | None,
    measure: bool = True,
) -> list[Calibrated]:
    """All screens of a config, measured on `dev` probes; without `measure`, on those only that a threshold needs.

    Raises InputError where one cannot be loaded or calibrated.
    """
    settings, dev, found = config.screening, _some(policy, "dev"), list[Calibrated]()

    def known(classifier: RequestClassifier) -> None:
        """It says yes or no, 1 or 0."""
        found.append(measured(Screen(classifier, 1.0), dev if measure else [], policy.categories))

    def scored(classifier: RequestClassifier) -> None:
        """It says how much."""
        try:
            found.append(calibrated(classifier, dev, policy.categories, settings.false_alarms))
        except ValueError as fault:
            raise InputError([Problem(str(config.policy.documents[0]), None, "screening", str(fault))]) from fault

    if rules is not None:
        known(rules)
    if settings.base == "answer":
        known(Refuses(adapted, examination.base_refuses))
    elif settings.base == "likelihood":
        scored(_likelihood(adapted, policy, config.seed))
    if settings.classifier is not None:
        scored(load_guard(settings.classifier, adapted.base.device))
    return found


def screens_table(screens: Sequence[Calibrated]) -> Table:
    """What each screen finds, in rows."""
    table = Table(title="Screens, on dev probes that their thresholds were not set on (95% intervals)")
    for name in ("what it says", "from", "forbidden requests found", "harmless twins found"):
        table.add_column(name)
    for own in screens:
        threshold = f"{own.screen.threshold:.4g}"
        table.add_row(own.screen.classifier.finding, threshold, str(own.forbidden), str(own.harmless))
        for name, share in own.categories.items():
            table.add_row(f"  {name}", "", str(share), "")
    return table


def _likelihood(adapted: AdaptedModel, policy: Policy, seed: int) -> Likelihood:
    requests = [(Message("user", probe.prompt),) for probe in _some(policy, "train")]
    try:
        return Likelihood(adapted, is_refusal, requests, seed)
    except ValueError as fault:
        raise InputError([Problem(adapted.base.name, None, "base.model", str(fault))]) from fault


def _some(policy: Policy, split: Split) -> list[Probe]:
    probes = policy.probes(split)
    wanted = set(some((probe.prompt for probe in probes), _MOST))
    return [probe for probe in probes if probe.prompt in wanted]
