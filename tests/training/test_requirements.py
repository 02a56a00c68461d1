"""Requirement examples: differences by hand, the effect of made-up examples on training, and a check of no others."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.config.training import ConstraintSettings, DpoSettings, FleetSettings, LoraSettings
from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.policy.properties import satisfied
from persona_rlhf.policy.rule_schema import When
from persona_rlhf.policy.rules import Requirement
from persona_rlhf.training.api import train_warm_start
from persona_rlhf.training.cache import Reference
from persona_rlhf.training.constraint import (
    ConstraintData,
    ConstraintSampler,
    LagrangianConstraint,
    RequirementExamples,
)
from persona_rlhf.training.engine import Engine
from persona_rlhf.training.requirements import build_requirement_data, differences, forbidden_tokens, likely_places
from tests.models.tiny import EOS, constraint_bank, tiny_base, user_rows

TEMPLATE = "{% for m in messages %}w2 {{ m.content }} {% if m.role == 'assistant' %}<end> {% endif %}{% endfor %}"
PROMPT = (2, 9)


def turns(broken, whole):
    return [(row.prompt[2:], row.completion) for row in differences(Row(PROMPT, broken), Row(PROMPT, whole))]


def test_turns_by_hand():
    # another token in one place; a notice at the start; an end before the rest; a word left out
    assert turns((3, 4, 5, EOS), (3, 7, 5, EOS)) == [((3,), (7,))]
    assert turns((3, 4, EOS), (8, 9, 3, 4, EOS)) == [((), (8, 9))]
    assert turns((3, 4, 5, 6, EOS), (3, 4, EOS)) == [((3, 4), (EOS,))]
    assert turns((3, 7, 4, EOS), (3, 4, EOS)) == [((3,), (4,))]
    assert turns((3, 7, 4, 7, 5, EOS), (3, 8, 4, 8, 5, EOS)) == [((3,), (8,)), ((3, 8, 4), (8,))]
    assert turns((3, EOS), (3, EOS)) == []


def test_wrong_turns_by_hand():
    def wrong(broken, whole):
        return [(row.prompt[2:], row.completion) for row in differences(Row(PROMPT, broken), Row(PROMPT, whole), True)]

    assert wrong((3, 4, 5, EOS), (3, 7, 5, EOS)) == [((3,), (4,))]
    assert wrong((3, 7, 4, EOS), (3, 4, EOS)) == [((3,), (7,))]
    assert wrong((3, 7, 4, 7, 5, EOS), (3, 8, 4, 8, 5, EOS)) == [((3,), (7,)), ((3, 8, 4), (7,))]
    assert wrong((3, 4, EOS), (8, 9, 3, 4, EOS)) == []  # nothing stands where something is missing


@given(st.lists(st.integers(3, 6), max_size=8), st.lists(st.integers(3, 6), max_size=8))
def test_every_turn_is_a_piece_of_the_repaired_answer(broken, whole):
    for row in differences(Row(PROMPT, (*broken, EOS)), Row(PROMPT, (*whole, EOS))):
        said = row.prompt[2:] + row.completion
        assert row.prompt[:2] == PROMPT
        assert row.completion
        assert (*whole, EOS)[: len(said)] == said


def probe(prompt, split="train"):
    return Probe(prompt, "r", prompt, prompt, prompt, None, split, "combination")


def rule(name, prop, value, when=None):
    asked = [*(probe(f"w{n}") for n in range(20, 60)), probe("w61", "test")]
    return Requirement(name, prop, value, 2, "two.yaml", 1, "App", when=when, probes=tuple(asked))


def adapted():
    base = tiny_base(vocabulary=64)
    base.tokenizer.chat_template = TEMPLATE
    return AdaptedModel(base, LoraSettings(rank=4))


def test_lessons_are_where_the_bases_own_answers_break_the_rule():
    model = adapted()
    tokenizer = model.base.tokenizer
    short = rule("short", "max_words", 6)
    notice = rule("notice", "must_include", "w5 w6", When(pattern="w2[0-9]$"))
    found = build_requirement_data(model, [short, notice, rule("told", "judge", "it is kind")], 0, 24)
    by_name = {own.requirement: own for own in found.examples}
    assert set(by_name) == {"short", "notice"}
    for row in by_name["short"].rows:  # the answer ends there; what stands before is short, and has its notice
        said = tokenizer.decode(list(row.prompt[3:]))
        assert row.completion in ((EOS,), (0,))  # these answers have no sentence: `w9.` is no word of the tokenizer
        assert satisfied(short, "p", said)
        assert satisfied(notice, tokenizer.decode([row.prompt[1]]), said) is not False
    assert {row.completion for row in by_name["notice"].rows} == {(2, 5, 6)}  # the template opens a turn with w2
    assert all(row.prompt[1] in range(20, 30) and len(row.prompt) == 2 for row in by_name["notice"].rows)
    assert by_name["notice"].elsewhere
    assert all(row.prompt[1] not in range(20, 30) for row in by_name["notice"].elsewhere)
    assert len(found.answers) > 30
    for row in found.answers:
        prompt, answer = tokenizer.decode([row.prompt[1]]), tokenizer.decode(list(row.completion[1:-1]))
        assert satisfied(short, prompt, answer)
        assert satisfied(notice, prompt, answer) is not False
    rows = [row for own in found.examples for row in (*own.rows, *own.elsewhere)] + found.answers
    assert 61 not in {row.prompt[1] for row in rows}  # a test prompt
    assert build_requirement_data(model, [short, notice], 0, 24) == found
    assert build_requirement_data(model, [rule("told", "judge", "it is kind")], 0, 24) == ([], [])


def test_a_mark_that_must_not_appear_is_looked_for_wherever_the_base_might_say_it():
    """The oracle: every place of an answer by itself, with the probability of each token."""
    model = adapted()
    barred = rule("calm", "must_not_include", "W7")
    assert forbidden_tokens(model, barred) == [7]
    assert forbidden_tokens(model, rule("r", "must_not_include", "w7 w8")) == []  # two tokens: no one of them is wrong
    assert forbidden_tokens(model, rule("r", "must_include", "w7")) == []
    tokens, rows = (
        [30, 31],
        [Row((2, 9), (3, 4, 5, 40, 41, 42, EOS)), Row((2, 9), (6, 8, 50, EOS)), Row((2, 11, 12), (20, 21, EOS))],
    )
    found = likely_places(model, rows, tokens)
    expected = []
    for row in rows:
        own = []
        for n in range(len(row.completion)):
            prompt = row.prompt + row.completion[:n]
            with torch.no_grad():
                odds = model.base.model(torch.tensor([prompt])).logits[0, -1].softmax(-1)[tokens]
            if odds.sum() >= 0.01:
                own.append(Row(prompt, (tokens[int(odds.argmax())],)))
        expected.append(own)
    assert found == expected
    assert 0 < sum(map(len, found)) < 14, "some places must count, and some not, or the test shows nothing"
    [calm] = build_requirement_data(model, [barred], 0, 24).examples
    assert calm.unlikelihood
    assert {row.completion for row in calm.rows} == {(7,)}
    assert calm.limit == pytest.approx(-math.log(0.9875))
    assert calm.per_answer <= 24


def test_the_loss_of_a_lesson_is_that_of_an_answer():
    rows = tuple(Row((2, n), (3,)) for n in range(20, 24))
    examples = constraint_bank(categories=1).examples
    model, found = AdaptedModel(tiny_base(), LoraSettings()), []
    for each in (1.0, 3.0):
        bank = ConstraintData(["c"], [0.1], examples, [RequirementExamples("a", 0.1, rows, (), True, each)])
        reference = Reference(model)
        reference.add(bank.rows())
        settings = ConstraintSettings(compliance_rows_per_step=0, twin_rows_per_step=0)
        constraint = LagrangianConstraint(bank, settings, 1)
        sample = constraint.sample("u", 0)
        with model.using(None):
            [scores] = model.score([sample.rows])
        logps = torch.tensor([[score.logp for score in scores]])
        base = torch.tensor([[reference[row] for row in sample.rows]])
        found.append(float(constraint.losses([sample], logps, base).means[0, 1]))
    taught = [logp for logp, term in zip(logps[0].tolist(), sample.terms, strict=True) if term == 1]
    never = -sum(math.log1p(-math.exp(logp)) for logp in taught) / len(taught)
    assert found == pytest.approx([never, 3 * never], rel=1e-4)


def test_requirements_take_turns_and_bring_their_opposites_along():
    rows = [Row((2, n), (3,)) for n in range(20)]
    bank = ConstraintData(
        ["c"],
        [0.1],
        constraint_bank(categories=1).examples,
        [
            RequirementExamples("a", 0.1, tuple(rows[:3]), ()),
            RequirementExamples("b", 0.1, tuple(rows[3:6]), tuple(rows[6:8])),
        ],
    )
    assert bank.names == ("c", "a", "b")
    sampler = ConstraintSampler(bank, ConstraintSettings(lesson_rows_per_step=3, twin_rows_per_step=0), 1, "u")
    samples = [sampler.sample(step) for step in range(4)]
    taught = [[(row, term - 1) for row, term in zip(*s, strict=True) if term in (1, 2)] for s in samples]
    assert [[kind for _, kind in step] for step in taught] == [[0, 1, 0], [1, 0, 1]] * 2
    assert sorted(row for step in taught[:2] for row, _ in step) == sorted(rows[:6])  # each once before any twice
    assert all(row in bank.requirements[kind].rows for step in taught for row, kind in step)
    assert [sample.terms.count(4) for sample in samples] == [1, 2] * 2  # out of place
    without = ConstraintSampler(
        ConstraintData(["c"], [0.1], bank.examples), ConstraintSettings(twin_rows_per_step=0), 1, "u"
    )
    with_requirements = ConstraintSampler(bank, ConstraintSettings(twin_rows_per_step=0), 1, "u").sample(0)
    refusals = [
        [row for row, term in zip(*s, strict=True) if term == 0] for s in (without.sample(0), with_requirements)
    ]
    assert refusals[0] == refusals[1] != []


def test_a_user_begins_where_the_requirement_is_met_and_stays_there():
    """Without lesson rows neither the warm start nor the user learns anything: the test can fail."""
    model = AdaptedModel(tiny_base(), LoraSettings())
    turns = tuple(Row((2, n), (30, 31)) for n in range(40, 60))
    answers = [Row(row.prompt, (*row.completion, EOS)) for row in turns]
    bank = ConstraintData(
        ["c"], [10.0], constraint_bank(categories=1).examples, [RequirementExamples("r", 0.05, turns, ())], answers * 4
    )
    user, dpo = user_rows("u", 12, seed=3), DpoSettings(epochs=4, learning_rate=3e-2)
    reference = Reference(model)
    reference.add([*(row for pair in user.train for row in pair[1:3]), *bank.rows()])

    def loss(flat: torch.Tensor) -> float:
        with model.using(flat[None]):
            [scores] = model.score([list(turns)])
        return -sum(score.logp for score in scores) / len(scores)

    ended = {}
    for rows in (0, 2):
        section = ConstraintSettings(lesson_rows_per_step=rows)
        start = train_warm_start(model, bank, dpo, section, seed=1)
        assert (start is None) == (rows == 0)
        assert start is None or loss(start.adapter) < 2  # its logits are small: 0.74 nats a token is all that it can do
        constraint = LagrangianConstraint(bank, section, 1)
        engine = Engine(model, [user], reference, constraint, dpo, FleetSettings(slots=1), seed=1, start=start)
        [trained] = engine.run()
        ended[rows] = loss(trained.adapter)
        assert set(trained.duals) == {"c", "r"}
        if start is not None:
            anchored = train_warm_start(model, bank, dpo.model_copy(update={"anchor": 0.3}), section, seed=1)
            assert torch.equal(anchored.adapter, start.adapter)  # its idle pairs are no text to keep likely
            # the dual variable of the requirement goes on from where the warm start's ended
            assert start.duals[0] == 0
            assert 0 < start.duals[1] <= trained.duals["r"].peak + 0.1
        assert (trained.duals["r"].peak > 0) == (rows > 0)
    assert ended[2] < 2 < 4 < ended[0]


def test_nothing_is_begun_with_where_there_is_nothing_to_teach():
    model = AdaptedModel(tiny_base(), LoraSettings())
    for bank in (None, constraint_bank()):
        assert train_warm_start(model, bank, DpoSettings(), ConstraintSettings(), seed=1) is None
