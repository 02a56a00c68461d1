import pytest
import torch

from persona_rlhf.data.pairs import Message, PreferencePair
from persona_rlhf.data.tokenize import PairRow, Row, tokenize
from persona_rlhf.evaluation.metrics import (
    PairScores,
    Samples,
    clean_accuracy,
    distinct_prompts,
    heldout_accuracy,
    score_pairs,
    score_pairs_of_base,
    win_rate,
)
from persona_rlhf.models.scores import RowScore


def pair(user: str, n: int, chosen: str, rejected: str, clean: bool | None = None) -> PreferencePair:
    prompt = (Message("user", f"say {'abc'[n % 3]}"),)
    return PreferencePair(user, prompt, chosen, rejected, f"{user}{n}", None, None, 1.0, "heldout", clean, "f", n + 1)


def both(chosen: float, rejected: float, tokens: tuple[int, int] = (4, 4)) -> PairScores:
    return PairScores(RowScore(chosen, tokens[0]), RowScore(rejected, tokens[1]))


def rows(*clean: bool | None) -> list[PairRow]:
    return [PairRow(pair("u", n, "a", "b", c), Row((1,), (2,)), Row((1,), (3,))) for n, c in enumerate(clean)]


def test_accuracy_counts_positive_margins_and_half_of_ties():
    base = [both(-8, -8), both(-8, -4), both(-4, -8), both(-8, -10, (8, 4))]
    adapted = [both(-7, -9), both(-8, -4), both(-6, -8), both(-7, -12, (8, 4))]
    found = heldout_accuracy(base, adapted)
    assert found.adapted == pytest.approx(2.5 / 4)
    assert found.reference_free == pytest.approx((0.5 + 0 + 1 + 1) / 4)  # per token: the last is -1 against -2.5
    assert found.n == 4
    assert found.low < found.adapted < found.high
    assert heldout_accuracy([], []) is None


def test_noise_is_turned_round_and_unknown_labels_are_left_out():
    base = [both(0, 0)] * 4
    adapted = [both(1, 0), both(1, 0), both(0, 1), both(1, 0)]
    found = clean_accuracy(rows(True, False, False, None), base, adapted)
    assert found == (2 / 3, 3)  # right; the label was noise and the adapter learnt it; it saw through the noise
    assert clean_accuracy(rows(None), base[:1], adapted[:1]) is None


def test_shared_rows_are_scored_once_and_alike(adapted, adapters):
    pairs = [pair(user, n, "ab" * (n + 1), "cd.") for user in "xy" for n in range(3)]
    users = [user.heldout for user in tokenize(pairs, adapted.base.tokenizer, 256)]
    base = score_pairs_of_base(adapted, users)
    assert base[0] == base[1]
    with adapted.using(torch.zeros(2, adapted.params_per_user), None):
        for mine, other in zip(score_pairs(adapted, users), base, strict=True):
            assert [s.chosen.logp for s in mine] == pytest.approx([s.chosen.logp for s in other], abs=1e-4)
    with adapted.using(adapters[3:5], None):
        moved = score_pairs(adapted, users)
    assert abs(moved[1][0].chosen.logp - base[1][0].chosen.logp) > 0.01
    assert moved[0] != moved[1]


def test_win_rate_is_exact():
    length = {"a": 1, "aa": 2, "aaa": 3}
    found = win_rate(lambda text: length[text], ["aa", "aa", "a", "aaa"], ["a", "aa", "aa", "a"])
    assert found.value == 2.5 / 4
    assert found.n == 4
    assert win_rate(len, [], []) is None


def test_samples_do_not_depend_on_the_cohort_and_tie_where_nothing_changes(adapted, adapters):
    pairs = [pair(user, n, "ab", "cd") for user in "xyz" for n in range(5)]
    users = [user.heldout for user in tokenize(pairs, adapted.base.tokenizer, 256)]
    prompts = [distinct_prompts(own, 40) for own in users]
    assert [len(own) for own in prompts] == [3, 3, 3]
    chosen = adapters[[0, 2, 4]]
    together = Samples(adapted, 5, seed=3).compare(chosen, torch.ones(3), prompts)
    for n, own in enumerate(together):
        (alone,) = Samples(adapted, 5, seed=3).compare(chosen[n : n + 1], torch.ones(1), prompts[n : n + 1])
        assert (alone.adapted, alone.base) == (own.adapted, own.base)
        assert alone.perplexity == pytest.approx(own.perplexity, rel=1e-4)
    assert together[0].adapted == together[0].base
    assert together[0].perplexity.adapted == pytest.approx(together[0].perplexity.base, rel=1e-6)
    assert together[2].adapted != together[2].base
    assert together[2].perplexity.adapted > 1
    assert Samples(adapted, 5, seed=4).compare(chosen, torch.ones(3), prompts)[0].base != together[0].base


def test_no_prompts_no_samples(adapted, adapters):
    (found,) = Samples(adapted, 5, seed=0).compare(adapters[:1], torch.ones(1), [[]])
    assert found == ([], [], None)
