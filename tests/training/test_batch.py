import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.preferences.tokens import Row
from persona_rlhf.training.batch import EMPTY, collate

CPU = torch.device("cpu")
IDS = st.lists(st.integers(2, 90), min_size=1, max_size=9).map(tuple)
ROWS = st.lists(st.one_of(st.just(EMPTY), st.builds(Row, IDS, st.one_of(st.just(()), IDS))), min_size=1, max_size=6)


@given(ROWS)
def test_every_completion_token_is_predicted_once_from_the_position_before_it(rows):
    batch = collate(rows, 0, CPU)
    seen = []
    flat = batch.ids.flatten()
    length = batch.ids.shape[1]
    for source, target, place in zip(*(t.tolist() for t in (batch.source, batch.targets, batch.place)), strict=True):
        row, column = divmod(place, batch.longest)
        assert source // length == (source + 1) // length == row
        assert flat[source + 1] == target == rows[row].completion[column]
        assert source % length == len(rows[row].prompt) - 1 + column
        seen.append((row, column))
    assert seen == [(n, m) for n, row in enumerate(rows) for m in range(len(row.completion))]
    for n, row in enumerate(rows):
        whole = [*row.prompt, *row.completion]
        assert batch.ids[n].tolist() == whole + [0] * (length - len(whole))


@given(ROWS)
def test_spread_puts_each_value_in_its_row_and_lets_gradients_back(rows):
    batch = collate(rows, 0, CPU)
    values = torch.arange(1.0, len(batch.targets) + 1, requires_grad=True)
    grid = batch.spread(values)
    assert grid.shape == (len(rows), batch.longest)
    for n, row in enumerate(rows):
        assert (grid[n, : len(row.completion)] > 0).all()
        assert (grid[n, len(row.completion) :] == 0).all()
    if len(values):
        (grid * 2).sum().backward()
        assert values.grad is not None
        assert (values.grad == 2).all()
