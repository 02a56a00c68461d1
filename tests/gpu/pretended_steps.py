"""Steps of training and of decoding on a pretended GPU: launches, copies, waits, and room."""

from __future__ import annotations

import pytest
import torch

from persona_rlhf.benchmarks.trl_baseline import random_base
from persona_rlhf.config.training import (
    BaseSettings,
    ConstraintSettings,
    DpoSettings,
    EarlyStopSettings,
    FleetSettings,
    LoraSettings,
)
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import select_dtype
from persona_rlhf.models.generation import decode
from persona_rlhf.serving.local_engine import BatchingEngine
from persona_rlhf.serving.openai_api import SamplingParams
from persona_rlhf.training.api import fleet_train
from persona_rlhf.training.cache import Reference, rows_ahead
from persona_rlhf.training.constraint import constraint_of
from persona_rlhf.training.engine import Engine
from tests.gpu.pretended_cuda import PLENTY, Watch, backends, enable
from tests.models.tiny import constraint_bank, random_flat, tiny_base, user_rows

machine = enable()

LORA = LoraSettings(rank=4)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LAUNCHES_PER_LAYER = {"float32": (132, 44), "base": (106, 33)}
"""Kernels of a step of training and of decoding, in one layer of a Llama with all its linear layers adapted, by the
type of the adapters' products."""


def base_on(device, dtype=torch.bfloat16, **shape):
    base = tiny_base(dtype=dtype, **shape)
    base.model.to(device)
    return base


def engine_on(base, users=4, constrained=True, slots=None, lora=LORA, fleet=None, **dpo):
    adapted, bank = AdaptedModel(base, lora), constraint_bank() if constrained else None
    people = [user_rows(f"user {n}", 8, seed=n, even=True) for n in range(users)]
    if "early_stop" in dpo:
        people = [user._replace(train=user.train[:6], deciding=user.train[6:]) for user in people]
    reference = Reference(adapted)
    reference.add(rows_ahead(adapted, people, bank.rows() if bank else ()))
    constraint = None if bank is None else constraint_of(bank, ConstraintSettings(), 0)
    fleet = FleetSettings(slots=slots or users, **(fleet or {}))
    return Engine(adapted, people, reference, constraint, DpoSettings(epochs=2, **dpo), fleet, 0)


def step_of(users=4, layers=2, **options):
    """The watch of an engine's second step."""
    engine = engine_on(base_on(CUDA, layers=layers), users, **options)
    assert engine._fill()
    engine._step(print)
    backends.clear()
    with Watch() as watch:
        engine._step(print)
    return watch


def test_a_fleet_trains_on_the_second_gpu_as_on_the_cpu():
    torch.cuda.set_device(1)
    try:
        adapters = {}
        for device in (torch.device("cuda", 1), CPU):
            engine = engine_on(base_on(device, torch.float32), slots=3)
            adapters[device.type] = {user.user_id: user.adapter for user in engine.run()}
    finally:
        torch.cuda.set_device(0)
    for user, adapter in adapters["cpu"].items():
        assert (adapters["cuda"][user] - adapter).norm() <= 1e-4 * adapter.norm()


def test_no_fast_path_is_lost_in_bfloat16():
    adapted = AdaptedModel(base_on(CUDA), LORA)
    assert adapted.packs_rows
    assert adapted._split is not None
    assert adapted.patch is not None


@pytest.mark.parametrize("products", ["float32", "base"])
def test_launches_grow_with_layers_and_not_with_users(products):
    lora = LoraSettings(rank=4, products=products)
    few, many, crowd = (step_of(users, layers, lora=lora) for users, layers in ((4, 2), (4, 4), (8, 4)))
    assert (many.launches - few.launches) / 2 <= LAUNCHES_PER_LAYER[products][0]
    assert crowd.launches == many.launches


@pytest.mark.parametrize("products", ["float32", "base"])
def test_launches_of_decoding_grow_with_layers_and_not_with_users(products):
    def launches(layers, users=4):
        adapted = AdaptedModel(base_on(CUDA, layers=layers), LoraSettings(rank=4, products=products))
        with torch.no_grad(), adapted.patched(), adapted.using(random_flat(adapted, users)):
            choose = lambda logits, _: logits.argmax(-1)  # noqa: E731
            steps = decode(adapted.base, users, prompts_of(4) * (users // 4), choose, [False] * users, block=8)
            for _ in range(8):
                next(steps)
            with Watch() as watch:
                next(steps)
        return watch.launches / 8

    assert (launches(4) - launches(2)) / 2 <= LAUNCHES_PER_LAYER[products][1]
    assert launches(2, users=8) == launches(2)


def test_products_in_the_type_of_the_base_train_nearly_the_same():
    """Moments and adapters stay in float32; products are rounded to eight bits of mantissa."""
    exact, rounded = (
        {user.user_id: user.adapter for user in engine_on(base_on(CUDA), lora=LoraSettings(rank=4, products=p)).run()}
        for p in ("float32", "base")
    )
    for user, adapter in exact.items():
        assert rounded[user].dtype == torch.float32
        assert 0 < (rounded[user] - adapter).norm() <= 0.1 * adapter.norm()


def test_attention_of_a_step_is_flash():
    step_of()
    assert set(backends) == {"flash"}


@pytest.mark.parametrize("users", [2, 8])
def test_a_step_waits_for_the_device_once_and_never_for_a_copy_to_it(users):
    """One copy of the batch, one of the loss's figures, one of the constraint's, one of the rates; one read of all."""
    watch = step_of(users)
    assert (watch.h2d, watch.blocking) == (4, 0), watch.places
    assert (watch.d2h, watch.waits) == (1, 0), watch.places


def test_states_on_disk_are_copied_once_a_user_and_never_waited_for():
    """Hidden states below the adapters that memory has no room for: of the user's pairs, and of the shared rows."""
    lora = LoraSettings(rank=4, layers={"top": 0.5})
    watch = step_of(4, lora=lora, fleet={"trunk_cache": 0, "trunk_disk": 64})
    assert watch.blocking == 0, watch.places
    assert watch.h2d == 4 + 2 * 4, watch.places
    assert step_of(4, lora=lora).h2d == 4


def test_early_stopping_scores_all_users_at_once():
    def check(users):
        engine = engine_on(base_on(CUDA), users, constrained=False, early_stop=EarlyStopSettings(every=1, patience=9))
        assert engine._fill()
        _, moved = engine._step(print)
        with Watch() as watch:
            engine._stops(moved)
        return watch

    one, many = check(1), check(6)
    assert many.d2h == one.d2h == 1
    assert many.launches <= one.launches + 30


@pytest.mark.parametrize("share", [0.7, 0.4])
def test_a_step_that_does_not_fit_is_taken_in_parts(share):
    def run(room=None):
        engine, notices = engine_on(base_on(CUDA, torch.float32), 8, constrained=False), []
        held = machine.held()
        machine.reset_peak()
        with machine.memory(PLENTY if room is None else held + room):
            adapters = {user.user_id: user.adapter for user in engine.run(say=notices.append)}
        return adapters, machine.peak() - held, notices

    whole, peak, silence = run()
    parts, _, notices = run(int(share * peak))
    assert silence == []
    assert notices
    assert all(torch.allclose(parts[user], adapter, rtol=1e-3, atol=1e-5) for user, adapter in whole.items())


def test_a_pass_that_did_not_fit_is_tried_once():
    adapted = AdaptedModel(base_on(CUDA, torch.float32), LORA)
    rows = [[pair.chosen for n in range(4) for pair in user_rows("a", 8, seed=n).train]]
    whole, before, held = adapted.score(rows), adapted.tokens_per_pass, machine.held()
    machine.reset_peak()
    adapted.score(rows)
    with machine.memory(held + (machine.peak() - held) * 2 // 3):
        parts = adapted.score(rows)
        fitting = adapted.tokens_per_pass
        assert fitting < before
        batches, batch = [], adapted.batch
        adapted.batch = lambda *words: batches.append(words) or batch(*words)
        adapted.score(rows)
        assert adapted.tokens_per_pass == fitting
    assert sum(len(batch_rows) for batch_rows, _ in batches) == len(rows[0]), "no row twice"
    for one, other in zip(whole[0], parts[0], strict=True):
        assert one.logp == pytest.approx(other.logp, rel=1e-4)


def test_answers_that_did_not_fit_are_written_in_smaller_passes():
    adapted = AdaptedModel(base_on(CUDA, torch.float32), LORA)
    prompts, before = [[tuple(range(2, 12 + n)) for n in range(32)]], adapted.tokens_per_generation
    whole, held = adapted.generate(prompts, 16), machine.held()
    machine.reset_peak()
    adapted.generate(prompts, 16)
    with machine.memory(held + (machine.peak() - held) // 2):
        assert adapted.generate(prompts, 16) == whole
    assert adapted.tokens_per_generation < before


def test_greedy_scores_need_no_more_memory_than_scores(monkeypatch):
    monkeypatch.setattr("persona_rlhf.models.model_split._MIN_TOKENS", 8)
    monkeypatch.setattr("persona_rlhf.models.model_split._MAX_LOGITS", {"cpu": 1 << 24, "cuda": 1 << 16})
    adapted = AdaptedModel(base_on(CUDA, vocabulary=8_000), LORA)
    rows = [[pair.chosen for pair in user_rows("a", 32, seed=0).train]]
    peaks = {}
    for name in ("score", "score_greedy"):
        getattr(adapted, name)(rows)
        held = machine.held()
        machine.reset_peak()
        getattr(adapted, name)(rows)
        peaks[name] = machine.peak() - held
    assert peaks["score_greedy"] <= 1.5 * peaks["score"]


def test_a_small_gpu_has_smaller_passes():
    base = base_on(CUDA)
    with machine.memory(16 << 30):
        adapted = AdaptedModel(base, LORA)
    assert adapted.tokens_per_pass == 26_214
    adapted.close()
    assert AdaptedModel(base, LORA).tokens_per_pass == 131_072


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_an_old_gpu_computes_in_float32(capability, dtype):
    with machine.of_capability(*capability):
        assert select_dtype(BaseSettings(model="data/base"), CUDA) == dtype
        assert select_dtype(BaseSettings(model="data/base", dtype="bfloat16"), CUDA) == torch.bfloat16


def prompts_of(count):
    return [tuple(range(2, 9 + n)) for n in range(count)]


def test_a_decoding_step_reads_nothing_and_eight_are_read_at_once():
    """The host waits for no step of the model: it asks for tokens once in eight."""
    adapted = AdaptedModel(base_on(CUDA), LORA)
    with torch.no_grad(), adapted.using(random_flat(adapted, 4)):
        steps = decode(adapted.base, 4, prompts_of(4), lambda logits, _: logits.argmax(-1), [False] * 4, block=8)
        for _ in range(8):
            next(steps)
        with Watch() as watch:
            for _ in range(8):
                next(steps)
    assert (watch.h2d, watch.d2h, watch.waits) == (0, 1, 0), watch.places


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_of_a_cpu(temperature):
    """Also those that end within eight tokens, or at a limit that is no multiple of eight."""
    answers = {}
    for device in (CPU, CUDA):
        adapted = AdaptedModel(base_on(device, torch.float32), LORA)
        with adapted.using(random_flat(adapted, 2)):
            prompts = [prompts_of(5), prompts_of(3)]
            answers[device.type] = adapted.generate(prompts, 21, temperature, seed=3)
    assert answers["cuda"] == answers["cpu"]


def test_the_server_samples_with_one_read_a_token():
    adapted = AdaptedModel(base_on(CUDA), LORA)
    engine = BatchingEngine(adapted)
    try:
        sampling = SamplingParams(max_tokens=12, temperature=1.0, top_p=0.9, seed=1)
        adapters = random_flat(adapted, 3)
        with Watch() as watch:
            streams = [engine.generate(adapter, prompts_of(3)[n], sampling) for n, adapter in enumerate(adapters)]
            chunks = [list(stream) for stream in streams]
    finally:
        engine.close()
    assert all(chunks)
    assert watch.d2h <= 3 * 12, watch.places


def test_uneven_users_share_a_step_within_the_token_budget():
    """No pass has more tokens than the budget, with padding; users of a step are trained in several passes."""
    base = base_on(CUDA, torch.float32)
    adapted, fleet = AdaptedModel(base, LORA), FleetSettings(tokens_per_step=400)
    people = [user_rows(f"user {n}", 8, seed=n) for n in range(12)]
    reference = Reference(adapted)
    reference.add(rows_ahead(adapted, people))
    engine, sizes, row_logps = Engine(adapted, people, reference, None, DpoSettings(), fleet, 0), [], adapted.row_logps
    assert engine.count > 2
    adapted.row_logps = lambda batch, states: sizes.append(batch.input_ids.numel()) or row_logps(batch, states)
    assert len(list(engine.run())) == 12
    assert max(sizes) <= 400


@pytest.mark.parametrize(
    ("capability", "dtype", "products"), [((9, 0), torch.bfloat16, "high"), ((7, 5), torch.float32, "highest")]
)
def test_the_benchmark_computes_as_a_run_does(capability, dtype, products):
    config = tiny_base().model.config
    with machine.of_capability(*capability):
        base = random_base(config, CUDA, "shape")
    assert base.model.dtype == dtype
    assert torch.get_float32_matmul_precision() == products


def test_a_library_call_computes_as_a_run_does_and_sets_back_the_precision():
    torch.set_float32_matmul_precision("highest")
    base, seen = base_on(CUDA), []
    base.model.register_forward_pre_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    fleet_train(base.model, [user_rows("u", 4, seed=0)], tokenizer=base.tokenizer, fleet=FleetSettings(slots=1))
    assert set(seen) == {"high"}
    assert torch.get_float32_matmul_precision() == "highest"
