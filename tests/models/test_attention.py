"""Attention over short rows as batched products, against the formula and torch's kernel."""

import pytest
import torch

from persona_rlhf.data.tokenize import Row
from persona_rlhf.models import attention
from persona_rlhf.models.attention import _attend
from persona_rlhf.models.packing import EMPTY, pack

CPU = torch.device("cpu")
ROWS = [
    Row((5, 6, 7), (8, 9, 1)),
    Row((5, 6, 7), (4, 1)),
    Row((5, 6, 7), (3, 3, 3, 1)),
    EMPTY,
    Row((2, 6), (7, 1)),
    Row((9,), (1,)),
    Row((2, 6), (4, 4, 1)),
    Row((9,), (5, 5, 5, 5, 1)),
]
SIZE, SCALE = 4, 0.3


def _heads(batch, heads, groups):
    draw = torch.Generator().manual_seed(0)
    shape = batch.input_ids.shape
    return [
        torch.randn(*shape, n, SIZE, dtype=torch.float64, generator=draw).transpose(1, 2).requires_grad_()
        for n in (heads, groups, groups)
    ]


def _attended(batch, layout, heads):
    """What attention gives of the tokens, in their order, and the gradient of some of it (each token weighed)."""
    module = torch.nn.Module()
    module.num_key_value_groups = heads[0].shape[1] // heads[1].shape[1]
    outputs, _ = _attend(module, *heads, None, scaling=SCALE, layout=layout)
    outputs = outputs.reshape(batch.input_ids.numel(), -1, SIZE)
    return outputs, torch.arange(1.0, outputs.numel() + 1).view(outputs.shape)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("last", [False, True])
def test_products_are_the_kernel(monkeypatch, heads, groups, last):
    batch = pack(ROWS, 2, 0, CPU, equal_lines=False)
    assert batch.layout is not None
    layout = batch.layout.last if last else batch.layout
    assert layout is not None
    read = torch.unique(batch.predictors.index)
    gradients = []
    for short in (0, attention.SHORT):
        monkeypatch.setattr(attention, "SHORT", short)
        given = _heads(batch, heads, groups)
        outputs, weights = _attended(batch, layout, given)
        gradients.append([outputs[read], *torch.autograd.grad((outputs * weights)[read].sum(), given)])
    for kernels, product in zip(*gradients, strict=True):
        assert torch.allclose(kernels, product, rtol=1e-10, atol=1e-12)


def test_products_are_the_formula_token_by_token():
    """`softmax(scale q K) V` over a token's row up to itself, for a head and its group of keys."""
    batch = pack(ROWS, 2, 0, CPU, equal_lines=False)
    query, key, value = given = _heads(batch, 4, 2)
    outputs, _ = _attended(batch, batch.layout, given)
    for place in batch.row_places:
        fed = place.row.completion[:-1]
        row = [*range(place.prompt_start, place.prompt_start + len(place.row.prompt))]
        row += range(place.completion_start, place.completion_start + len(fed))
        for n, token in enumerate(row):
            for head in range(4):
                scores = torch.stack([SCALE * query[0, head, token] @ key[0, head // 2, k] for k in row[: n + 1]])
                wanted = torch.softmax(scores, 0) @ value[0, head // 2, row[: n + 1]]
                assert torch.allclose(outputs[token, head], wanted, rtol=1e-10)


def test_a_user_whose_values_are_no_numbers_is_not_felt():
    batch = pack(ROWS, 2, 0, CPU, equal_lines=False)
    assert batch.tokens_per_user is not None
    first = batch.tokens_per_user[0]
    sick = [x.detach().clone() for x in _heads(batch, 4, 2)]
    for x in sick:
        x[:, :, :first] = float("nan")
        x.requires_grad_()
    outputs, weights = _attended(batch, batch.layout, sick)
    for gradient in torch.autograd.grad((outputs * weights).sum(), sick):
        assert torch.isfinite(gradient[:, :, first:]).all()
    assert torch.isfinite(outputs[first:]).all()
    well, _ = _attended(batch, batch.layout, _heads(batch, 4, 2))
    assert torch.equal(outputs[first:], well[first:])
