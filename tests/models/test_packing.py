from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.gather import DeterministicGather, GatherRun
from persona_rlhf.models.packing import EMPTY, collate, pack

CPU = torch.device("cpu")
IDS = st.lists(st.integers(2, 90), min_size=1, max_size=9).map(tuple)
PROMPTS = st.sampled_from([(5,), (5, 6), (5, 6, 7), (8, 9)])
TEMPLATE = tuple(range(40, 50))
"""The first tokens of every prompt, where there is a system prompt: long enough to be shared."""
ROWS = st.tuples(
    st.sampled_from([(), TEMPLATE]),
    st.lists(st.one_of(st.just(EMPTY), st.builds(Row, PROMPTS, st.one_of(st.just(()), IDS))), min_size=1, max_size=6),
).map(lambda made: [Row(made[0] + row.prompt, row.completion) if row.completion else row for row in made[1]])
FLEETS = (
    st.integers(1, 3)
    .flatmap(
        lambda users: st.tuples(st.just(users), ROWS.map(lambda rows: (rows * users)[: len(rows) // users * users]))
    )
    .filter(lambda made: len(made[1]) > 0)
)


def _both(users, rows):
    return [collate(rows, 0, CPU), pack(rows, users, 0, CPU), pack(rows, users, 0, CPU, equal_lines=False)]


@given(FLEETS)
def test_every_completion_token_is_predicted_once_from_the_token_before_it(made):
    users, rows = made
    for batch in _both(users, rows):
        before = batch.predictors(batch.input_ids.flatten()[:, None].float()).flatten().long().tolist()
        expected = [(row, n) for row in rows for n in range(len(row.completion))]
        assert before == [(*row.prompt, *row.completion)[len(row.prompt) + n - 1] for row, n in expected]
        assert batch.targets.tolist() == [row.completion[n] for row, n in expected]
        grid = [(number, n) for number, row in enumerate(rows) for n in range(len(row.completion))]
        assert [divmod(place, batch.longest) for place in batch.grid_index.tolist()] == grid


@given(FLEETS, st.booleans())
def test_attention_sees_each_row_whole_and_in_order(made, even):
    """Every token that asks sees the tokens of its row up to itself, at their positions, and nobody else's."""
    users, rows = made
    batch = pack(rows, users, 0, CPU, even)
    assert batch.layout is not None
    assert batch.position_ids is not None
    assert batch.input_ids.shape[0] == (users if even else 1)
    fed_rows = [(n // (len(rows) // users), row) for n, row in enumerate(rows) if row.completion]
    fed_rows += [(user, Row((0,), (0,))) for user in range(users) if user not in {owner for owner, _ in fed_rows}]
    wholes = {(user, (*prompt, *completion[:-1])) for user, (prompt, completion) in fed_rows}
    wanted = {(user, whole[: n + 1]) for user, whole in wholes for n in range(len(whole))}
    outputs = _outputs(batch, batch.layout)
    assert wanted <= {(user, ids) for user, ids, _ in outputs.values()}
    assert all(places == list(range(len(places))) for _, _, places in outputs.values())


def _outputs(batch, layout):
    """Of every token with an output: its user, and the tokens and positions that it attends to."""
    marks = torch.arange(batch.input_ids.numel()).double()[:, None]
    query_tokens, key_tokens = layout.queries(marks).flatten().long(), layout.keys(marks).flatten().long()
    ids, positions, owners = batch.input_ids.flatten(), batch.position_ids.flatten(), _owners(batch)
    attended = []
    for lines, count, length, mask in layout.calls:
        queries, query_tokens = query_tokens[: lines * count].view(lines, count), query_tokens[lines * count :]
        keys, key_tokens = key_tokens[: lines * length].view(lines, length), key_tokens[lines * length :]
        for line in range(lines):
            for n, query in enumerate(queries[line].tolist()):
                visible = keys[line, : n + 1] if mask is None else keys[line][mask[line, 0, n] == 0]
                attended.append((query, visible))
    assert len(query_tokens) == len(key_tokens) == 0
    outputs = {}
    results = layout.outputs(torch.arange(len(attended)).double()[:, None]).flatten().long().tolist()
    for token, result in enumerate(results):
        query, visible = attended[result]
        assert owners[token] == owners[query], "even padding takes what belongs to its user"
        assert (owners[visible] == owners[query]).all()
        if token == query:
            outputs[token] = (int(owners[token]), tuple(ids[visible].tolist()), positions[visible].tolist())
    return outputs


def _owners(batch):
    if batch.tokens_per_user is None:
        return torch.arange(batch.input_ids.shape[0]).repeat_interleave(batch.input_ids.shape[1])
    return torch.arange(len(batch.tokens_per_user)).repeat_interleave(torch.tensor(batch.tokens_per_user))


@given(FLEETS)
def test_every_token_takes_its_result_home(made):
    """Every real token has a result of its own; where lines need not be even, they are as long as their users need."""
    users, rows = made
    each = len(rows) // users
    user_rows = [[row for row in rows[user * each : (user + 1) * each] if row.completion] for user in range(users)]
    sizes = [
        sum(map(len, {row.prompt for row in rows_of_user})) + sum(len(row.completion) - 1 for row in rows_of_user)
        for rows_of_user in user_rows
    ]
    even, uneven = pack(rows, users, 0, CPU), pack(rows, users, 0, CPU, equal_lines=False)
    assert even.input_ids.shape == (users, max(1, *sizes))
    assert uneven.tokens_per_user == [max(1, size) for size in sizes]
    for batch, starts in (
        (even, [n * even.input_ids.shape[1] for n in range(users)]),
        (uneven, [0, *accumulate(uneven.tokens_per_user)]),
    ):
        outputs = _outputs(batch, batch.layout)
        assert {start + n for start, size in zip(starts, sizes, strict=False) for n in range(size)} <= set(outputs)


def test_a_shared_prompt_is_held_once_and_no_last_token_is_fed():
    prompt = tuple(range(2, 12))
    rows = [Row(prompt, (20, 21, 1)), Row(prompt, (30, 1)), Row(prompt, (40, 41, 42, 1)), EMPTY]
    assert pack(rows, 1, 0, CPU).input_ids.tolist() == [[*prompt, 20, 21, 30, 40, 41, 42]]
    assert pack(rows, 2, 0, CPU).input_ids.shape == (2, 13)
    assert collate(rows, 0, CPU).input_ids.shape == (4, 13)


@given(FLEETS)
def test_spread_puts_each_value_in_its_row_and_lets_gradients_back(made):
    users, rows = made
    for batch in _both(users, rows):
        values = torch.arange(1.0, len(batch.targets) + 1, requires_grad=True)
        grid = batch.to_grid(values)
        assert grid.shape == (len(rows), batch.longest)
        for n, row in enumerate(rows):
            assert (grid[n, : len(row.completion)] > 0).all()
            assert (grid[n, len(row.completion) :] == 0).all()
        if len(values):
            (grid * 2).sum().backward()
            assert values.grad is not None
            assert (values.grad == 2).all()


def test_a_gathers_gradient_is_that_of_plain_indexing():
    """Sources read once, twice and never; places that only fill send nothing back."""
    gather = DeterministicGather.of(
        5, [(4, 9)], [GatherRun(1, 0, 3, 0), GatherRun(2, 4, 2, 1), GatherRun(2, 6, 1, 2), GatherRun(0, 8, 1, 0)]
    )
    assert gather.read.tolist() == [1, 2, 3, 4, 2, 3, 2, 4, 0]
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    sent = torch.randn(9, 2, dtype=torch.float64)
    sent[[3, 7]] = 0
    (gather(x) * sent).sum().backward()
    mine, x.grad = x.grad, None
    (x[gather.read] * sent).sum().backward()
    assert torch.allclose(mine, x.grad)
    sent[3] = float("nan")
    x.grad = None
    (gather(x) * sent).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.autograd.gradcheck(lambda x: gather(x)[[0, 1, 2, 4, 5, 6, 8]], (x.detach().requires_grad_(),))


def test_a_completion_needs_something_before_it():
    with pytest.raises(AssertionError, match="needs a prompt token"):
        pack([Row((), (5, 1))], 1, 0, CPU)
    with pytest.raises(AssertionError, match="needs a prompt token"):
        collate([Row((), (5, 1))], 0, CPU)


def test_a_gradient_goes_back_to_its_source_also_where_all_are_read_out_of_order():
    gather = DeterministicGather.of(4, [(0, 4)], [GatherRun(2, 0, 2, 0), GatherRun(0, 2, 2, 0)])
    assert gather.read.tolist() == [2, 3, 0, 1]
    x = torch.zeros(4, 2, requires_grad=True)
    (gather(x) * torch.arange(8.0).view(4, 2)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[4, 5], [6, 7], [0, 1], [2, 3]]


def test_the_first_tokens_of_all_prompts_are_computed_once():
    rows = [Row((*TEMPLATE, 5, 6), (7, 8)), Row((*TEMPLATE, 5, 6), (9, 9, 9)), Row((*TEMPLATE, 8), (3,))]
    batch = pack([*rows, *rows], 2, 0, CPU, equal_lines=False)
    assert batch.tokens_per_user == [len(TEMPLATE) + 2 + 1 + 2 + 1] * 2
    assert [place.prefix.length for place in batch.row_places] == [len(TEMPLATE)] * 6
    short = [Row((2, 3, 5, 6), (7, 8)), Row((2, 3, 8), (3,))]
    assert [place.prefix.length for place in pack(short, 1, 0, CPU).row_places] == [0, 0]
    inside = [Row((*TEMPLATE, 5), (7, 8)), Row(TEMPLATE, (3,))]  # a prompt's last token predicts
    assert [place.prefix.length for place in pack(inside, 1, 0, CPU).row_places] == [len(TEMPLATE) - 1] * 2
