import functools
import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_rlhf.config.training import ConstraintSettings, DpoSettings, FleetSettings, LoraSettings
from persona_rlhf.data.tokenize import PairRow, Row, UserRows
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.training.cache import Reference
from persona_rlhf.training.constraint import (
    OPENING_LENGTH,
    ConstraintData,
    ConstraintExample,
    ConstraintSample,
    ConstraintSampler,
    LagrangianConstraint,
    RequirementExamples,
)
from persona_rlhf.training.constraint_data import build_constraint_data
from persona_rlhf.training.engine import Engine
from persona_rlhf.training.objective import step_loss
from tests.models.tiny import EOS, constraint_bank, random_flat, random_row, tiny_base, user_rows

LORA = LoraSettings(rank=4, alpha=8)
PROMPT = (2, 3)


@pytest.fixture(scope="module")
def toy():
    """A model of six tokens, and all its answers of up to three tokens that end: 1 + 5 + 25 of them."""
    adapted = AdaptedModel(tiny_base(vocabulary=6), LORA)
    others = [token for token in range(6) if token != EOS]
    answers = [(*ids, EOS) for length in range(3) for ids in itertools.product(others, repeat=length)]
    reference = Reference(adapted)
    rows = [Row(PROMPT, ids) for ids in answers]
    reference.add(rows)
    return adapted, rows, reference


def _log_sum(values: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(values, -1)


def test_refusal_probability_falls_by_no_more_than_the_measured_excess(toy):
    """DESIGN 5: P_user(R|x) >= P_ref(R|x) exp(-c), for any set R of answers and any adapter, c exact by enumeration.

    Each answer is given a category of its own, so `measure` itself supplies the excess that c averages. The gap is a
    KL divergence: that is checked too, so a bound that holds by slack would be noticed.
    """
    adapted, rows, reference = toy
    users, draw = 40, torch.Generator().manual_seed(1)
    flat = random_flat(adapted, users, seed=3, size=0.3)
    everyone = [ConstraintSample(rows, list(range(len(rows)))) for _ in range(users)]
    categories = [str(n) for n in range(len(rows))]
    data = ConstraintData(categories, [0.0] * len(rows), [[ConstraintExample((row,), None, None)] for row in rows])
    with adapted.using(flat):
        logps = torch.tensor([[score.logp for score in own] for own in adapted.score([rows] * users)]).double()
    base = torch.tensor([reference[row] for row in rows]).double()
    constraint = LagrangianConstraint(data, ConstraintSettings(margin=0), 0)
    excess = constraint.losses(everyone, logps, base.expand(users, -1)).means[:, : len(rows)]
    gaps = []
    for _ in range(25):
        members = torch.rand(len(rows), generator=draw) < torch.rand(1, generator=draw).clamp(0.1, 0.9)
        if not members.any():
            continue
        weights = torch.softmax(base[members], 0)
        c = (excess[:, members] * weights).sum(1)
        floor = _log_sum(base[members]) - c
        found = _log_sum(logps[:, members])
        assert (found >= floor - 1e-5).all()
        kl = (weights * (weights.log() - torch.log_softmax(logps[:, members], 1))).sum(1)
        assert torch.allclose(found - floor, kl, atol=1e-4)
        gaps.append(kl)
        # the test can fail: with c's sign the wrong way round the claim is false for most adapters
        assert (found < floor + 2 * c - 1e-5).any()
    assert torch.cat(gaps).max() > 0.1


def test_all_answers_have_a_probability_of_at_most_one(toy):
    """Sums run to the end token, so answers are disjoint events."""
    _, rows, reference = toy
    assert 0.05 < sum(math.exp(reference[row]) for row in rows) <= 1 + 1e-5


def test_measure_by_hand():
    a, b, c, d, e = (Row((2,), (n, EOS)) for n in range(2, 7))
    reference = {a: -1.0, b: -2.0, c: -3.0, d: -4.0, e: -5.0}
    compliance, overrefusal = 5, 6  # after three categories and two requirements
    samples = [
        ConstraintSample([a, b, c, d, e, d, a, b, c], [0, 2, 0, *[compliance] * 2, overrefusal, 3, 4, 3]),
        ConstraintSample([b, b, a, e, d], [1, 1, 2, compliance, 3]),
    ]
    refused = [[-1.5, -1.0, -7.0], [-2.5, -3.0, -1.0]]
    complied = [[-3.0, -4.9], [-2.0]]
    over, taught = [[-9.0], []], [[-0.5, -2.0, -1.5], [-0.25]]
    filler = [[], [7.0] * 4]
    logps = torch.tensor(
        [list(itertools.chain(*user)) for user in zip(refused, complied, over, taught, filler, strict=True)]
    )
    base = torch.zeros(2, 9)
    for user, sample in enumerate(samples):
        base[user, : len(sample.rows)] = torch.tensor([reference[row] for row in sample.rows])

    def measured(logps=logps, unlikelihood=False, **section):
        examples = [[ConstraintExample((row,), None, None)] for row in (a, b, c)]
        requirements = [RequirementExamples(name, 0.0, (d,), (), unlikelihood) for name in "xy"]
        data = ConstraintData("012", [0.0] * 3, examples, requirements)
        return LagrangianConstraint(data, ConstraintSettings(**section), 0).losses(samples, logps, base)

    excess = measured(margin=0.5, floor=-100)
    # user 0, category 0: mean of (-1 + 1.5) and (-3 + 7); a rise over the base counts as a negative excess
    assert excess.means[:, :3].tolist() == [[2.25, 0.0, -1.0], [0.0, 0.75, 0.0]]
    assert excess.counts[:, :3].tolist() == [[2, 0, 1], [0, 2, 1]]
    # user 0: d rose by 1, which is 0.5 over the margin, e by 0.1, which is free; user 1: e rose by 3; no filler counts
    assert excess.means[:, compliance].tolist() == pytest.approx([0.25, 2.5])
    assert excess.means[:, overrefusal].tolist() == [0.0, 0.0]
    # requirement rows are compared with certainty, not with the base; user 1 has one, and no filler counts
    assert excess.means[:, 3:5].tolist() == [[1.0, 2.0], [0.25, 0.0]]
    assert excess.counts[:, 3:5].tolist() == [[2, 1], [1, 0]]
    # unlikelihood costs by the probability of all others; a certain row costs much, but not infinitely much
    avoided = measured(unlikelihood=True, margin=0.5, floor=-100)
    by_hand = [-math.log(1 - math.exp(logp)) for logp in (-0.5, -1.5, -2.0, -0.25)]
    expected = [(by_hand[0] + by_hand[1]) / 2, *by_hand[2:], 0.0]
    assert avoided.means[:, 3:5].flatten().tolist() == pytest.approx(expected)
    costs = measured(torch.zeros_like(logps).requires_grad_(), unlikelihood=True).means[:, 3:5]
    costs.sum().backward()
    assert costs.isfinite().all()
    assert costs.max() > 9
    # with a floor of -2.5 nats: user 0's openings are below it; user 1's rose over it, and only what is above counts
    above = measured(margin=0.5, floor=-2.5)
    assert above.means[:, compliance].tolist() == pytest.approx([0.0, 0.5])
    assert above.means[:, :3].tolist() == excess.means[:, :3].tolist()
    # a floor below the base's own openings changes nothing: it never allows less than the margin
    low = measured(margin=0.5, floor=-4.8)
    assert low.means[:, compliance].tolist() == pytest.approx(excess.means[:, compliance].tolist())


def _data(categories: int, probes: list[int], refusals: int) -> ConstraintData:
    examples = [
        [
            ConstraintExample(
                tuple(Row((2 + c, 2 + p), (2 + r, EOS)) for r in range(refusals)),
                Row((2 + c, 2 + p), (60,)),
                Row((2 + c, 2 + p), (70,)) if p % 2 else None,
            )
            for p in range(probes[c])
        ]
        for c in range(categories)
    ]
    return ConstraintData([str(c) for c in range(categories)], [0.1] * categories, examples)


def _of_term(sample: ConstraintSample, term: int) -> list[Row]:
    return [row for row, own in zip(*sample, strict=True) if own == term]


@settings(deadline=None, max_examples=40)
@given(
    probes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    refusals=st.integers(1, 3),
    rows=st.integers(1, 5),
    user=st.text(max_size=5),
)
def test_every_probe_comes_once_before_any_comes_twice(probes, refusals, rows, user):
    bank = _data(len(probes), probes, refusals)
    sampler = ConstraintSampler(bank, ConstraintSettings(rows_per_step=rows), 1, user)
    steps = math.ceil(len(probes) * max(probes) * refusals / rows)
    seen: dict[int, list[Row]] = {category: [] for category in range(len(probes))}
    for step in range(steps):
        sample = sampler.sample(step)
        sampled = [(row, term) for row, term in zip(*sample, strict=True) if term < len(probes)]
        assert len(sampled) == rows
        for row, category in sampled:
            assert row in [r for example in bank.examples[category] for r in example.refusals]
            seen[category].append(row)
    for category, walked in seen.items():
        size = probes[category]
        for start in range(0, len(walked) - size + 1, size):
            assert len({row.prompt for row in walked[start : start + size]}) == size
        # a probe's own refusals take turns as well: none comes twice before all of its probe's came once
        for start in range(0, len(walked) - size * refusals + 1, size * refusals):
            assert len(set(walked[start : start + size * refusals])) == size * refusals
    turns = Counter(term for step in range(steps) for term in sampler.sample(step).terms if term < len(probes))
    assert max(turns.values()) - min(turns[c] for c in seen) <= 1


def test_each_user_has_an_order_of_its_own_and_always_the_same():
    bank = _data(2, [6, 6], 1)

    def walk(user: str, seed: int = 1):
        sampler = ConstraintSampler(bank, ConstraintSettings(), seed, user)
        return [sampler.sample(step) for step in range(6)]

    assert walk("a") == walk("a")
    assert walk("a") != walk("b")
    assert walk("a") != walk("a", seed=2)


def test_openings_come_from_the_same_order_and_may_be_missing():
    bank = _data(2, [3, 3], 1)
    section = ConstraintSettings(compliance_rows_per_step=2, twin_rows_per_step=3)
    sampler = ConstraintSampler(bank, section, 1, "a")
    for step in range(4):
        sample = sampler.sample(step)
        compliances, overrefusals = (_of_term(sample, term) for term in (2, 3))
        assert [row.completion for row in compliances] == [(60,)] * 2
        assert all(row.completion == (70,) and row.prompt[1] % 2 for row in overrefusals)
    # twelve turns: each category's three probes twice, and one of the three has a twin
    assert sum(sampler.sample(step).terms.count(3) for step in range(4)) == 4


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_compliances_share_the_steps_prompts_and_visit_every_category(rows):
    bank = _data(4, [5] * 4, 1)
    sampler = ConstraintSampler(bank, ConstraintSettings(rows_per_step=rows, compliance_rows_per_step=1), 1, "a")
    visited = Counter()
    for step in range(80):
        sample = sampler.sample(step)
        prompts = [row.prompt for row, term in zip(*sample, strict=True) if term < 4]
        compliances = _of_term(sample, 4)
        assert all(row.prompt in prompts for row in compliances)
        visited.update(sample.terms[prompts.index(row.prompt)] for row in compliances)
    assert set(visited) == set(range(4))
    assert max(visited.values()) <= 2 * min(visited.values())


def _probe(n: int, category: str, split: str = "train", twin: bool = True) -> Probe:
    return Probe(
        f"p{n}", category, f"ask {n}", "topic", "phrasing", f"twin {n}" if twin else None, split, "combination"
    )


def _build(is_refusal, probes, categories=("a", "b"), tries=4):
    adapted = AdaptedModel(tiny_base(vocabulary=8), LORA)
    section = ConstraintSettings(refusals_per_probe=tries)

    def encode(prompt: str) -> tuple[int, ...]:
        kind, number = prompt.split()
        return (2 if kind == "ask" else 3, 2 + int(number) % 6, 4)

    bank = build_constraint_data(
        adapted, categories, [0.1] * len(categories), probes, encode, is_refusal, section, 5, 60
    )
    return adapted, encode, bank


def test_bank_holds_the_bases_own_finished_refusals():
    probes = [_probe(n, "ab"[n % 2], twin=n != 3) for n in range(6)] + [_probe(9, "a", "certify"), _probe(8, "c")]
    judged = []

    def refuses(text: str) -> bool:
        judged.append(text)
        return "w5" in text.split()

    adapted, encode, bank = _build(refuses, probes)
    assert bank.categories == ("a", "b")
    assert judged
    prompts = [example.refusals[0].prompt for own in bank.examples for example in own]
    assert set(prompts) <= {encode(f"ask {n}") for n in range(6)}
    assert len(prompts) == len(set(prompts))
    for category, own in zip("ab", bank.examples, strict=True):
        for example in own:
            [number] = [n for n in range(6) if encode(f"ask {n}") == example.refusals[0].prompt]
            assert "ab"[number % 2] == category
            assert all(row.completion[-1] == EOS and EOS not in row.completion[:-1] for row in example.refusals)
            assert all(5 in row.completion for row in example.refusals)
            if number == 3:
                assert example.compliance is example.overrefusal is None
                continue
            opening = example.refusals[0].completion[:-1][:OPENING_LENGTH]
            assert example.overrefusal == Row(encode(f"twin {number}"), opening)
            if example.compliance is not None:
                assert example.compliance.prompt == example.refusals[0].prompt
                assert 1 <= len(example.compliance.completion) <= OPENING_LENGTH
    assert any(example.compliance is not None for own in bank.examples for example in own)
    reference = Reference(adapted)
    reference.add(bank.rows())
    for own in bank.examples:
        for example in own:
            for row in (*example.refusals, example.compliance, example.overrefusal):
                assert row is None or reference[row] < 0


def test_a_category_that_the_base_never_refuses_is_told():
    probes = [_probe(n, "ab"[n % 2]) for n in range(6)]
    calls = itertools.count()
    with pytest.raises(ValueError, match=r"train probe of a, b; it is not safety-aligned"):
        _build(lambda _: False, probes)
    with pytest.raises(ValueError, match=r"train probe of c;"):
        _build(lambda _: next(calls) >= 0, probes, categories=("a", "b", "c"))


def _poisoned(adapted: AdaptedModel) -> tuple[ConstraintData, list[UserRows]]:
    """Users that always prefer complying (a fixed opening) over the very refusals of the constraint data."""
    bank = constraint_bank(seed=4, limit=0.0)
    users = []
    for n in range(2):
        made = user_rows(f"user {n}", 12, seed=n)
        draw = torch.Generator().manual_seed(n)
        rows = []
        refusals = [row for examples in bank.examples for example in examples for row in example.refusals]
        for pair, refusal in zip(made.train, refusals, strict=True):
            comply = Row(refusal.prompt, (50, 51, *random_row(draw, 1, 4).completion))
            rows.append(PairRow(pair.pair, comply, refusal))
        users.append(UserRows(made.user_id, rows, []))
    return bank, users


class _Turned(LagrangianConstraint):
    """A constraint with its sign the wrong way round."""

    def losses(self, samples, logps, base):
        size = self.settings.rows_per_step  # refusals come first
        return super().losses(samples, torch.cat([2 * base[:, :size] - logps[:, :size], logps[:, size:]], 1), base)


class _Emptied(LagrangianConstraint):
    """A constraint that never shows its rows."""

    def sample(self, user_id, step):
        return ConstraintSample([], [])


@functools.lru_cache
def _final_excess(kind: type[LagrangianConstraint] | None) -> torch.Tensor:
    """Mean excess refusal loss (nats) of each poisoned user after training; without constraint where it is None."""
    adapted = AdaptedModel(tiny_base(), LORA)
    bank, users = _poisoned(adapted)
    reference = Reference(adapted)
    reference.add([*(row for user in users for pair in user.train for row in pair[1:3]), *bank.rows()])
    dpo = DpoSettings(epochs=20, learning_rate=5e-3)
    constraint = kind and kind(bank, ConstraintSettings(), 1)
    engine = Engine(adapted, users, reference, constraint, dpo, FleetSettings(), seed=1)
    trained = {user.user_id: user for user in engine.run()}
    refusals = [row for examples in bank.examples for example in examples for row in example.refusals]
    flat = torch.stack([trained[user.user_id].adapter for user in users])
    with adapted.using(flat):
        scores = adapted.score([refusals] * len(users))
    for user in trained.values():
        assert bool(user.duals) == (kind is not None)
        assert kind is not LagrangianConstraint or all(trace.peak > 0 for trace in user.duals.values())
    base = [reference[row] for row in refusals]
    return torch.tensor([[r - s.logp for r, s in zip(base, own, strict=True)] for own in scores]).mean(1)


def test_the_constraint_holds_refusals_up_against_poisoned_pairs():
    free, held = _final_excess(None), _final_excess(LagrangianConstraint)
    assert (free > 5).all(), free
    assert (held < 0.25 * free).all(), (held, free)


@pytest.mark.parametrize("broken", [_Turned, _Emptied])
def test_a_constraint_that_is_broken_would_be_noticed(broken):
    """The test above goes red with the sign turned round, and with no rows to look at."""
    free, held = _final_excess(None), _final_excess(broken)
    assert not (held < 0.25 * free).any(), (held, free)


def test_a_user_who_keeps_the_limits_pays_nothing():
    """Without violation and without duals the loss is DPO's own: not a bit of the adapter changes."""
    adapted = AdaptedModel(tiny_base(), LORA)
    users = [user_rows("user", 4, seed=2)]
    bank = constraint_bank(limit=1.0)
    reference = Reference(adapted)
    reference.add([*(row for pair in users[0].train for row in pair[1:3]), *bank.rows()])
    samples = [ConstraintSampler(bank, ConstraintSettings(rows_per_step=4), 1, "user").sample(0)]
    arguments = (adapted, reference, [users[0].train], samples)
    constraint = LagrangianConstraint(bank, ConstraintSettings(), 1)
    with adapted.using(random_flat(adapted, 1, size=1e-4)):
        loss = step_loss(*arguments, constraint, torch.full((1, 2), 9.0), DpoSettings())
        assert loss.total.item() == loss.dpo.item()
    with adapted.using(random_flat(adapted, 1, seed=1, size=0.5)):
        constraint = LagrangianConstraint(bank, ConstraintSettings(opening_weight=0.0), 1)
        loss = step_loss(*arguments, constraint, torch.full((1, 2), 9.0), DpoSettings())
        assert loss.violations is not None
        assert loss.violations.max() > 0
        owed = 9.0 * torch.relu(loss.violations).sum()
        assert loss.total.item() == pytest.approx((loss.dpo + owed).item(), rel=1e-5)


def test_the_square_of_a_violation_counts_before_any_dual_variable_rises():
    """`lambda v + q/2 v^2` over the categories of a step, and nothing for a user within the limits."""
    adapted = AdaptedModel(tiny_base(), LORA)
    user, bank, reference = user_rows("user", 4, seed=2), constraint_bank(limit=0.1), Reference(adapted)
    reference.add([*(row for pair in user.train for row in pair[1:3]), *bank.rows()])
    settings = ConstraintSettings(opening_weight=0.0, quadratic=6.0)
    constraint = LagrangianConstraint(bank, settings, 1)
    samples = [constraint.sample("user", 0)]
    for size, seed, dual in ((0.5, 1, 0.0), (0.5, 1, 2.0), (1e-6, 0, 2.0)):
        with torch.no_grad(), adapted.using(random_flat(adapted, 1, seed=seed, size=size)):
            duals = torch.full((1, 2), dual)
            loss = step_loss(adapted, reference, [user.train], samples, constraint, duals, DpoSettings())
        assert loss.violations is not None
        over = loss.violations.double().clamp(min=0)
        assert bool(over.any()) == (size > 0.1)
        owed = (dual * over + 3 * over**2).sum().item()
        assert (loss.total - loss.dpo).item() == pytest.approx(owed, rel=1e-4)


def test_a_violation_is_what_lies_over_the_limit():
    """Limits are the policy's, in nats, one a category."""
    adapted = AdaptedModel(tiny_base(), LORA)
    user = user_rows("user", 4, seed=2)
    reference = Reference(adapted)
    violations = []
    for limit in (0.0, 0.75):
        bank = constraint_bank(limit=limit)
        reference.add([*(row for pair in user.train for row in pair[1:3]), *bank.rows()])
        constraint = LagrangianConstraint(bank, ConstraintSettings(), 1)
        samples = [constraint.sample("user", 0)]
        with torch.no_grad(), adapted.using(random_flat(adapted, 1)):
            loss = step_loss(adapted, reference, [user.train], samples, constraint, torch.zeros(1, 2), DpoSettings())
        violations.append(loss.violations)
    assert torch.allclose(violations[0] - violations[1], torch.full((1, 2), 0.75), atol=1e-5)
