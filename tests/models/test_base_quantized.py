"""A base whose weights are stored in fewer bits: what it is made of, and that the fleet is as exact on it as on any."""

import pytest
import torch

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.training import BaseSettings, LoraSettings
from persona_rlhf.data.tokenize import Row
from persona_rlhf.models import base as base_module
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import Fp8Linear, load_base, weights_hash
from persona_rlhf.training.base_shape import shape_of

pytest.importorskip("bitsandbytes")
SETTINGS = BaseSettings(model="data/base", quantization="nf4")
ROWS = [Row((2, 5 + n, 9), (20 + n, 31, 40 + n, 0)) for n in range(4)]


@pytest.fixture(scope="module", params=["nf4", "fp8"])
def base(request):
    return load_base(SETTINGS.model_copy(update={"quantization": request.param}))


@pytest.fixture(scope="module")
def nf4():
    return load_base(SETTINGS)


@pytest.fixture(scope="module")
def exact():
    return load_base(BaseSettings(model="data/base"))


def test_linear_layers_are_stored_in_few_bits_and_the_model_is_near_the_exact_one(base, exact):
    layers = [m for m in base.model.modules() if base_module.is_quantized(m)]
    a_byte = 1 if isinstance(layers[0], Fp8Linear) else 2
    # q, k, v, o, gate, up, down; keys and values are 72 wide, which products in eight bits do not take
    assert len(layers) == (5 if a_byte == 1 else 7) * base.model.config.num_hidden_layers
    assert all(m.weight.numel() * m.weight.itemsize * a_byte == m.in_features * m.out_features for m in layers)
    assert not base_module.is_quantized(base.model.get_output_embeddings())
    error = []
    for name, module in base.model.named_modules():
        if base_module.is_quantized(module):
            whole = exact.model.get_submodule(name).weight
            with torch.no_grad():
                stored = module(torch.eye(module.in_features)).T
            error.append(float((stored - whole).norm() / whole.norm()))
    least, most = (0.02, 0.03) if a_byte == 1 else (0.01, 0.15)
    assert least < max(error) < most  # rounding, and not another layer's weights


def test_each_is_another_base(exact):
    kinds = {kind: weights_hash(BaseSettings(model="data/base", quantization=kind)) for kind in (None, "nf4", "fp8")}
    assert len(set(kinds.values())) == 3
    assert kinds[None] == exact.weights_hash


def test_the_hash_is_that_of_what_is_loaded(base):
    kind = "fp8" if any(isinstance(m, Fp8Linear) for m in base.model.modules()) else "nf4"
    assert weights_hash(BaseSettings(model="data/base", quantization=kind)) == base.weights_hash


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


def test_logps_and_gradients_are_those_of_the_same_weights_unpacked(nf4):
    plain = load_base(BaseSettings(model="data/base"))
    with torch.no_grad():
        for name, module in nf4.model.named_modules():
            if base_module.is_quantized(module):
                plain.model.get_submodule(name).weight.copy_(base_module.dequantize(module))
    results = []
    for base in (nf4, plain):
        adapted = AdaptedModel(base, LoraSettings(rank=2, alpha=4))
        size = max(span.stop for span in adapted.spans.values())
        flat = (torch.randn(2, size, generator=torch.Generator().manual_seed(1)) * 0.02).requires_grad_()
        with adapted.using(flat):
            logps = adapted.row_logps(adapted.batch([*ROWS[:2], *ROWS[2:]], 2)).sum(1)
        logps.sum().backward()
        results.append((logps.detach(), flat.grad))
        adapted.close()
    (logps, gradient), (expected, wanted) = results
    assert torch.allclose(logps, expected, atol=1e-4)
    assert float((gradient - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_the_plan_counts_packed_weights(exact, kind):
    exactly = BaseSettings(model="data/base", dtype="bfloat16")
    stored = exactly.model_copy(update={"quantization": kind})
    whole, packed = (shape_of(settings, LoraSettings()) for settings in (exactly, stored))
    head = exact.model.get_output_embeddings()
    layers = [m.weight for m in exact.model.modules() if type(m) is torch.nn.Linear and m is not head]
    if kind == "fp8":
        layers = [weight for weight in layers if weight.shape[0] % 16 == 0]
    count, outputs = sum(weight.numel() for weight in layers), sum(weight.shape[0] for weight in layers)
    stored_bytes = count * 4.127 / 8 if kind == "nf4" else count + 4 * outputs
    assert whole.base_bytes == 2 * whole.parameters
    assert packed.base_bytes == pytest.approx(2 * (whole.parameters - count) + stored_bytes, rel=1e-3)


def test_without_the_library_it_is_said(monkeypatch):
    monkeypatch.setattr(base_module, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="bitsandbytes is not installed"):
        load_base(SETTINGS)


def test_a_library_that_stores_wrongly_is_not_used(monkeypatch):
    assert 0.05 < base_module._nf4_error(torch.device("cpu")) < 0.12
    monkeypatch.setattr(base_module, "_nf4_error", lambda device: 0.26)
    with pytest.raises(InputError, match=r"relative error 0\.26"):
        load_base(SETTINGS)
