"""Constraint data of a policy: the base's own refusals of its train probes as token rows, in memory and on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import atomic_write
from persona_rlhf.common.version import __version__
from persona_rlhf.config.training import ConstraintSettings
from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import Row, prompt_ids
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.policy import judges
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.policy.policy import Policy
from persona_rlhf.training.cache import identity_of_values
from persona_rlhf.training.constraint import OPENING_LENGTH, ConstraintData, ConstraintExample, RequirementExamples
from persona_rlhf.training.requirements import RequirementData, build_requirement_data


def build_constraint_data(
    adapted: AdaptedModel,
    categories: Sequence[str],
    limits: Sequence[float],
    probes: Sequence[Probe],
    encode: Callable[[str], tuple[int, ...]],
    is_refusal: Callable[[str], bool],
    settings: ConstraintSettings,
    seed: int,
    max_new_tokens: int,
    requirements: RequirementData | None = None,
) -> ConstraintData:
    """Samples the base's own refusals of the train probes at temperature 1, and keeps those the judge calls refusals.

    `encode` turns a prompt into token ids (chat template and all). A probe that the base never refused in
    `refusals_per_probe` tries is left out: the constraint preserves refusals and asks for no new ones. Raises
    ValueError if a category is left without a probe.
    """
    train = [probe for probe in probes if probe.split == "train" and probe.category in categories]
    tries = settings.refusals_per_probe
    prompts = [encode(probe.prompt) for probe in train]
    twins = [encode(probe.twin) if probe.twin else None for probe in train]
    end = adapted.base.eos_ids[:1]
    with adapted.using(None):
        [sampled] = adapted.generate([[p for p in prompts for _ in range(tries)]], max_new_tokens, 1.0, seed)
        [to_twins] = adapted.generate([[twin for twin in twins if twin]], OPENING_LENGTH, 1.0, seed + 1)
    openings = iter(to_twins)
    examples: dict[str, list[ConstraintExample]] = {category: [] for category in categories}
    for n, (probe, prompt, twin) in enumerate(zip(train, prompts, twins, strict=True)):
        opening = next(openings).ids if twin else ()
        finished = [answer.ids for answer in sampled[n * tries : (n + 1) * tries] if answer.finished]
        texts = [str(adapted.base.tokenizer.decode(list(ids))) for ids in finished]
        refusals = [ids for ids, text in zip(finished, texts, strict=True) if is_refusal(text)]
        if not refusals:
            continue
        examples[probe.category].append(
            ConstraintExample(
                tuple(Row(prompt, ids + end) for ids in dict.fromkeys(refusals)),
                Row(prompt, opening) if opening else None,
                Row(twin, refusals[0][:OPENING_LENGTH]) if twin else None,
            )
        )
    empty = [category for category in categories if not examples[category]]
    if empty:
        raise ValueError(f"the base refused no train probe of {', '.join(empty)}; it is not safety-aligned")
    by_category = [examples[category] for category in categories]
    return ConstraintData(categories, limits, by_category, *(requirements or RequirementData([], [])))


def constraint_probes(policy: Policy, settings: ConstraintSettings) -> list[Probe]:
    """The train probes of a policy whose refusals are sampled: at most `most_probes` a category, by hash."""
    probes, most = policy.probes("train"), settings.most_probes
    if most is None:
        return probes
    by_category: dict[str, list[Probe]] = {}
    for probe in sorted(probes, key=lambda probe: hashlib.blake2b(probe.prompt.encode()).digest()):
        by_category.setdefault(probe.category, []).append(probe)
    return [probe for members in by_category.values() for probe in members[:most]]


def policy_constraint_data(
    adapted: AdaptedModel, policy: Policy, settings: ConstraintSettings, seed: int, max_new_tokens: int
) -> ConstraintData:
    """The constraint data of a policy's restrictions, and of those requirements that can be taught.

    Raises InputError if the base refuses no train probe of a category.
    """
    limits = {rule.category: rule.limit for rule in policy.restrictions}
    requirements = build_requirement_data(adapted, policy.requirements, seed, max_new_tokens)
    try:
        return build_constraint_data(
            adapted,
            list(limits),
            list(limits.values()),
            constraint_probes(policy, settings),
            lambda text: prompt_ids((Message("user", text),), adapted.base.tokenizer),
            judges.is_refusal,
            settings,
            seed,
            max_new_tokens,
            requirements,
        )
    except ValueError as fault:
        raise InputError([Problem(adapted.base.name, None, "base.model", f"not certifiable: {fault}")]) from fault


_KEYS = {
    "categories": "categories",
    "limits": "limits",
    "anchors": "examples",
    "lessons": "requirements",
    "answers": "answers",
}
"""JSON key of each attribute of the data."""


def constraint_data_to_json(data: ConstraintData) -> str:
    """The data as text, for the other processes of a run and for a resumed one."""
    return json.dumps({key: getattr(data, name) for key, name in _KEYS.items()})


def constraint_data_from_json(text: str) -> ConstraintData:
    """Reads the text of `constraint_data_to_json`. Raises ValueError if it is damaged."""

    def row(stored: Any) -> Row | None:
        return None if stored is None else Row(tuple(stored[0]), tuple(stored[1]))

    def rows(stored: Any) -> tuple[Row, ...]:
        return tuple(Row(tuple(prompt), tuple(completion)) for prompt, completion in stored)

    def example(refusals: Any, compliance: Any, overrefusal: Any) -> ConstraintExample:
        return ConstraintExample(rows(refusals), row(compliance), row(overrefusal))

    try:
        stored = json.loads(text)
        examples = [[example(*parts) for parts in category] for category in stored["anchors"]]
        requirements = [
            RequirementExamples(name, limit, rows(taught), rows(elsewhere), unlikelihood, per_answer)
            for name, limit, taught, elsewhere, unlikelihood, per_answer in stored["lessons"]
        ]
        return ConstraintData(stored["categories"], stored["limits"], examples, requirements, rows(stored["answers"]))
    except (LookupError, TypeError, AssertionError) as fault:
        raise ValueError(f"the constraint data is damaged ({fault})") from fault


def cached_constraint_data(
    adapted: AdaptedModel, folder: Path, inputs: Sequence[object], make: Callable[[], ConstraintData]
) -> ConstraintData:
    """The constraint data that runs over one base share in `folder`; made now if none fits.

    `inputs` is everything that the base's sampled answers depend on, beside the base, its device and this version.
    """
    text = json.dumps([identity_of_values(adapted), __version__, *inputs])
    file = folder / f"bank-{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    try:
        return constraint_data_from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        data = make()
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(file, constraint_data_to_json(data))
    return data
