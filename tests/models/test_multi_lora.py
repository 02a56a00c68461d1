import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.training import LoraSettings
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.multi_lora import (
    LayerSpan,
    MultiLoRALinear,
    SharedInputLayers,
    fresh_adapter,
    group_by_input,
    lora_matrices,
)
from persona_rlhf.models.packing import collate
from persona_rlhf.models.target_layers import adaptable_layers
from tests.models.tiny import random_flat, random_row, tiny_base
from tests.training.oracles import peft_config, peft_model, plain_logp, read_flat

LORA = LoraSettings(rank=4, alpha=8)


@pytest.fixture
def adapted():
    return AdaptedModel(tiny_base(), LORA)


def _rows(count: int, length: int | None = None):
    draw = torch.Generator().manual_seed(7)
    return [random_row(draw, 5 + n % 4, length or 4 + 3 * n) for n in range(count)]


def test_each_users_logits_are_those_of_their_peft_model(adapted):
    flat = random_flat(adapted, 3)
    rows = _rows(6)
    batch = collate(rows, adapted.base.pad_id, adapted.base.device)
    with torch.no_grad(), adapted.using(flat):
        logits = adapted.logits(batch)
    start = 0
    for n, row in enumerate(rows):
        oracle = peft_model(adapted, LORA, flat[n // 2])
        with torch.no_grad():
            full = oracle(input_ids=torch.tensor([[*row.prompt, *row.completion]])).logits[0]
        expected = full[len(row.prompt) - 1 : -1]
        assert torch.allclose(logits[start : start + len(expected)], expected, rtol=0, atol=1e-5)
        assert not torch.allclose(_base_logits(adapted, row), expected, rtol=0, atol=1e-2)
        start += len(expected)


@pytest.mark.parametrize("products", ["float32", "base"])
def test_over_sixteen_bits_logps_are_those_of_exact_products_within_rounding(products):
    """With products in the base's type too: a mean error below 0.01 nats a token, where adapters change over 0.2."""
    rounded = AdaptedModel(tiny_base(dtype=torch.bfloat16), LoraSettings(rank=4, alpha=8, products=products))
    base = tiny_base(dtype=torch.bfloat16)
    base.model.float()
    exact = AdaptedModel(base, LORA)
    flat, alphas, rows = random_flat(rounded, 3), torch.tensor([1.0, 0.5, 0.75]), _rows(6)
    with torch.no_grad():
        for factors in (None, alphas):
            with rounded.using(flat, factors), exact.using(flat, factors):
                near, right = (model.row_logps(model.batch(rows, 3)) for model in (rounded, exact))
            assert (near.float() - right).abs().mean() < 0.01
        assert (right - exact.row_logps(exact.batch(rows, 3))).abs().mean() > 0.2


def _base_logits(adapted: AdaptedModel, row):
    with torch.no_grad(), adapted.using(None):
        return adapted.logits(collate([row], adapted.base.pad_id, adapted.base.device))


def test_each_users_gradient_is_that_of_their_peft_model(adapted):
    flat = random_flat(adapted, 3).requires_grad_()
    rows = _rows(6)
    batch = collate(rows, adapted.base.pad_id, adapted.base.device)
    scales = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0, 1.0])
    with adapted.using(flat):
        (adapted.row_logps(batch).sum(1) * scales).sum().backward()
    assert flat.grad is not None
    for user in range(3):
        oracle = peft_model(adapted, LORA, flat[user].detach())
        mine = (2 * user, 2 * user + 1)
        sum(plain_logp(oracle, rows[n]) * scales[n] for n in mine).backward()
        expected = read_flat(oracle, list(adapted.spans.values()), gradients=True)
        assert (flat.grad[user] - expected).norm() <= 1e-5 * expected.norm()
    assert all(parameter.grad is None for parameter in adapted.base.model.parameters())


def test_without_adapters_the_base_is_bit_for_bit_the_base():
    base = tiny_base()
    ids = torch.arange(2, 22).view(2, 10)
    with torch.no_grad():
        before = base.model(input_ids=ids).logits
        adapted = AdaptedModel(base, LORA)
        assert torch.equal(base.model(input_ids=ids).logits, before)
        with adapted.using(random_flat(adapted, 2)):
            assert not torch.equal(base.model(input_ids=ids).logits, before)
        assert torch.equal(base.model(input_ids=ids).logits, before)
        adapted.close()
    assert torch.equal(base.model(input_ids=ids).logits, before)
    assert not any(isinstance(module, MultiLoRALinear) for module in base.model.modules())


def test_adapters_are_off_again_after_a_fault(adapted):
    with pytest.raises(RuntimeError, match="stop"), adapted.using(random_flat(adapted, 1)):
        raise RuntimeError("stop")
    assert all(adapted.layer(span).a is None for span in adapted.spans.values())


def test_alpha_scales_the_update(adapted):
    """At 0 the base, at 1 the adapter, between them B times alpha, as the export folds it."""
    flat = random_flat(adapted, 3)
    rows = _rows(1) * 3
    folded = flat.clone()
    alphas = torch.tensor([0.0, 1.0, 0.25])
    for span in adapted.spans.values():
        folded[:, span.b_start : span.stop] *= alphas[:, None]
    batch = collate(rows, adapted.base.pad_id, adapted.base.device)
    with torch.no_grad():
        with adapted.using(flat, alphas):
            scaled = adapted.row_logps(batch)
        with adapted.using(folded):
            assert torch.equal(adapted.row_logps(batch), scaled)
        with adapted.using(None):
            assert torch.allclose(adapted.row_logps(batch)[0], scaled[0], atol=1e-6)


def test_a_bfloat16_base_takes_float32_adapters():
    adapted = AdaptedModel(tiny_base(dtype=torch.bfloat16), LORA)
    flat = random_flat(adapted, 2).requires_grad_()
    batch = collate(_rows(2), adapted.base.pad_id, adapted.base.device)
    with adapted.using(flat):
        adapted.row_logps(batch).sum().backward()
    assert flat.grad is not None
    assert flat.grad.dtype == torch.float32
    assert (flat.grad.norm(dim=1) > 0).all()


def test_all_linear_means_what_peft_means():
    base = tiny_base()
    wrapped = get_peft_model(copy.deepcopy(base.model), peft_config(LORA))
    theirs = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for name, _ in wrapped.named_modules()
        if name.endswith(".lora_A.default")
    }
    assert set(adaptable_layers(base.model, "all-linear")) == theirs
    assert "lm_head" not in theirs


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["mlp.down_proj"], ["model.layers.1.self_attn.o_proj"]])
def test_named_layers_are_those_that_peft_would_take(targets):
    base = tiny_base()
    settings = LoraSettings(rank=2, alpha=2, target_modules=targets)
    wrapped = get_peft_model(copy.deepcopy(base.model), peft_config(settings))
    theirs = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for name, _ in wrapped.named_modules()
        if name.endswith(".lora_A.default")
    }
    assert set(adaptable_layers(base.model, targets)) == theirs


def test_every_target_that_names_nothing_is_told_at_once():
    with pytest.raises(InputError) as fault:
        adaptable_layers(tiny_base().model, ["q_proj", "qkv", "embed_tokens", "wo"])
    message = str(fault.value)
    assert len(fault.value.problems) == 3
    assert all(name in message for name in ("`qkv`", "`wo`", "`model.embed_tokens`", "q_proj", "down_proj"))


def test_a_model_without_linear_layers_is_an_input_error():
    class Odd(PreTrainedModel):
        def __init__(self) -> None:
            super().__init__(PreTrainedConfig(name_or_path="odd/model"))
            self.mix = nn.Conv1d(2, 2, 1)

        def get_output_embeddings(self) -> None:
            return None

    with pytest.raises(InputError, match="odd/model"):
        adaptable_layers(Odd(), "all-linear")


def test_flat_vector_is_cut_where_the_spans_say():
    spans = [LayerSpan("x", 3, 2, 2, 0), LayerSpan("y", 2, 5, 2, 10)]
    assert (spans[0].b_start, spans[0].stop, spans[1].b_start, spans[1].stop) == (6, 10, 14, 24)
    flat = torch.arange(48.0).view(2, 24)
    (a, b), (c, d) = lora_matrices(flat, spans)
    assert a[1].tolist() == [[24, 25, 26], [27, 28, 29]]
    assert b[0].tolist() == [[6, 7], [8, 9]]
    assert c[0].tolist() == [[10, 11], [12, 13]]
    assert d[1].flatten().tolist() == list(range(38, 48))


def test_a_fresh_adapter_is_drawn_as_peft_draws_it(adapted):
    spans = list(adapted.spans.values())
    flat = fresh_adapter(spans, torch.Generator().manual_seed(3))
    assert flat.shape == (adapted.params_per_user,)
    for (a, b), span in zip(lora_matrices(flat[None], spans), spans, strict=True):
        bound = 1 / span.inputs**0.5
        assert torch.all(b == 0)
        assert a.abs().max() <= bound
        assert a.std() == pytest.approx(bound / 3**0.5, rel=0.2)
    theirs = get_peft_model(copy.deepcopy(tiny_base(hidden=64).model), peft_config(LORA))
    drawn = torch.cat([p.flatten() for name, p in theirs.named_parameters() if "q_proj.lora_A" in name])
    assert drawn.abs().max().item() == pytest.approx(1 / 8, rel=0.02)
    assert torch.equal(flat, fresh_adapter(spans, torch.Generator().manual_seed(3)))
    assert not torch.equal(flat, fresh_adapter(spans, torch.Generator().manual_seed(4)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_users_with_unlike_shares_of_the_rows_are_users_alone(bias, dtype):
    """Values and gradients; one user has no row at all."""
    torch.manual_seed(0)
    frozen = torch.nn.Linear(6, 5, bias=bias).to(dtype).requires_grad_(False)
    layer = MultiLoRALinear(frozen)
    shares = [7, 0, 40]
    x = torch.randn(1, 47, 6, dtype=dtype, requires_grad=True)
    layer.a, layer.b = (torch.randn(3, *shape, dtype=dtype, requires_grad=True) for shape in ((2, 6), (5, 2)))
    layer.rows_per_user = shares
    pull = torch.randn(1, 47, 5, dtype=dtype)
    y = layer(x)
    mine = torch.autograd.grad((y * pull).sum(), (x, layer.a, layer.b))
    parts = x.split(shares, dim=1)
    alone = [frozen(rows) + rows @ a.T @ b.T for rows, a, b in zip(parts, layer.a, layer.b, strict=True)]
    expected = torch.cat(alone, dim=1)
    theirs = torch.autograd.grad((expected * pull).sum(), (x, layer.a, layer.b))
    near = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    for one, other in zip((y, *mine), (expected, *theirs), strict=True):
        assert torch.allclose(one, other, **near)


@pytest.mark.parametrize("bias", [True, False])
def test_rows_in_one_piece_and_in_ten_are_the_same_sum(bias):
    torch.manual_seed(0)
    layer = MultiLoRALinear(torch.nn.Linear(6, 5, bias=bias).double().requires_grad_(False))
    x = torch.randn(3, 40, 6, dtype=torch.float64)
    pull = torch.randn(3, 40, 5, dtype=torch.float64)
    low, high = torch.randn(3, 2, 6, dtype=torch.float64), torch.randn(3, 5, 2, dtype=torch.float64)

    def run(pieces):
        a, b = (drawn.clone().requires_grad_() for drawn in (low, high))
        rows = x.clone().requires_grad_()
        layer.a, layer.b = a, b
        y = torch.cat([layer(part) for part in rows.split(40 // pieces, dim=1)], dim=1)
        (y * pull).sum().backward()
        return y.detach(), rows.grad, a.grad, b.grad

    expected = x @ layer.weight.T + (x @ low.transpose(1, 2)) @ high.transpose(1, 2)
    expected = expected + layer.frozen.bias if bias else expected
    for one, other in zip(run(1), run(10), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)
    assert torch.allclose(run(1)[0], expected, rtol=1e-12, atol=1e-12)


def shared_input_layers(outputs, dtype=torch.float64):
    """Layers over one input, as siblings; and the same layers, each alone."""
    torch.manual_seed(0)
    frozen = [torch.nn.Linear(6, n, bias=n % 2 == 0).to(dtype).requires_grad_(False) for n in outputs]
    both = [[MultiLoRALinear(layer) for layer in frozen] for _ in range(2)]
    for layers in both:
        draw = torch.Generator().manual_seed(1)
        for layer, n in zip(layers, outputs, strict=True):
            layer.a, layer.b = (
                torch.randn(3, *shape, dtype=dtype, generator=draw).requires_grad_() for shape in ((2, 6), (n, 2))
            )
    together = SharedInputLayers(both[0])
    for layer in both[0]:
        layer.group = together
    return both


@pytest.mark.parametrize("shares", [None, [7, 0, 8]])
@pytest.mark.parametrize("needed", [True, False])
def test_siblings_are_each_alone(shares, needed):
    """Values and gradients, whichever is called first, and whether or not the input needs a gradient."""
    results = []
    for layers in shared_input_layers([5, 4, 3]):
        x = torch.randn(15, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=needed)
        for layer in layers:
            layer.rows_per_user = shares
        order = (1, 0, 2)
        ys = {n: layers[n](x) for n in order}
        leaves = [x] * needed + [factor for layer in layers for factor in (layer.a, layer.b)]
        loss = sum((ys[n] * torch.arange(ys[n].numel(), dtype=torch.float64).view_as(ys[n])).sum() for n in ys)
        results.append([*(ys[n] for n in range(3)), *torch.autograd.grad(loss, leaves)])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-11)


def test_siblings_are_computed_once_and_never_from_what_was():
    layers, _ = shared_input_layers([5, 4])
    x = torch.randn(3, 6, dtype=torch.float64)
    calls = []
    for layer in layers:
        product = layer.frozen_output
        layer.frozen_output = lambda rows, product=product: calls.append(1) or product(rows)
    first, second = layers[0](x), layers[1](x)
    assert len(calls) == 2  # each frozen layer once
    with torch.no_grad():
        layers[0].a.mul_(2)
        layers[1].a.mul_(2)
    assert not torch.equal(layers[0](x), first)  # the same tensor again is a new turn
    assert not torch.equal(layers[1](x), second)
    layers[0](x)
    x.mul_(2)
    assert torch.allclose(layers[1](x), _by_hand(layers[1], x), rtol=1e-12, atol=1e-12)  # the input is another one now
    layers[0](x)
    layers[0].group.clear()
    with torch.no_grad():
        layers[1].a.mul_(2)
    changed = layers[1](x)
    assert torch.allclose(changed, _by_hand(layers[1], x), rtol=1e-12, atol=1e-12)


def _by_hand(layer, x):
    rows = x.view(3, -1, 6)
    y = layer.frozen(rows) + torch.einsum("uti,uri,uor->uto", rows, layer.a, layer.b)
    return y.view(len(x), -1)


def test_siblings_serve_in_inference_mode_too():
    layers, _ = shared_input_layers([5, 4])
    with torch.inference_mode():
        x = torch.randn(3, 6, dtype=torch.float64)
        assert all(torch.allclose(layer(x), _by_hand(layer, x), rtol=1e-12, atol=1e-12) for layer in layers)


def test_adapters_changed_in_place_or_replaced_are_used_at_once():
    """Without gradients the siblings' A are stacked once, as long as they stay the same."""
    layers, _ = shared_input_layers([5, 4])
    x = torch.randn(3, 6, dtype=torch.float64)

    def right():
        return all(torch.allclose(layer(x), _by_hand(layer, x), rtol=1e-12, atol=1e-12) for layer in layers)

    with torch.no_grad():
        assert right()
        stack = layers[0].group._stack[2]
        assert right()
        assert layers[0].group._stack[2] is stack
        layers[1].a.mul_(2)
        assert right()
        layers[0].a = layers[0].a.clone() + 1
        assert right()
        layers[0].group.clear()
        assert layers[0].group._stack is None


def test_a_sibling_that_nobody_asks_for_costs_no_gradient():
    layers, alone = shared_input_layers([5, 4])
    x = torch.randn(6, 6, dtype=torch.float64)
    layers[0](x).sum().backward()
    alone[0](x).sum().backward()
    assert torch.allclose(layers[0].a.grad, alone[0].a.grad)
    assert layers[1].a.grad is None or not layers[1].a.grad.any()


def test_join_finds_who_reads_the_same_tensor_once():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            made = [MultiLoRALinear(torch.nn.Linear(6, 6).requires_grad_(False)) for _ in range(5)]
            self.q, self.k, self.o, self.twice, self.idle = made

        def forward(self, x):
            self.twice(self.twice(x))
            return self.o(self.q(x) + self.k(x))

    block = Block()
    group_by_input([block.q, block.k, block.o, block.twice, block.idle], lambda: block(torch.randn(2, 6)))
    assert block.q.group is block.k.group
    assert block.q.group.layers == [block.q, block.k]
    assert {len(layer.group.layers) for layer in (block.o, block.twice, block.idle)} == {1}


def test_the_layers_of_a_llama_are_joined_as_it_calls_them(adapted):
    groups = {tuple(name.rsplit(".", 1)[-1] for name in names) for names in _groups(adapted)}
    assert groups == {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}


def _groups(adapted):
    named = {adapted.layer(span): name for name, span in adapted.spans.items()}
    return {tuple(named[member] for member in layer.group.layers) for layer in named}
