from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.common.files import shipped_root
from persona_rlhf.config.experiment import read_config
from persona_rlhf.config.training import BasisSettings, LoraSettings
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import load_base
from persona_rlhf.pipeline import plan_samples
from persona_rlhf.pipeline.inputs import RunInputs
from persona_rlhf.pipeline.plan_samples import with_stand_ins
from persona_rlhf.pipeline.plan_steps import SampledTime
from persona_rlhf.pipeline.prepare import Prepared
from persona_rlhf.policy.policy import Policy
from persona_rlhf.training.constraint import constraint_of
from tests.models.tiny import tiny_base, user_rows


@pytest.mark.parametrize(("count", "every"), [(0, 1), (31, 1), (64, 2), (512, 16), (100_000, 16)])
def test_of_many_prompts_one_in_sixteen_is_asked_and_of_few_all(count, every):
    assert plan_samples._every(count, 16) == every
    assert plan_samples._every(count, 64) == max(1, min(64, count // 8))


@pytest.mark.parametrize(("step", "every"), [(0.001, 16), (0.02, 16), (0.05, 40), (3.0, 64)])
def test_fewer_prompts_are_asked_of_a_slow_base(monkeypatch, step, every):
    clock = iter([0.0, step * 2])
    monkeypatch.setattr(plan_samples, "perf_counter", lambda: next(clock))
    ready = Prepared(*[None] * len(Prepared._fields))._replace(
        adapted=AdaptedModel(tiny_base(), LoraSettings(rank=2, alpha=2))
    )
    assert plan_samples.sampled_every(ready) == every


def test_a_sample_of_a_policy_has_probes_of_every_category_and_split():
    policy = Policy.read([shipped_root() / f"configs/policy/tier_{n}.yaml" for n in ("one", "two")])
    sample = policy.sample(16)
    for split in ("train", "certify", "test", "dev"):
        sizes, few = (Counter(probe.category for probe in one.probes(split)) for one in (policy, sample))
        assert few == {category: -(-size // 16) for category, size in sizes.items()}
    assert policy.sample(1).probes("train") == policy.probes("train")


def test_judging_is_extrapolated_from_the_prompts_that_were_asked(monkeypatch):
    """One prompt in sixteen; 2 seconds for the first user, 3 for a cohort of two: 2 + 1.5 * 9 for ten users.

    Beside these, the decoding of new answers: 4 seconds for a cohort, the pass over its prompts left out.
    """
    adapted = SimpleNamespace(
        params_per_user=4,
        using=lambda *_: nullcontext(),
        generate=lambda *_: None,
        tokens_per_generation=800,
        base=SimpleNamespace(device="cpu"),
    )
    full = SimpleNamespace(
        probes=[()] * 384, harmless=[()] * 128, adapted=adapted, base=adapted.base,
        gate=SimpleNamespace(enabled=True, max_new_tokens=8),
    )  # fmt: skip
    few = SimpleNamespace(probes=[()] * 24, harmless=[()] * 8)
    monkeypatch.setattr(plan_samples, "_sampled_evaluator", lambda *_: few)
    monkeypatch.setattr(
        plan_samples, "_judged", lambda _, cohort, gated: SampledTime([], [], 2.0 if len(cohort) == 1 else 3.0)
    )
    written = SampledTime([16] * 8, [0.5] * 8, 9.0)
    monkeypatch.setattr(plan_samples, "timed", lambda *_: written)
    users = [user_rows(f"u{n}", 2, seed=n) for n in range(2)]
    ready = Prepared(*[None] * len(Prepared._fields))._replace(examination=full, config=SimpleNamespace(gate=full.gate))
    inputs = RunInputs(*[None] * len(RunInputs._fields))
    seconds = plan_samples.judging_seconds(ready, inputs, users[:1], users, 10, 16)
    assert seconds == pytest.approx(16 * (2 + 1.5 * 9 + 2 * 10), rel=1e-6)


def test_a_base_that_refuses_nothing_is_planned_with_the_longest_answers_and_named(monkeypatch):
    """A sample says little about refusals; `evaluate --base` says more."""
    problem = Problem("mute", None, "base.model", "not certifiable: the base refused no train probe of fraud")

    def refuse(*_):
        raise InputError([problem])

    monkeypatch.setattr(plan_samples, "policy_constraint_data", refuse)
    policy = Policy.read([shipped_root() / f"configs/policy/tier_{n}.yaml" for n in ("one", "two")])
    config = read_config(shipped_root() / "configs/quickstart.yaml", [])
    adapted = AdaptedModel(load_base(config.base), config.lora)
    examination = SimpleNamespace(adapted=adapted, probes=[(0,) * 8])
    ready = Prepared(*[None] * len(Prepared._fields))._replace(
        config=config, policy=policy, adapted=adapted, examination=examination
    )
    sampled = plan_samples.sampled_constraint(ready, 16)
    assert problem.sentence in sampled.notice
    assert sampled.share == pytest.approx(1 / 16, rel=0.2)
    assert sampled.data.categories == tuple(rule.category for rule in policy.restrictions)
    longest = config.gate.max_new_tokens
    assert {len(row.completion) for of in sampled.data.examples for one in of for row in one.refusals} == {longest}
    assert constraint_of(sampled.data, config.constraint, 0).sample("ann", 0).rows


def test_labelled_pairs_are_planned_as_copies_of_the_users_pairs(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f'{{"prompt": "question {n}"}}\n' for n in range(9)))
    users = [user_rows("few", 2, seed=0), user_rows("none", 0, seed=0)]
    basis = BasisSettings.model_construct(file=file, prompts=file, pairs=5, candidates=8)
    few, none = with_stand_ins(basis, users)
    assert list(few.labelled) == [*few.train, *few.train, few.train[0]]
    assert none.taught == []
    [as_many] = with_stand_ins(basis.model_copy(update={"candidates": None}), users[:1])
    assert as_many == few
    [fewer] = with_stand_ins(basis.model_copy(update={"candidates": 3}), users[:1])
    assert list(fewer.labelled) == [*few.train, few.train[0]]
    assert [user.taught for user in with_stand_ins(None, users)] == [user.train for user in users]
