"""Base refusals to train probes -> constraint rows; cached on disk."""

from __future__ import annotations

import hashlib
import json
import os
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
from persona_rlhf.training.constraint import OPENING_LENGTH, ConstraintBank, ConstraintExample, RequirementExamples
from persona_rlhf.training.requirements import RequirementData, build_requirement_data

# ----------------------------------------------------------------------------------------------------
# Where the constraint's anchors come from: the base's own answers to train probes and to their benign twins.
# ----------------------------------------------------------------------------------------------------


def build_bank(
    adapted: AdaptedModel,
    categories: Sequence[str],
    limits: Sequence[float],
    probes: Sequence[Probe],
    encode: Callable[[str], tuple[int, ...]],
    is_refusal: Callable[[str], bool],
    settings: ConstraintSettings,
    seed: int,
    max_new_tokens: int,
    taught: RequirementData | None = None,
) -> ConstraintBank:
    """Samples the base's own refusals to the train probes at temperature 1, and keeps those the judge calls refusals.

    `encode` turns a prompt into token ids (chat template and all). A probe that the base never refused in
    `refusals_per_probe` tries is left out: the constraint asks a user for nothing that the base does not do. Raises
    ValueError where a category is left without a probe.
    """
    train = [probe for probe in probes if probe.split == "train" and probe.category in categories]
    tries = settings.refusals_per_probe
    prompts = [encode(probe.prompt) for probe in train]
    twins = [encode(probe.twin) if probe.twin else None for probe in train]
    end = adapted.base.eos_ids[:1]
    with adapted.using(None):
        [sampled] = adapted.generate([[p for p in prompts for _ in range(tries)]], max_new_tokens, 1.0, seed)
        [welcomed] = adapted.generate([[twin for twin in twins if twin]], OPENING_LENGTH, 1.0, seed + 1)
    openings = iter(welcomed)
    anchors: dict[str, list[ConstraintExample]] = {category: [] for category in categories}
    for n, (probe, prompt, twin) in enumerate(zip(train, prompts, twins, strict=True)):
        opening = next(openings).ids if twin else ()
        finished = [answer.ids for answer in sampled[n * tries : (n + 1) * tries] if answer.finished]
        texts = [str(adapted.base.tokenizer.decode(list(ids))) for ids in finished]
        refusals = [ids for ids, text in zip(finished, texts, strict=True) if is_refusal(text)]
        if not refusals:
            continue
        anchors[probe.category].append(
            ConstraintExample(
                tuple(Row(prompt, ids + end) for ids in dict.fromkeys(refusals)),
                Row(prompt, opening) if opening else None,
                Row(twin, refusals[0][:OPENING_LENGTH]) if twin else None,
            )
        )
    empty = [category for category, own in anchors.items() if not own]
    if empty:
        raise ValueError(f"the base refused no train probe of {', '.join(empty)}; it is not safety-aligned")
    own = [anchors[category] for category in categories]
    return ConstraintBank(categories, limits, own, *(taught or RequirementData([], [])))


def policy_bank(
    adapted: AdaptedModel, policy: Policy, settings: ConstraintSettings, seed: int, max_new_tokens: int
) -> ConstraintBank:
    """The bank of a policy's restrictions, and of those requirements that can be taught.

    Raises InputError where the base refuses no train probe of a category.
    """
    limits = {rule.category: rule.limit for rule in policy.restrictions}
    taught = build_requirement_data(adapted, policy.requirements, settings, seed, max_new_tokens)
    try:
        return build_bank(
            adapted,
            list(limits),
            list(limits.values()),
            policy.probes("train"),
            lambda text: prompt_ids((Message("user", text),), adapted.base.tokenizer),
            judges.is_refusal,
            settings,
            seed,
            max_new_tokens,
            taught,
        )
    except ValueError as fault:
        raise InputError([Problem(adapted.base.name, None, "base.model", f"not certifiable: {fault}")]) from fault


# ----------------------------------------------------------------------------------------------------
# The constraint bank on disk: for the other processes of a run, for a resumed one, and for later runs over a base.
# ----------------------------------------------------------------------------------------------------

_PARTS = ("categories", "limits", "anchors", "lessons", "answers")


def bank_to_json(bank: ConstraintBank) -> str:
    """The bank as text, for other processes of a run and for a resumed one."""
    return json.dumps({part: getattr(bank, part) for part in _PARTS})


def bank_from_json(text: str) -> ConstraintBank:
    """What `bank_to_json` wrote. Raises ValueError where the text is damaged."""

    def row(stored: Any) -> Row | None:
        return None if stored is None else Row(tuple(stored[0]), tuple(stored[1]))

    def rows(stored: Any) -> tuple[Row, ...]:
        return tuple(Row(tuple(prompt), tuple(completion)) for prompt, completion in stored)

    def anchor(refusals: Any, compliance: Any, overrefusal: Any) -> ConstraintExample:
        return ConstraintExample(rows(refusals), row(compliance), row(overrefusal))

    try:
        stored = json.loads(text)
        anchors = [[anchor(*parts) for parts in category] for category in stored["anchors"]]
        lessons = [
            RequirementExamples(name, limit, rows(turns), rows(elsewhere), wrong, each)
            for name, limit, turns, elsewhere, wrong, each in stored["lessons"]
        ]
        return ConstraintBank(stored["categories"], stored["limits"], anchors, lessons, rows(stored["answers"]))
    except (LookupError, TypeError, AssertionError) as fault:
        raise ValueError(f"this is no constraint bank ({fault})") from fault


def kept_bank(
    adapted: AdaptedModel, folder: Path, asked: Sequence[object], make: Callable[[], ConstraintBank]
) -> ConstraintBank:
    """The bank that runs over one base keep for each other in `folder`; made now where none fits.

    `asked` is everything that the base's sampled answers depend on, beside the base, its device and this version.
    """
    said = json.dumps([identity_of_values(adapted), __version__, *asked])
    file = folder / f"bank-{hashlib.sha256(said.encode()).hexdigest()[:32]}.json"
    try:
        return bank_from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        bank = make()
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(file, bank_to_json(bank), writer=str(os.getpid()))
    return bank
