"""The evaluation of a fleet: the base answers once, then every cohort of users is gated and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.evaluation import EvaluationSettings, GateSettings
from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import UserRows, prompt_ids
from persona_rlhf.evaluation.certify_exam import CertifyExam, ProbeSplit, entries_at
from persona_rlhf.evaluation.classifier import SecondJudge
from persona_rlhf.evaluation.gate import (
    Demands,
    Likeness,
    SideEffects,
    Verdict,
    certify_cohort,
    check_base,
    demands_of,
    release_unjudged,
)
from persona_rlhf.evaluation.likeness import BaseLikeness
from persona_rlhf.evaluation.metrics import (
    REQUIREMENT_PROMPTS,
    FactQuestions,
    RequirementPrompts,
    Samples,
    clean_accuracy,
    distinct_prompts,
    heldout_accuracy,
    win_rate,
)
from persona_rlhf.evaluation.prompt_sets import Fact, harmless_sample, some, total, twins
from persona_rlhf.evaluation.records import Conditions, Facts, Measures, Refused, SplitRefusals
from persona_rlhf.evaluation.refusals import (
    OPENING_TOKENS,
    BaseAnswers,
    Judge,
    PromptIds,
    answer_text,
    refusal_outcomes,
)
from persona_rlhf.evaluation.sample_size import HARMLESS_PROMPTS, check_side_effects
from persona_rlhf.evaluation.sequential import certify_sequentially, check_pool, check_units
from persona_rlhf.evaluation.spending import next_share
from persona_rlhf.evaluation.statistics import Count
from persona_rlhf.evaluation.still_base import StillBase, without_limit
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import Base, conditions_of
from persona_rlhf.policy.clusters import Outcomes, Unit
from persona_rlhf.policy.composition import Composition
from persona_rlhf.policy.hazards import Probe, Split, unseen_topics_certify
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.policy.policy import Policy
from persona_rlhf.policy.private_banks import unit_name


class Evaluator:
    """Gates and measures cohorts; the base's answers to probes and harmless prompts are written once and kept.

    `users` is the number of users of the whole run, for the family-wise guarantee. `utilities` are the simulated
    preferences of those users who have one, `ordinary` the texts of ordinary prompts, `facts` questions of knowledge. A
    `second` judge must agree that an answer refuses. One in `every` of the gate's harmless prompts is kept: for
    estimates of time, where the policy's probes are a sample as well.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        policy: Policy,
        judge: Judge,
        gate: GateSettings,
        evaluation: EvaluationSettings,
        *,
        users: int,
        ordinary: Sequence[str] = (),
        facts: Sequence[Fact] = (),
        utilities: Mapping[str, Callable[[str], float]] | None = None,
        second: SecondJudge | None = None,
        seed: int = 0,
        every: int = 1,
    ) -> None:
        self.demands = demands_of(policy, gate, users)
        self.first_look = self.demands.at_look(next_share([]))
        self.gate, self.evaluation, self.utilities = gate, evaluation, utilities or {}
        self.adapted = self._adapted = adapted
        self._policy, self._seed, self._judge = policy, seed, judge
        self._prompt_texts: dict[PromptIds, str] = {}
        self._answers = BaseAnswers(adapted, judge, gate.max_new_tokens, second, self._prompt_texts)
        self._samples = Samples(adapted, gate.max_new_tokens, seed)
        self._facts = FactQuestions(adapted, facts, policy.fixes("facts"))
        near = twins([*policy.probes("dev"), *policy.probes("certify")])
        self._ordinary, self._twins = (
            [self._ids(text) for text in some(texts, evaluation.harmless_prompts)] for texts in (ordinary, near)
        )
        needed = HARMLESS_PROMPTS
        if (most := self.demands.max_over_refusal) is not None:
            needed = max(needed, 3 * self.first_look.plain_bound.fewest_trials(1 - most))
        splits: tuple[Split, ...] = ("train", "dev", "certify", "test")
        probes = [probe for split in splits for probe in policy.probes(split)]
        self._gated_harmless = [self._ids(text) for text in harmless_sample(probes, ordinary, needed // every)]
        opening = min(OPENING_TOKENS, gate.max_new_tokens)
        self._openings = BaseAnswers(adapted, is_refusal, opening, harmless=True)
        self._to_harmless = BaseAnswers(adapted, is_refusal, gate.max_new_tokens, harmless=True, opening=opening)
        self.base_answers = (self._answers, self._openings, self._to_harmless)
        self.likeness = BaseLikeness(adapted, self._ordinary, self._to_harmless, self._facts)
        self._required = RequirementPrompts(policy.requirements, REQUIREMENT_PROMPTS, policy.certify.delta)
        self._required_prompts = [self._ids(text) for text in self._required.prompts]
        self.composition, self._second = Composition(policy, seed), second
        self._certify = self._behind(self._system, self._split(policy.probes("certify")))
        test, shifts = policy.probes("test"), not unseen_topics_certify(policy.probes("certify"))
        seen, unseen = ([p for p in test if (shifts and p.novelty == "topic") == new] for new in (False, True))
        self._test = self._split(seen, evaluation.test_probes)
        self._shift = self._split(unseen, evaluation.test_probes // 2)

    @property
    def base(self) -> Base:
        """The base in the type that the gate judges it in."""
        return self._adapted.base

    @property
    def conditions(self) -> Conditions:
        """The computation of the answers that the gate judges."""
        gate, products = self.gate, self._adapted.products
        return Conditions(*conditions_of(self.base), gate.max_new_tokens, gate.samples, products)

    @property
    def probes(self) -> list[PromptIds]:
        """Every probe that users are gated and measured on."""
        return [*self._certify.prompts, *self._test.prompts, *self._shift.prompts]

    @property
    def harmless(self) -> list[PromptIds]:
        """Every harmless prompt that over-refusal is measured on."""
        return [*self._ordinary, *self._twins]

    @property
    def without_limit(self) -> list[str]:
        """Sentences on limits of `gate.still_base` that nothing is measured for."""
        limits = self.gate.still_base if self.gate.enabled else None
        return without_limit(limits, len(self._ordinary), len(self._facts))

    def forget_users(self) -> None:
        """Drops the base's answers to users' own prompts, so that memory stays bounded; called between chunks."""
        self._samples.forget()
        self.likeness.forget()

    def check_pool(self) -> None:
        """Raises InputError where `gate.sequential` cannot draw from the certify probes, whatever the base answers."""
        if self.gate.sequential:
            check_pool(self.first_look, list(self.pool.values()), self._policy.draws_from_pool)

    def check_base(self) -> None:
        """Raises InputError where the base itself does not pass the gate: nothing could be certified then."""
        check_side_effects(self.first_look, len(self._gated_harmless), self._facts.of_base())
        if self.gate.sequential:
            check_units(self.first_look, self._exam.base_outcomes, self._policy.draws_from_pool)
        else:
            check_base(self.first_look, self._exam.base_outcomes)

    def base_counts(self, demands: Demands) -> tuple[Count, dict[str, Count]]:
        """The base's own refusals of certify units, pooled and by category: those of a user who gets no adapter."""
        return demands.count_units(self._exam.base_outcomes, self._exam.base_outcomes)[:2]

    def base_refuses(self, prompts: Sequence[PromptIds]) -> list[bool]:
        """Whether the opening of the base's greedy answer refuses, for each prompt (token ids).

        For screening, which asks this of every pair's prompt. An opening is cut on purpose, and nothing is released by
        it, so the gate's first judge reads it as it stands. The gate judges whole answers.
        """
        with self._adapted.using(None):
            [openings] = self._adapted.generate([prompts], min(OPENING_TOKENS, self.gate.max_new_tokens))
        return [self._judge(answer_text(self._adapted, opening)) for opening in openings]

    def verdicts(
        self,
        flat: Float[Tensor, "users params"],
        demands: Sequence[Demands],
        draws: Sequence[Sequence[str]] = (),
        rows: Sequence[UserRows] = (),
        recorded: Sequence[Mapping[float, StillBase]] = (),
        users: Sequence[str] = (),
    ) -> list[Verdict]:
        """The gate's verdict on every user of a cohort, all tests in lockstep over the `certify` probes.

        `demands`: one per user, since users are at different looks (`Demands.at_look`). `draws`: the names of the units
        that each user's look draws, in their order (`gate.sequential`). `rows`: those of each user, whose held-out
        pairs may hold the adapter back; none are tested without. `recorded`: in place of measures, those of each user's
        release by alpha. `users`: their ids, by which the policy's system prompt may differ (`certify.with`); without
        them it is that of everybody. Raises InputError where the base itself does not pass a first look.
        """
        if self.gate.enabled:
            self.check_base()
        groups: dict[str, list[int]] = {}
        for place in range(len(demands)):
            system = self.composition.system_prompt(users[place]) if users else self._system
            groups.setdefault(system, []).append(place)
        verdicts: dict[int, Verdict] = {}
        for system, places in groups.items():
            exam = self._exam if system == self._system else self._exam_behind(system)
            of_group = self._verdicts(
                exam,
                flat[places],
                entries_at(demands, places),
                entries_at(draws, places),
                entries_at(rows, places),
                entries_at(recorded, places),
            )
            verdicts |= zip(places, of_group, strict=True)
        return [verdicts[place] for place in range(len(demands))]

    def _verdicts(
        self,
        exam: CertifyExam,
        flat: Float[Tensor, "users params"],
        demands: Sequence[Demands],
        draws: Sequence[Sequence[str]],
        rows: Sequence[UserRows],
        recorded: Sequence[Mapping[float, StillBase]],
    ) -> list[Verdict]:
        """The verdicts on users who share an exam."""
        base = exam.base_outcomes
        tested: dict[tuple[int, float], Outcomes] = {}

        def test(users: list[int], alphas: list[float]) -> list[Outcomes]:
            outcomes = exam.outcomes(flat[users], torch.tensor(alphas, device=flat.device))
            tested.update(zip(zip(users, alphas, strict=True), outcomes, strict=True))
            return outcomes

        def likeness(users: list[int], alphas: list[float]) -> list[StillBase]:
            if recorded:
                return [recorded[user].get(alpha, StillBase()) for user, alpha in zip(users, alphas, strict=True)]
            return self._still_base(flat[users], alphas, [rows[user] for user in users] if rows else [])

        def measured(users: list[int], alphas: list[float]) -> list[SideEffects]:
            return self.side_effects(flat[users], torch.tensor(alphas, device=flat.device))

        users, largest = list(range(flat.shape[0])), self.gate.alphas[-1]
        if self.gate.enabled and self.gate.sequential:
            drawn = [[self.pool[name] for name in names] for names in draws]
            return [self._sequential(exam, flat[[user]], demands[user], drawn[user], user, likeness) for user in users]
        if self.gate.enabled:
            verdicts = certify_cohort(demands, base, self.gate.alphas, test, measured, likeness)
        else:
            tests = test(users, [largest] * len(users))
            verdicts = [release_unjudged(demands[user], base, largest, outcomes) for user, outcomes in enumerate(tests)]
        released = [tested.get((user, verdict.alpha), base) for user, verdict in enumerate(verdicts)]
        pool = [name for name in self.demands.categories if name in self.demands.in_pool]
        return [
            verdict._replace(clusters=exam.split.clustered(outcomes, pool, self.demands.level))
            for verdict, outcomes in zip(verdicts, released, strict=True)
        ]

    @cached_property
    def pool(self) -> dict[str, Unit]:
        """The units of the `certify` probes by name, from which looks draw (`gate.sequential`)."""
        certify = self._certify
        units = self.demands.clusters.units_of({name: [True] * len(of) for name, of in certify.places.items()})
        return {unit_name(certify.probes[certify.places[unit.category][unit.places[0]]]): unit for unit in units}

    def _still_base(
        self, flat: Float[Tensor, "users params"], alphas: Sequence[float], rows: Sequence[UserRows]
    ) -> list[StillBase]:
        """Whether each adapter still is the base at its alpha; nothing is measured where the config sets no limit."""
        if self.gate.still_base is None:
            return [StillBase()] * len(alphas)
        return self.likeness.still_base(self.gate.still_base, flat, torch.tensor(alphas, device=flat.device), rows)

    def _sequential(
        self,
        exam: CertifyExam,
        flat: Float[Tensor, "one params"],
        demands: Demands,
        drawn: Sequence[Unit],
        user: int,
        likeness: Likeness,
    ) -> Verdict:
        """The sequential gate's verdict on one `user` of a cohort: probes are asked as they are drawn."""

        def refused(alpha: float, units: Sequence[Unit]) -> list[bool]:
            return exam.refused_units(flat, torch.tensor([alpha], device=flat.device), units)

        def measured(alpha: float) -> SideEffects:
            return self.side_effects(flat, torch.tensor([alpha], device=flat.device))[0]

        like = lambda alpha: likeness([user], [alpha])[0]  # noqa: E731
        return certify_sequentially(demands, exam.base_outcomes, self.gate.alphas, drawn, refused, measured, like)

    @cached_property
    def _system(self) -> str:
        """The system prompt before the probes of users without wishes."""
        return self.composition.system_prompt("")

    @cached_property
    def _exam(self) -> CertifyExam:
        """The exam of users without wishes, whose base answers are kept."""
        return CertifyExam(self._adapted, self._certify, self._answers, self.gate.samples, self._seed)

    def _exam_behind(self, system: str) -> CertifyExam:
        """The exam behind the system prompt of a user with wishes, with base answers of its own."""
        try:
            split = self._behind(system, self._certify)
        except InputError as fault:  # it costs this user, and not the run
            raise ValueError(str(fault)) from fault
        of_base = self._judge, self.gate.max_new_tokens, self._second, self._prompt_texts
        answers = BaseAnswers(self._adapted, *of_base)
        return CertifyExam(self._adapted, split, answers, self.gate.samples, self._seed)

    def _behind(self, system: str, split: ProbeSplit) -> ProbeSplit:
        """The probes behind a system prompt and the memories of each (`certify.with`)."""
        split = split.behind(system, self.composition, self._adapted.base)
        self._prompt_texts |= {ids: probe.prompt for ids, probe in zip(split.prompts, split.probes, strict=True)}
        return split

    def side_effects(self, flat: Float[Tensor, "users params"], alphas: Float[Tensor, " users"]) -> list[SideEffects]:
        """The effects of adapters beside refusals of probes, as far as the policy demands something of them.

        Harmless prompts are judged by the opening of the answer: a refusal shows there, and the whole answer costs five
        times as much. A refusal that turns into an answer later still counts as one, which is the safe side. An answer
        that turns into a refusal after its opening is missed. The string rules judge alone: the shipped model has
        learnt whole answers, and called up to 39 of 300 openings of honest users newly refused.
        """
        newly: list[list[bool]] = [[] for _ in range(len(alphas))]
        facts: list[Facts | None] = [None] * len(alphas)
        if self.demands.max_over_refusal is not None:
            prompts = self._gated_harmless
            base = self._openings.refused(prompts)
            refusals = refusal_outcomes(self._adapted, flat, alphas, prompts, self._openings)
            newly = [
                [refused and not before for refused, before in zip(user, base, strict=True)]
                for user in refusals.refused
            ]
        if self.demands.max_changed is not None:
            with self._adapted.using(flat, alphas):
                facts = self._facts.ask(len(alphas))
        return [SideEffects(*effects) for effects in zip(newly, facts, strict=True)]

    def measures(
        self, flat: Float[Tensor, "users params"], users: Sequence[UserRows], alphas: Sequence[float]
    ) -> list[Measures]:
        """All figures reported beside the verdict, of the adapters as released; the `test` split decides nothing."""
        scales = torch.tensor(list(alphas), device=flat.device)
        pairs = [user.heldout for user in users]
        base_scores, scores = self.likeness.base_scores(users), self.likeness.scores(flat, scales, users)
        ordinary = self.likeness.behaviour(flat, scales)
        texts = self._samples.compare(
            flat, scales, [distinct_prompts(p, self.evaluation.win_rate_prompts) for p in pairs]
        )
        near = refusal_outcomes(self._adapted, flat, scales, self._twins, self._to_harmless)
        base_near = [answer.text for answer in self._to_harmless.of(self._twins)]
        tests, shifted = (
            refusal_outcomes(self._adapted, flat, scales, split.prompts, self._answers)
            for split in (self._test, self._shift)
        )
        required = self._samples.compare(flat, scales, [self._required_prompts] * len(users), perplexity=False)
        unseen = self._shift.prompts
        base_test = self._test.by_category(self._answers.refused(self._test.prompts))
        measured = []
        for n, user in enumerate(users):
            utility, sampled, written = self.utilities.get(user.user_id), texts[n], required[n]
            score, facts = scores[n], ordinary[n].facts
            if alphas[n] == 0:  # the user gets the base, to the bit, whatever the rounding of another pass
                score, sampled, written = base_scores[n], sampled.as_base(), written.as_base()
                facts = self._facts.of_base()
            test = None
            if self._test.prompts:
                counts = self.demands.count(base_test, self._test.by_category(tests.refused[n]))
                sums = sum(shifted.refused[n]), sum(self._answers.refused(unseen))
                test = SplitRefusals(*counts, Refused(len(unseen), *sums) if unseen else None)
            harmless = [
                _newly_refused(refused, prompts, self._to_harmless)
                for refused, prompts in ((ordinary[n].refused, self._ordinary), (near.refused[n], self._twins))
            ]
            measured.append(
                Measures(
                    heldout_accuracy=heldout_accuracy(base_scores[n], score),
                    heldout_clean=clean_accuracy(pairs[n], base_scores[n], score),
                    win_rate=None if utility is None else win_rate(utility, sampled.adapted, sampled.base),
                    over_refusal=total(*harmless),
                    ordinary=harmless[0],
                    twins=harmless[1],
                    test=test,
                    answer_perplexity=sampled.perplexity,
                    unchanged=tests.unchanged[n] if self._test.prompts else None,
                    tax=self.likeness.tax(ordinary[n]._replace(facts=facts), near.texts[n], base_near, sampled),
                    requirements=self._required.count(written.adapted, written.base),
                )
            )
        return measured

    def _split(self, probes: Sequence[Probe], most: int | None = None) -> ProbeSplit:
        """The probes as prompts; of more than `most`, equally many a category, in the order of their hashes."""
        chosen: list[Probe] = []
        places: dict[str, list[int]] = {}
        for category in self.demands.categories:
            members = [probe for probe in probes if probe.category == category]
            if most is not None:
                by_text = {probe.prompt: probe for probe in members}
                members = [by_text[text] for text in some(by_text, most // len(self.demands.categories))]
            places[category] = list(range(len(chosen), len(chosen) + len(members)))
            chosen += members
        return ProbeSplit(chosen, [self._ids(probe.prompt) for probe in chosen], places)

    def _ids(self, text: str) -> PromptIds:
        ids = prompt_ids((Message("user", text),), self._adapted.base.tokenizer)
        self._prompt_texts[ids] = text
        return ids


def _newly_refused(refused: Sequence[bool], prompts: Sequence[PromptIds], base: BaseAnswers) -> Refused | None:
    """One user's count of the prompts that the adapter or its base refuses; what the base does not is newly refused."""
    before = base.refused(prompts)
    either = [new or old for new, old in zip(refused, before, strict=True)]
    return Refused(len(prompts), sum(either), sum(before)) if prompts else None
