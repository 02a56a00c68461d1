from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.packing import EMPTY, DeterministicGather, collate, pack

CPU = torch.device("cpu")
IDS = st.lists(st.integers(2, 90), min_size=1, max_size=9).map(tuple)
PROMPTS = st.sampled_from([(5,), (5, 6), (5, 6, 7), (8, 9)])
ROWS = st.lists(st.one_of(st.just(EMPTY), st.builds(Row, PROMPTS, st.one_of(st.just(()), IDS))), min_size=1, max_size=6)
FLEETS = (
    st.integers(1, 3)
    .flatmap(
        lambda users: st.tuples(st.just(users), ROWS.map(lambda rows: (rows * users)[: len(rows) // users * users]))
    )
    .filter(lambda made: len(made[1]) > 0)
)


def _both(users, rows):
    return [collate(rows, 0, CPU), pack(rows, users, 0, CPU), pack(rows, users, 0, CPU, even=False)]


@given(FLEETS)
def test_every_completion_token_is_predicted_once_from_the_token_before_it(made):
    users, rows = made
    for batch in _both(users, rows):
        before = batch.source(batch.ids.flatten()[:, None].float()).flatten().long().tolist()
        expected = [(row, n) for row in rows for n in range(len(row.completion))]
        assert before == [(*row.prompt, *row.completion)[len(row.prompt) + n - 1] for row, n in expected]
        assert batch.targets.tolist() == [row.completion[n] for row, n in expected]
        grid = [(number, n) for number, row in enumerate(rows) for n in range(len(row.completion))]
        assert [divmod(place, batch.longest) for place in batch.place.tolist()] == grid


@given(FLEETS, st.booleans())
def test_attention_sees_each_row_whole_and_in_order(made, even):
    """Every token that asks sees the tokens of its row up to itself, at their positions, and nobody else's."""
    users, rows = made
    batch = pack(rows, users, 0, CPU, even)
    assert batch.sight is not None
    assert batch.positions is not None
    assert batch.ids.shape[0] == (users if even else 1)
    own = [(n // (len(rows) // users), row) for n, row in enumerate(rows) if row.completion]
    own += [(user, Row((0,), (0,))) for user in range(users) if user not in {owner for owner, _ in own}]
    wholes = {(user, (*prompt, *completion[:-1])) for user, (prompt, completion) in own}
    wanted = {(user, whole[: n + 1]) for user, whole in wholes for n in range(len(whole))}
    read = {(user, (*prompt, *completion[:n])) for user, (prompt, completion) in own for n in range(len(completion))}
    told = _told(batch, batch.sight)
    assert wanted <= {(user, ids) for user, ids, _ in told.values()}
    if batch.sight.last is not None:
        assert read <= {(user, ids) for user, ids, _ in _told(batch, batch.sight.last).values()}
    assert all(places == list(range(len(places))) for _, _, places in told.values())


def _told(batch, sight):
    """Of every token that gets a result of its own: whose it is, and which tokens at which positions it was made of."""
    marks = torch.arange(batch.ids.numel()).double()[:, None]
    asked, known = sight.queries(marks).flatten().long(), sight.keys(marks).flatten().long()
    ids, positions, owners = batch.ids.flatten(), batch.positions.flatten(), _owners(batch)
    made = []
    for lines, count, length, seen in sight.calls:
        queries, asked = asked[: lines * count].view(lines, count), asked[lines * count :]
        keys, known = known[: lines * length].view(lines, length), known[lines * length :]
        for line in range(lines):
            for n, query in enumerate(queries[line].tolist()):
                visible = keys[line, : n + 1] if seen is None else keys[line][seen[line, 0, n] == 0]
                made.append((query, visible))
    assert len(asked) == len(known) == 0
    home = {}
    results = sight.home(torch.arange(len(made)).double()[:, None]).flatten().long().tolist()
    for token, result in enumerate(results):
        query, visible = made[result]
        assert owners[token] == owners[query], "even padding takes what belongs to its user"
        assert (owners[visible] == owners[query]).all()
        if token == query:
            home[token] = (int(owners[token]), tuple(ids[visible].tolist()), positions[visible].tolist())
    return home


def _owners(batch):
    if batch.shares is None:
        return torch.arange(batch.ids.shape[0]).repeat_interleave(batch.ids.shape[1])
    return torch.arange(len(batch.shares)).repeat_interleave(torch.tensor(batch.shares))


@given(FLEETS)
def test_every_token_takes_its_result_home(made):
    """Every real token has a result of its own; where lines need not be even, they are as long as their users need."""
    users, rows = made
    each = len(rows) // users
    own = [[row for row in rows[user * each : (user + 1) * each] if row.completion] for user in range(users)]
    sizes = [sum(map(len, {row.prompt for row in mine})) + sum(len(row.completion) - 1 for row in mine) for mine in own]
    even, uneven = pack(rows, users, 0, CPU), pack(rows, users, 0, CPU, even=False)
    assert even.ids.shape == (users, max(1, *sizes))
    assert uneven.shares == [max(1, size) for size in sizes]
    for batch, starts in (
        (even, [n * even.ids.shape[1] for n in range(users)]),
        (uneven, [0, *accumulate(uneven.shares)]),
    ):
        told = _told(batch, batch.sight)
        assert {start + n for start, size in zip(starts, sizes, strict=False) for n in range(size)} <= set(told)


def test_a_shared_prompt_is_held_once_and_no_last_token_is_fed():
    prompt = tuple(range(2, 12))
    rows = [Row(prompt, (20, 21, 1)), Row(prompt, (30, 1)), Row(prompt, (40, 41, 42, 1)), EMPTY]
    assert pack(rows, 1, 0, CPU).ids.tolist() == [[*prompt, 20, 21, 30, 40, 41, 42]]
    assert pack(rows, 2, 0, CPU).ids.shape == (2, 13)
    assert collate(rows, 0, CPU).ids.shape == (4, 13)


@given(FLEETS)
def test_spread_puts_each_value_in_its_row_and_lets_gradients_back(made):
    users, rows = made
    for batch in _both(users, rows):
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


def test_a_lookups_gradient_is_that_of_plain_indexing():
    """Sources read once, twice and never; places that only fill send nothing back."""
    lookup = DeterministicGather(5, [(4, 9)], [(1, 0, 3, 0), (2, 4, 2, 1), (2, 6, 1, 2), (0, 8, 1, 0)], CPU)
    assert lookup.index.tolist() == [1, 2, 3, 4, 2, 3, 2, 4, 0]
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    sent = torch.randn(9, 2, dtype=torch.float64)
    sent[[3, 7]] = 0
    (lookup(x) * sent).sum().backward()
    mine, x.grad = x.grad, None
    (x[lookup.index] * sent).sum().backward()
    assert torch.allclose(mine, x.grad)
    sent[3] = float("nan")
    x.grad = None
    (lookup(x) * sent).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.autograd.gradcheck(lambda x: lookup(x)[[0, 1, 2, 4, 5, 6, 8]], (x.detach().requires_grad_(),))


def test_a_completion_needs_something_before_it():
    with pytest.raises(AssertionError, match="needs a prompt token"):
        pack([Row((), (5, 1))], 1, 0, CPU)
    with pytest.raises(AssertionError, match="needs a prompt token"):
        collate([Row((), (5, 1))], 0, CPU)


def test_a_gradient_goes_back_to_its_source_also_where_all_are_read_out_of_order():
    lookup = DeterministicGather(4, [(0, 4)], [(2, 0, 2, 0), (0, 2, 2, 0)], CPU)
    assert lookup.index.tolist() == [2, 3, 0, 1]
    x = torch.zeros(4, 2, requires_grad=True)
    (lookup(x) * torch.arange(8.0).view(4, 2)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[4, 5], [6, 7], [0, 1], [2, 3]]
