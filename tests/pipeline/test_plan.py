from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from persona_rlhf.common.files import shipped_root
from persona_rlhf.config.experiment import read_config
from persona_rlhf.config.training import DpoSettings, FleetSettings, LoraSettings
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.pipeline import monitoring, plan
from persona_rlhf.pipeline.monitoring import ProgressEvent
from persona_rlhf.pipeline.plan import Memory, Plan, Seconds, _walk, render
from persona_rlhf.pipeline.plan_samples import SampledConstraint, ScreenedUsers
from persona_rlhf.pipeline.prepare import Prepared
from persona_rlhf.training.cache import Reference
from persona_rlhf.training.engine import Engine
from persona_rlhf.training.memory import largest_step, pair_tokens, taken_by
from persona_rlhf.training.user_state import UserSchedule, queue_order
from tests.models.tiny import tiny_base, user_rows


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_the_walk_takes_the_steps_that_the_engine_takes(slots):
    users = [user_rows(f"u{n}", size, seed=n) for n, size in enumerate((3, 9, 5, 1, 6))]
    dpo = DpoSettings(epochs=2, pairs_per_step=2)
    adapted = AdaptedModel(tiny_base(), LoraSettings(rank=2, alpha=2))
    reference = Reference(adapted)
    reference.add(row for user in users for pair in user.train for row in (pair.chosen, pair.rejected))
    engine = Engine(adapted, users, reference, None, dpo, FleetSettings(slots=slots), seed=5)
    taken = []
    list(engine.run(lambda reports: taken.append(len(reports))))
    queue = queue_order([UserSchedule(user, dpo, 5) for user in users])
    walked, padded = (_walk(queue, slots, 10, pads) for pads in (False, True))
    assert [wave.users for wave in walked] == taken
    pairs = [pair for user in users for pair in user.train]
    tokens = sum(len(p.chosen.prompt) + len(p.chosen.completion) + len(p.rejected.completion) for p in pairs)
    assert sum(wave.tokens for wave in walked) == 2 * tokens + 10 * sum(taken)
    assert all(wave.computed == wave.tokens for wave in walked)
    assert all(wave.computed >= wave.tokens for wave in padded)
    assert slots == 1 or any(wave.computed > wave.tokens for wave in padded)
    assert not adapted.pads_users, "a CPU computes no padding"
    adapted.packs_rows = False
    assert adapted.pads_users


def test_json_has_the_total_and_the_table_every_figure():
    memory, seconds = Memory(1.0, 2.0, 4.0, 8.0, 16.0, 900.0), Seconds(1.0, 20.0, 700.0, 60.0)
    found = Plan(10, 1, 700, 100_000, 180, 4, memory, seconds)
    told = found.to_json()
    assert told["seconds"]["total"] == 781
    assert told["memory_mib"]["peak"] == 900
    assert (told["users"], told["skipped"], told["slots"]) == (10, 1, 4)
    named = found._replace(notice="No adapters on the router.")
    assert (told["notice"], named.to_json()["notice"]) == (None, render(named).caption)
    shown = list(render(found).columns[1].cells)
    assert {"100,000", "900.0 MiB", "60.0 s", "11.7 min", "13.0 min"} <= set(shown)


def _planned(monkeypatch, rows, users, overrides=()):
    """The plan of users that are screened already, without a constraint and a judge."""
    adapted = AdaptedModel(tiny_base(), LoraSettings(rank=2, alpha=2))
    examination = SimpleNamespace(check_pool=lambda: None)
    ready = SimpleNamespace(
        adapted=adapted,
        pairs=SimpleNamespace(users=users),
        watched=lambda *_: nullcontext(),
        examination=examination,
        basis=None,
    )
    stand_ins = {
        "read_inputs": None,
        "prepare": ready,
        "check_prompts": None,
        "screens_seconds": 0.0,
        "base_answers_seconds": 0.0,
        "sampled_constraint": SampledConstraint(None, 1.0, 0.0),
        "screened": ScreenedUsers(rows, 0.0),
        "judging_seconds": 0.0,
        "_held_back": {},
        "_judging_bytes": (0, 0),
        "_state_bytes": 0,
        "sampled_every": 16,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(plan, name, lambda *_, value=value, **__: value)
    config = read_config(shipped_root() / "configs/quickstart.yaml", list(overrides))
    return adapted, config, plan.plan(config)


def test_a_run_without_a_pair_to_train_on_is_a_plan_of_nobody(monkeypatch):
    _, _, found = _planned(monkeypatch, [user_rows("quiet", 0, seed=0, heldout=2)], 1)
    assert (found.users, found.skipped, found.steps, found.slots) == (0, 1, 0, 0)
    assert (found.seconds.training, found.seconds.judging) == (0, 0)
    assert found.memory.base > 0


def _longer(user, times):
    """The user with completions so many times as long."""

    def of(row):
        return row._replace(completion=row.completion[:-1] * times + row.completion[-1:])

    return user._replace(
        train=[pair._replace(chosen=of(pair.chosen), rejected=of(pair.rejected)) for pair in user.train]
    )


@pytest.mark.parametrize("times", [1, 8])
def test_activations_are_those_of_the_largest_step_that_comes(monkeypatch, times):
    """All steps alike, those of the slots at their largest; with one long user, one long step and three short."""
    users = [user_rows(f"u{n}", 8, seed=n, even=True) for n in range(4)]
    users[0] = _longer(users[0], times)
    adapted, config, planned = _planned(monkeypatch, users, 4, ["fleet.slots=4"])
    cost = largest_step(adapted, users, None, config.dpo)
    state = 3 * 4 * adapted.params_per_user  # bytes of an adapter and its moments
    found = planned.memory.activations * 2**20 / (4 * (cost.memory - state))
    short = sum(map(pair_tokens, users[1].train[: config.dpo.pairs_per_step]))
    assert found == pytest.approx((cost.tokens + 3 * short) / (4 * cost.tokens), rel=1e-6)
    assert (found == 1) == (times == 1)


@pytest.mark.parametrize("early", ["null", "{patience: 1, every: 1}"])
def test_users_of_a_single_step_are_probed_too(monkeypatch, early):
    """One pair each: every cohort of the probe takes one step, and no check of early stopping is timed with it."""
    adapted = AdaptedModel(tiny_base(), LoraSettings(rank=2, alpha=2))
    users = [user_rows(f"u{n}", 1, seed=n) for n in range(3)]
    users = [user._replace(deciding=user_rows("x", 50, seed=9).train) for user in users]
    config = read_config(shipped_root() / "configs/quickstart.yaml", [f"dpo.early_stop={early}"])
    monkeypatch.setattr(monitoring, "_SECONDS_BETWEEN_EVENTS", 0.0)
    events: list[ProgressEvent] = []
    cohorts = [users, users[1:], users[1:2]]
    steps, each = plan._probe_steps(config, adapted, cohorts, None, on_progress=events.append)
    assert {event.phase for event in events} == {"reference", "timing steps"}
    assert 0 < steps.of(100) < 5
    assert 0 < each < 0.1


@pytest.mark.parametrize(("prompts", "most"), [(20, 2.5), (200, 1.5)])
def test_a_full_pass_of_judging_needs_the_bytes_that_are_planned_for_it(prompts, most):
    """Two users whose answers are all decoded to the limit; with 200 prompts, more than a cache holds at once.

    With 20 the cache does not grow, and too much is planned.
    """
    adapted = AdaptedModel(tiny_base(), LoraSettings(rank=2, alpha=2))
    adapted.tokens_per_generation, adapted.tokens_per_pass = 4_000, 1_000
    probes = [(3 + n % 80, 4 + n // 80, *range(5, 21)) for n in range(prompts)]
    gate = SimpleNamespace(max_new_tokens=32)
    examination = SimpleNamespace(adapted=adapted, probes=probes, harmless=[], gate=gate)
    ready = Prepared(*[None] * len(Prepared._fields))._replace(adapted=adapted, examination=examination)
    caches, judged = plan._judging_bytes(ready, 2)
    config = adapted.base.model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert caches == token * min(4_000, 2 * prompts * 50)
    adapters = torch.zeros(2, adapted.params_per_user)
    with adapted.using(adapters):
        needed = taken_by(lambda: adapted.generate([probes] * 2, 32), torch.device("cpu"))
    assert needed / 1.2 < judged < most * needed
