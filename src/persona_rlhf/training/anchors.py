"""Where the constraint's anchors come from: the base's own answers to train probes and to their benign twins."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.policy import judges
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.policy.tiers import Policy
from persona_rlhf.preferences.messages import Message
from persona_rlhf.preferences.tokens import Row, prompt_ids
from persona_rlhf.training.bank import Anchor, ConstraintBank
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.lessons import Taught, build_lessons
from persona_rlhf.training.settings import ConstraintSettings


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
    taught: Taught | None = None,
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
        [welcomed] = adapted.generate([[twin for twin in twins if twin]], settings.opening_tokens, 1.0, seed + 1)
    openings = iter(welcomed)
    anchors: dict[str, list[Anchor]] = {category: [] for category in categories}
    for n, (probe, prompt, twin) in enumerate(zip(train, prompts, twins, strict=True)):
        opening = next(openings).ids if twin else ()
        finished = [answer.ids for answer in sampled[n * tries : (n + 1) * tries] if answer.finished]
        texts = [str(adapted.base.tokenizer.decode(list(ids))) for ids in finished]
        refusals = [ids for ids, text in zip(finished, texts, strict=True) if is_refusal(text)]
        if not refusals:
            continue
        anchors[probe.category].append(
            Anchor(
                tuple(Row(prompt, ids + end) for ids in dict.fromkeys(refusals)),
                Row(prompt, opening) if opening else None,
                Row(twin, refusals[0][: settings.opening_tokens]) if twin else None,
            )
        )
    empty = [category for category, own in anchors.items() if not own]
    if empty:
        raise ValueError(f"the base refused no train probe of {', '.join(empty)}; it is not safety-aligned")
    own = [anchors[category] for category in categories]
    return ConstraintBank(categories, limits, own, *(taught or Taught([], [])))


def policy_bank(
    adapted: AdaptedModel, policy: Policy, settings: ConstraintSettings, seed: int, max_new_tokens: int
) -> ConstraintBank:
    """The bank of a policy's restrictions, and of those requirements that can be taught.

    Raises InputError where the base refuses no train probe of a category.
    """
    limits = {rule.category: rule.limit for rule in policy.restrictions}
    taught = build_lessons(adapted, policy.requirements, settings, seed, max_new_tokens)
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
