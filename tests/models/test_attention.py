"""Attention over packed rows against its formula, and its independence of other users."""

import pytest
import torch

from persona_rlhf.data.tokenize import Row
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


def _outputs(batch, heads):
    """Outputs of the tokens, in their order, `[tokens, heads, size]`."""
    module = torch.nn.Module()
    module.num_key_value_groups = heads[0].shape[1] // heads[1].shape[1]
    outputs, _ = _attend(module, *heads, None, scaling=SCALE, layout=batch.layout)
    return outputs.reshape(batch.input_ids.numel(), -1, SIZE)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
def test_attention_is_the_formula_token_by_token(heads, groups):
    """`softmax(scale q K) V` over the tokens of a row up to the query, for a head and its group of keys."""
    batch = pack(ROWS, 2, 0, CPU, equal_lines=False)
    query, key, value = tensors = _heads(batch, heads, groups)
    outputs = _outputs(batch, tensors)
    for place in batch.row_places:
        fed = place.row.completion[:-1]
        row = [*range(place.prompt_start, place.prompt_start + len(place.row.prompt))]
        row += range(place.completion_start, place.completion_start + len(fed))
        for n, token in enumerate(row):
            for head in range(heads):
                group = head * groups // heads
                scores = torch.stack([SCALE * query[0, head, token] @ key[0, group, k] for k in row[: n + 1]])
                expected = torch.softmax(scores, 0) @ value[0, group, row[: n + 1]]
                assert torch.allclose(outputs[token, head], expected, rtol=1e-10, atol=1e-12)


def test_a_user_with_nan_values_does_not_change_another_user():
    batch = pack(ROWS, 2, 0, CPU, equal_lines=False)
    assert batch.tokens_per_user is not None
    first = batch.tokens_per_user[0]
    broken = [x.detach().clone() for x in _heads(batch, 4, 2)]
    for x in broken:
        x[:, :, :first] = float("nan")
        x.requires_grad_()
    outputs = _outputs(batch, broken)
    weights = torch.arange(1.0, outputs.numel() + 1).view(outputs.shape)
    for gradient in torch.autograd.grad((outputs * weights).sum(), broken):
        assert torch.isfinite(gradient[:, :, first:]).all()
    assert torch.isfinite(outputs[first:]).all()
    assert torch.equal(outputs[first:], _outputs(batch, _heads(batch, 4, 2))[first:])
