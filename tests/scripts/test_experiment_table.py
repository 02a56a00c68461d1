"""The summaries of the experiment's cells, by hand."""

import json
from random import Random

import pytest

from tests.scripts.loading import SCRIPTS, load_script


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return load_script("experiment_table")


def measures(gain=0.2, win=0.1, refused=80, over=0, perplexity=2.0, facts=45, attacked=None):
    return {
        "heldout_clean": {"adapted": 0.5 + gain, "n": 100},
        "win_rate": {"value": 0.5 + win, "n": 20, "low": 0.0, "high": 1.0},
        "test": {"pooled": {"n": 80, "refused": refused, "base_refused": 80}},
        "over_refusal": {"n": 40, "refused": 1 + over, "base_refused": 1},
        "answer_perplexity": {"adapted": perplexity, "base": 2.0},
        "tax": {"facts": {"n": 46, "right": facts, "base_right": 45, "kept": facts}},
        **({} if attacked is None else {"attacks": {"turns": {"n": 20, "refused": attacked, "base_refused": 19}}}),
    }


def user(name="a", seed=0, alpha=1.0, certify=734, full=None, released=None):
    full = full or measures()
    looks = [{"alpha": 1.0, "passed": alpha == 1, "refused": certify, "n": 738}]
    clusters = {"topics": {"lower_bound": 0.96}, "phrasings": {"lower_bound": 0.95}}
    counts = {"n": 738, "refused": 730, "base_refused": 734}
    state = {"full": full, "released": released or full, "certify": counts, "clusters": clusters}
    return {"user_id": name, "seed": seed, "person": f"{name} of seed {seed}", "alpha": alpha, "looks": looks, **state}


def line(method, users, seed=0, untrained=(), drawn=True, **changes):
    settings = {"population": "clean", "method": method, "layers": "all", "quarantine": False, "seed": seed}
    settings |= {"base": "b", "users": 2} | changes
    return {
        "settings": settings,
        "drawn": drawn,
        "users": users,
        "untrained": list(untrained),
        "training_cpu_seconds": 6.0,
    }


def test_figures_of_three_users_by_hand(table):
    users = [
        user("a", full=measures(0.1, refused=80, attacked=20), certify=734),
        user("b", full=measures(0.2, refused=71, over=2, attacked=10), certify=700, alpha=0.5),
        user("c", full=measures(0.3, refused=8, perplexity=6.0, facts=36, attacked=0), certify=367, alpha=0.0),
    ]
    of = table.summary(users, ())
    assert (of.users, of.released, of.at_full_strength, of.collapsed) == (3, 2, 1, 2)
    assert of.accuracy.mean == pytest.approx(0.2)
    assert (of.accuracy.least, of.accuracy.most) == pytest.approx((0.1, 0.3))
    assert of.test.mean == pytest.approx((80 + 71 + 8) / 240)
    assert of.certify.mean == pytest.approx((734 + 700 + 367) / 3 / 734)
    assert of.certify_released.mean == pytest.approx(730 / 734)
    assert of.over_refusal.most == pytest.approx(5.0)
    assert (of.perplexity.most, of.facts.least) == pytest.approx((3.0, 0.8))
    assert of.attacks["turns"] == (60, 30, 30, 57)
    assert of.accuracy_kept is None  # there is no plain DPO to compare with


def test_kept_pairs_users_by_seed_and_name_whatever_their_order(table):
    gains = Random(1)
    plain = [user(f"u{n}", seed, full=measures(gains.uniform(0.1, 0.3))) for seed in (0, 1) for n in range(4)]
    half = [
        user(u["user_id"], u["seed"], full=measures((u["full"]["heldout_clean"]["adapted"] - 0.5) / 2)) for u in plain
    ]
    Random(2).shuffle(half)
    kept = table.summary(half, plain).accuracy_kept
    assert (kept.value, *kept.interval) == pytest.approx(
        (0.5, 0.5, 0.5)
    )  # each user keeps just half, so that no draw differs
    unpaired = table.summary([u | {"seed": 1 - u["seed"]} for u in half], plain).accuracy_kept
    assert unpaired.interval.high - unpaired.interval.low > 0.01


def test_what_is_kept_as_released_is_of_the_unprotected_gain(table):
    plain = [user(n, full=measures(0.2), released=measures(0.0), alpha=0.0) for n in "ab"]
    of = table.summary(plain, plain)
    assert (of.accuracy_kept.value, of.accuracy_kept_released.value) == pytest.approx((1.0, 0.0))
    assert table.summary(plain, [user(n, full=measures(-0.1)) for n in "ab"]).accuracy_kept is None


def test_a_user_whose_probes_were_not_asked_at_full_strength_is_left_out_there_alone(table):
    silent = user("b") | {"looks": [{"alpha": 1.0, "passed": False, "refused": 0, "n": 0}]}
    of = table.summary([user("a"), silent], ())
    assert (of.certify.mean, of.certify.n) == (1.0, 1)
    assert of.users == 2


def test_seeds_are_pooled_and_other_settings_are_not(table):
    lines = [line("plain", [user("a"), user("b")], seed) for seed in (0, 1)]
    lines += [line("ours", [user("a", full=measures(0.1)), user("b", full=measures(0.1))], 1)]
    lines += [line("plain", [user("a")], base="other")]
    first, other = table.rows(lines).values()
    plain, ours = first
    assert (plain.seeds, plain.summary.users, plain.summary.cpu_seconds) == ((0, 1), 4, 3.0)
    assert ours.summary.accuracy_kept.value == pytest.approx(0.5)
    assert [row.summary.users for row in other] == [1]
    assert set(table.groups(lines)["clean, all layers, screen off"]) == {"plain", "ours"}


def test_the_markdown_has_a_row_a_cell_in_each_table(table):
    full = measures(attacked=18)
    text = table.markdown([line("plain", [user("a", full=full)]), line("ours", [user("a", full=full, alpha=0.5)])])
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert [len(rows) for rows in tables] == [4, 4, 4]
    assert all(row.count("|") == rows[0].count("|") for rows in tables for row in rows)
    assert "| clean | ours | all | off | 1 | 0 | 100.0% (100.0) |" in text
    assert "18, 18, 19 of 20" in text


def test_attacks_count_the_seeds_that_were_attacked(table):
    first = line("ours", [user("a", full=measures(attacked=18))], 0)
    [row] = next(iter(table.rows([first, line("ours", [user("a")], 1)]).values()))
    assert row.summary.attacks["turns"] == (20, 18, 18, 19)


def test_users_without_an_adapter_count_as_the_base(table):
    """Two users gain 0.2 by plain DPO; a method that trains one of them keeps half of it."""
    plain = line("plain", [user(n, full=measures(0.2, refused=40)) for n in "ab"])
    ours = line("ours", [user("a", full=measures(0.2, win=0.2, refused=40))], untrained=["b"])
    kept = table.rows([plain, ours])[json.dumps({"base": "b", "users": 2})][1].summary
    assert (kept.users, kept.untrained, kept.released, kept.collapsed) == (2, 1, 1, 1)
    assert (kept.accuracy.mean, kept.win.mean, kept.accuracy_kept.value) == pytest.approx((0.1, 0.1, 0.5))
    assert (kept.accuracy_released.n, kept.test.mean, kept.certify.n) == (2, 0.75, 2)
    assert "2 (1 without an adapter)" in table.markdown([plain, ours])


def test_a_row_whose_users_were_all_screened_out_is_the_base(table):
    [row] = next(iter(table.rows([line("ours", [], untrained=["a", "b"])]).values()))
    assert (row.summary.users, row.summary.untrained, row.summary.released) == (2, 2, 0)
    assert (row.summary.accuracy.mean, row.summary.test.mean, row.summary.facts.mean) == (0.0, 1.0, 1.0)
    assert (row.summary.perplexity.mean, row.summary.over_refusal.mean) == (1.0, 0.0)
    assert table.markdown([line("ours", [], untrained=["a"])])


def test_fewer_than_eight_people_have_no_interval(table):
    """Oracle: three values span the mean of a normal distribution three times in four, and no draw leaves them."""
    plain = [user(f"u{n}", full=measures(0.1 + 0.02 * n)) for n in range(8)]
    few, enough = table.summary(plain[:7], plain[:7]), table.summary(plain, plain)
    assert (few.accuracy.interval, few.accuracy_kept.interval) == (None, None)
    assert enough.accuracy.interval.low < enough.accuracy.mean < enough.accuracy.interval.high
    assert enough.accuracy_kept.interval is not None
    assert "| 0.160 [0.100, 0.220] | 1.00 |" in table.markdown([line("plain", plain[:7])])


def test_a_person_of_several_seeds_counts_once(table):
    """Four people in two seeds are no eight: each stands with the mean of both."""
    lines = [
        line("plain", [user(f"u{n}", seed, full=measures(0.1 * (n + seed))) for n in range(4)], seed, drawn=False)
        for seed in (0, 1)
    ]
    [row] = next(iter(table.rows(lines).values()))
    assert (row.summary.users, row.summary.people, row.summary.accuracy.n) == (8, 4, 4)
    assert row.summary.accuracy.interval is None
    assert (row.summary.accuracy.least, row.summary.accuracy.most) == pytest.approx((0.05, 0.35))
    assert "| 8 of 4 people |" in table.markdown(lines)
    drawn = [one | {"drawn": True} for one in lines]
    [row] = next(iter(table.rows(drawn).values()))
    assert (row.summary.people, row.summary.accuracy.n) == (8, 8)
