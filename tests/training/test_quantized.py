"""A base whose weights are stored in four bits: what it is made of, and that the fleet is as exact on it as on any."""

import pytest
import torch

from persona_rlhf.inputs.problems import InputError
from persona_rlhf.preferences.tokens import Row
from persona_rlhf.training import quantized
from persona_rlhf.training.base import load_base, weights_hash
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.settings import BaseSettings, LoraSettings
from persona_rlhf.training.shape import shape_of

pytest.importorskip("bitsandbytes")
SETTINGS = BaseSettings(model="data/base", quantization="nf4")
ROWS = [Row((2, 5 + n, 9), (20 + n, 31, 40 + n, 0)) for n in range(4)]


@pytest.fixture(scope="module")
def base():
    return load_base(SETTINGS)


@pytest.fixture(scope="module")
def exact():
    return load_base(BaseSettings(model="data/base"))


def test_linear_layers_are_stored_in_four_bits_and_the_model_is_near_the_exact_one(base, exact):
    layers = [m for m in base.model.modules() if quantized.is_quantized(m)]
    assert len(layers) == 7 * base.model.config.num_hidden_layers  # q, k, v, o, gate, up, down
    assert all(layer.weight.numel() == layer.in_features * layer.out_features // 2 for layer in layers)  # two a byte
    assert not quantized.is_quantized(base.model.get_output_embeddings())
    error = []
    for name, module in base.model.named_modules():
        if quantized.is_quantized(module):
            whole = exact.model.get_submodule(name).weight
            with torch.no_grad():
                stored = module(torch.eye(module.in_features)).T
            error.append(float((stored - whole).norm() / whole.norm()))
    assert 0.01 < max(error) < 0.15  # nf4's own error, and no other layer's weights


def test_it_is_another_base(base, exact):
    assert base.weights_hash != exact.weights_hash
    assert weights_hash(SETTINGS) == base.weights_hash
    assert weights_hash(BaseSettings(model="data/base")) == exact.weights_hash


def test_users_together_are_as_each_alone_and_gradients_reach_their_adapters(base):
    adapted = AdaptedModel(base, LoraSettings(rank=2, alpha=4))
    size = max(span.stop for span in adapted.spans.values())
    flat = (torch.randn(3, size, generator=torch.Generator().manual_seed(0)) * 0.02).requires_grad_()
    with adapted.using(flat):
        together = adapted.row_logps(adapted.batch([*ROWS[:2], *ROWS[:2], *ROWS[:2]], 3)).sum(1).view(3, 2)
    together.sum().backward()
    assert flat.grad is not None
    assert (flat.grad.abs().sum(1) > 0).all()
    for user in range(3):
        with torch.no_grad(), adapted.using(flat[user : user + 1]):
            alone = adapted.row_logps(adapted.batch(ROWS[:2], 1)).sum(1)
        assert torch.allclose(alone, together[user], atol=1e-4)
    with torch.no_grad(), adapted.using(None):
        reference = adapted.row_logps(adapted.batch(ROWS[:2], 1)).sum(1)
    assert (together.detach() - reference).abs().min() > 1e-3  # adapters do something
    adapted.close()


def test_logps_and_gradients_are_those_of_the_same_weights_unpacked(base):
    plain = load_base(BaseSettings(model="data/base"))
    with torch.no_grad():
        for name, module in base.model.named_modules():
            if quantized.is_quantized(module):
                plain.model.get_submodule(name).weight.copy_(quantized.dense(module))
    found = []
    for own in (base, plain):
        adapted = AdaptedModel(own, LoraSettings(rank=2, alpha=4))
        size = max(span.stop for span in adapted.spans.values())
        flat = (torch.randn(2, size, generator=torch.Generator().manual_seed(1)) * 0.02).requires_grad_()
        with adapted.using(flat):
            logps = adapted.row_logps(adapted.batch([*ROWS[:2], *ROWS[2:]], 2)).sum(1)
        logps.sum().backward()
        found.append((logps.detach(), flat.grad))
        adapted.close()
    (logps, gradient), (expected, wanted) = found
    assert torch.allclose(logps, expected, atol=1e-4)
    assert float((gradient - wanted).norm() / wanted.norm()) < 1e-5


def test_the_plan_counts_packed_weights(exact):
    exactly = BaseSettings(model="data/base", dtype="bfloat16")
    whole, packed = (shape_of(own, LoraSettings()) for own in (exactly, SETTINGS))
    layers = sum(m.weight.numel() for m in exact.model.modules() if type(m) is torch.nn.Linear)
    head = exact.model.get_output_embeddings().weight.numel()
    rest = whole.parameters - (layers - head)
    assert whole.base_bytes == 2 * whole.parameters
    assert packed.base_bytes == pytest.approx(2 * rest + (layers - head) * 4.127 / 8, rel=1e-3)


def test_without_the_library_it_is_said(monkeypatch):
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="bitsandbytes is not installed"):
        load_base(SETTINGS)


def test_a_library_that_stores_wrongly_is_not_used(monkeypatch):
    assert 0.05 < quantized._error(torch.device("cpu")) < 0.12
    monkeypatch.setattr(quantized, "_error", lambda device: 0.26)
    with pytest.raises(InputError, match=r"relative error 0\.26"):
        load_base(SETTINGS)
