"""The likeness of adapters to their base against plain generation and scoring, and by the evaluator's verdicts."""

from math import exp

import pytest
import torch

from persona_rlhf.config.evaluation import EvaluationSettings, GateSettings, StillBaseSettings
from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import prompt_ids
from persona_rlhf.evaluation.evaluator import Evaluator
from persona_rlhf.evaluation.likeness import BaseLikeness
from persona_rlhf.evaluation.metrics import FactQuestions, margin, score_pairs, score_pairs_of_base
from persona_rlhf.evaluation.prompt_sets import Fact
from persona_rlhf.evaluation.refusals import BaseAnswers, answer_row, refusal_outcomes
from persona_rlhf.evaluation.still_base import LimitedMeasure, StillBase
from tests.evaluation.test_evaluator import judge, policy, users  # noqa: F401

TEXTS = ["hello.", "how are you?", "a b c", "why not!", "tell me", "zzz"]
FACTS = [Fact(f"what is {name}", f"{name} is red", (f"{name} is big",)) for name in "abcdef"]


@pytest.fixture
def base(ending_base):
    return ending_base


@pytest.fixture
def likeness(adapted):
    prompts = [prompt_ids((Message("user", text),), adapted.base.tokenizer) for text in TEXTS]
    answers = BaseAnswers(adapted, lambda _: False, 8, harmless=True)
    return BaseLikeness(adapted, prompts, answers, FactQuestions(adapted, FACTS))


def test_measures_are_those_of_plain_generation(adapted, adapters, likeness):
    alphas = torch.tensor([1.0, 1.0, 0.5, 1.0, 1.0])
    rows = users(adapted.base.tokenizer, 5)
    measured = likeness.still_base(StillBaseSettings(), adapters, alphas, rows)
    base_scores = score_pairs_of_base(adapted, [user.heldout for user in rows])
    for user, got in enumerate(measured):
        flat, alpha = adapters[[user]], alphas[[user]]
        with adapted.using(flat, alpha):
            [written] = adapted.generate([likeness.prompts], 8)
            [scores] = score_pairs(adapted, [rows[user].heldout])
            [facts] = likeness.facts.ask(1)
        answered = [answer_row(adapted, *one) for one in zip(likeness.prompts, written, strict=True)]
        with adapted.using(None):
            logps = [adapted.score([[row]])[0][0].logp for row in answered]
        tokens = sum(len(row.completion) for row in answered)
        assert got.perplexity.adapted == pytest.approx(exp(-sum(logps) / tokens), rel=2e-5)
        assert got.length.adapted == pytest.approx(tokens / 6)
        assert got.empty.adapted == sum(not answer.ids for answer in written)
        assert (got.facts.adapted, got.facts.base) == (facts.kept, facts.base_right)
        margins = [margin(*pair) for pair in zip(base_scores[user], scores, strict=True)]
        assert got.pairs is None or got.pairs.better == sum(m > 1e-4 for m in margins)
    unchanged = measured[0]
    assert unchanged.perplexity.adapted == unchanged.perplexity.base
    assert unchanged.length.adapted == unchanged.length.base
    assert unchanged.pairs is None  # every pair is a tie
    assert max(got.perplexity.adapted for got in measured) > 1.05 * unchanged.perplexity.base


def test_an_adapter_is_asked_once_at_each_alpha(adapted, adapters, likeness, monkeypatch):
    ones = torch.ones(5)
    first = likeness.behaviour(adapters, ones)
    asked = []

    def counted(adapted, flat, *others):
        asked.append(len(flat))
        return refusal_outcomes(adapted, flat, *others)

    monkeypatch.setattr("persona_rlhf.evaluation.likeness.refusal_outcomes", counted)
    assert likeness.behaviour(adapters[[3, 1]], ones[:2]) == [first[3], first[1]]
    assert asked == []
    likeness.behaviour(adapters[[3, 1]], torch.tensor([0.5, 1.0]))
    assert asked == [1]
    likeness.forget()
    again = likeness.behaviour(adapters[:2], ones[:2])
    assert [one.texts for one in again] == [one.texts for one in first[:2]]
    assert asked == [1, 2]


def test_a_user_whose_text_is_ruined_is_held_back_and_a_good_one_is_not(adapted, adapters, policy):
    """The gate asks for few refusals here: without limits on the text it releases both at full strength."""

    def verdicts(limits):
        gate = GateSettings(judge_calibration=None, max_new_tokens=8, still_base=limits)
        asked = EvaluationSettings(harmless_prompts=6)
        refusal = lambda _: True  # noqa: E731
        examination = Evaluator(adapted, policy(), refusal, gate, asked, users=5, ordinary=TEXTS, facts=FACTS)
        flat = torch.stack([adapters[0], adapters[4]])
        return examination.verdicts(flat, [examination.demands] * 2)

    assert [verdict.alpha for verdict in verdicts(None)] == [1.0, 1.0]
    good, ruined = verdicts(StillBaseSettings(max_perplexity=1.2))
    assert (good.alpha, good.admitted, good.still_base.passes) == (1.0, True, True)
    assert ruined.alpha < 1
    assert "no longer the base: " in ruined.reason
    assert not ruined.looks[0].passed
    assert ruined.looks[0].pooled.n == 0


def test_recorded_measures_decide_in_place_of_new_ones(adapted, adapters, policy):
    """The adapter's own text would pass at once. One of no record has no limits."""
    gate = GateSettings(judge_calibration=None, max_new_tokens=8)
    evaluator = Evaluator(adapted, policy(), lambda _: True, gate, EvaluationSettings(), users=2)
    ruined, whole = (StillBase(LimitedMeasure(40, value, 1.5, None, 2.25)) for value in (3.0, 1.6))
    recorded = {1.0: ruined, 0.25: whole, 0.5: whole, 0.75: ruined}
    verdict, free = evaluator.verdicts(adapters[[0, 0]], [evaluator.demands] * 2, recorded=[recorded, {}])
    assert (verdict.alpha, free.alpha) == (0.5, 1.0)
    assert [(test.alpha, test.passed, test.still_base) for test in verdict.looks] == [
        (alpha, like == whole, like) for alpha, like in recorded.items()
    ]


def test_worse_than_the_base_by_held_out_pairs_is_held_back(adapted, adapters, policy):
    """The same adapter for two users: the choices of one follow it, and those of the other are the opposite."""

    def swapped(pair):
        return pair._replace(chosen=pair.rejected, rejected=pair.chosen)

    [row] = users(adapted.base.tokenizer, 1)
    gate = GateSettings(judge_calibration=None, max_new_tokens=8, alphas=[1.0])
    examination = Evaluator(adapted, policy(), judge, gate, EvaluationSettings(), users=2)
    flat = adapters[[1, 1]]
    with adapted.using(flat[:1]):
        [scores] = score_pairs(adapted, [row.heldout])
    [base_scores] = score_pairs_of_base(adapted, [row.heldout])
    margins = [margin(*pair) for pair in zip(base_scores, scores, strict=True)]
    liked = [pair if raised > 0 else swapped(pair) for pair, raised in zip(row.heldout, margins, strict=True)]
    rows = [row._replace(heldout=liked), row._replace(user_id="v", heldout=list(map(swapped, liked)))]
    follows, opposes = examination.verdicts(flat, [examination.demands] * 2, rows=rows)
    assert follows.admitted
    assert not opposes.admitted
    assert "held-out pairs of 0 of 6 prompts ranked better than by the base" in opposes.reason
