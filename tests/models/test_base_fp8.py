"""Linear layers in eight bits: the products by hand, both ways, and what cannot be stored so."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.training import BaseSettings, LoraSettings
from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import Fp8Linear, fits_fp8, load_base, quantize_rows, to_fp8
from persona_rlhf.models.multi_lora import MultiLoRALinear

CPU = torch.device("cpu")


def eight(exact):
    """A matrix as rounded row by row, in double precision."""
    values, scale = quantize_rows(exact)
    return values.double() * scale.double()


@given(st.integers(0, 2**31), st.integers(-20, 20))
@settings(max_examples=40, deadline=None)
def test_a_row_comes_back_within_a_sixteenth_of_each_entry_or_the_scales_smallest_step(seed, exponent):
    exact = torch.randn(5, 48, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    values, scale = quantize_rows(exact)
    assert values.dtype == torch.float8_e4m3fn
    step = scale * 2.0**-9  # e4m3's smallest number
    assert ((eight(exact) - exact).abs() <= torch.maximum(exact.abs() / 16, step / 2) * 1.001).all()
    assert torch.equal(values.float().abs().amax(1), torch.full((5,), 448.0))


def test_rows_of_zeros_stay_zeros_and_what_is_no_number_stays_in_its_row():
    exact = torch.zeros(3, 16)
    exact[1, 2] = float("nan")
    exact[2] = 1.0
    back = eight(exact)
    assert torch.equal(back[0], torch.zeros(16, dtype=torch.float64))
    assert back[1].isnan().any()
    assert torch.allclose(back[2], torch.ones(16, dtype=torch.float64))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_both_ways_by_hand(kind, bias):
    torch.manual_seed(0)
    exact = nn.Linear(64, 48, bias=bias) if kind is nn.Linear else Conv1D(48, 64)
    weight = exact.weight.T if kind is Conv1D else exact.weight
    layer = Fp8Linear(exact, CPU)
    x = torch.randn(2, 7, 64, requires_grad=True)
    y = layer(x)
    by_hand = eight(x.detach().view(-1, 64)) @ eight(weight.detach()).T
    if exact.bias is not None:
        by_hand += exact.bias
    assert torch.allclose(y.double().view(-1, 48), by_hand, atol=1e-5)
    pull = torch.randn_like(y)
    y.backward(pull)
    values, scale = quantize_rows(weight.detach())
    back = eight(pull.view(-1, 48) * scale.T) @ values.double()
    assert torch.allclose(x.grad.double().view(-1, 64), back, atol=1e-5)
    whole = pull.view(-1, 48) @ weight  # the exact gradient is near
    assert 0.001 < (x.grad.view(-1, 64) - whole).norm() / whole.norm() < 0.06


def test_an_adapter_on_it_is_added_exactly_and_its_gradient_is_that_of_the_formula():
    torch.manual_seed(0)
    layer = MultiLoRALinear(Fp8Linear(nn.Linear(32, 16, bias=False), CPU))
    layer.a, layer.b = (torch.randn(*shape).requires_grad_() for shape in ((2, 4, 32), (2, 16, 4)))
    x = torch.randn(2, 3, 32)
    y = layer(x)
    frozen = (eight(x.view(-1, 32)) @ (layer.frozen.weight.float() * layer.frozen.scale).double().T).view(2, 3, 16)
    added = torch.einsum("uti,uri,uor->uto", x, layer.a, layer.b)
    assert torch.allclose(y.double(), frozen + added, atol=1e-4)
    for_a, for_b = torch.autograd.grad(added.sum(), (layer.a, layer.b))
    y.sum().backward()
    assert torch.allclose(layer.a.grad, for_a, atol=1e-4)
    assert torch.allclose(layer.b.grad, for_b, atol=1e-4)


def test_a_users_rows_are_the_same_whoever_is_beside_them():
    base = load_base(BaseSettings(model="data/base", quantization="fp8"))
    adapted = AdaptedModel(base, LoraSettings(rank=2, alpha=4))
    rows = [Row((2, 5 + n, 9), (20 + n, 31, 40 + n, 0)) for n in range(4)]
    with torch.no_grad(), adapted.using(None):
        alone = adapted.row_logps(adapted.batch(rows[:2], 1)).sum(1)
        together = adapted.row_logps(adapted.batch(rows, 1)).sum(1)
    assert torch.allclose(alone, together[:2], atol=1e-4)
    adapted.close()


def test_widths_that_are_no_multiple_of_sixteen_are_left_and_none_at_all_is_said(tmp_path):
    assert fits_fp8(nn.Linear(32, 16))
    assert not fits_fp8(nn.Linear(32, 17))
    assert not fits_fp8(nn.Embedding(32, 16))
    base = load_base(BaseSettings(model="data/base"))
    to_fp8(base.model, CPU)
    attention = base.model.model.layers[0].self_attn
    assert isinstance(attention.q_proj, Fp8Linear)
    assert type(attention.k_proj) is nn.Linear  # 72 wide
    assert type(base.model.get_output_embeddings()) is nn.Linear
    with pytest.raises(InputError, match="no linear layer whose widths are multiples of 16"):
        to_fp8(base.model, CPU)


def test_an_old_gpu_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(InputError, match=r"compute capability 8\.9"):
        to_fp8(load_base(BaseSettings(model="data/base")).model, torch.device("cuda", 0))


def test_an_old_torch_is_said(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "scaled_mm")
    with pytest.raises(InputError, match=r"install 2\.10"):
        load_base(BaseSettings(model="data/base", quantization="fp8"))
