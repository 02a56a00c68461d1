"""Labels that a user's posterior gives to pairs of the base's answers."""

from dataclasses import replace

import pytest
import torch

from persona_rlhf.data.pairs import Message, PreferencePair
from persona_rlhf.data.tokenize import PairRow, Row, UserRows
from persona_rlhf.training.answer_features import scaled_features
from persona_rlhf.training.labelled_pairs import answer_pool, differences_of, with_labels
from persona_rlhf.training.reward_basis import LARGEST_DIFFERENCE, Prior, RewardBasis

ANSWERS = ("Yes.", "Yes, by all means do it now.", "Yes, do it.")  # one, six and three words


def row(user: str, prompt: str, chosen: str, rejected: str, split: str = "train") -> PairRow:
    pair = PreferencePair(
        user, (Message("user", prompt),), chosen, rejected, prompt, None, None, 1.0, split, None, "f.jsonl", 1
    )
    return PairRow(pair, *(Row((1,), (*map(ord, text), 0)) for text in (chosen, rejected)))


@pytest.fixture(scope="module")
def basis() -> RewardBasis:
    """One direction: the number of words. Nobody leans either way without a pair."""
    features = scaled_features(ANSWERS)
    directions = torch.zeros(len(features.scale), 1, dtype=torch.float64)
    directions[0] = 1
    return RewardBasis(features, directions, Prior(torch.zeros(1, dtype=torch.float64), 1.0), "", "0" * 64)


@pytest.fixture(scope="module")
def pool(basis):
    both = [(0, 1), (0, 2), (1, 2)]
    return answer_pool(basis, [row("", f"prompt {n}", ANSWERS[a], ANSWERS[b]) for n in range(3) for a, b in both], 160)


def user(pairs: int, longer: bool, heldout: bool = False) -> UserRows:
    long, short = "one two three four", "one"
    answers = (long, short) if longer else (short, long)
    held = [row("ann", "held", *reversed(answers), "heldout")] * 50 if heldout else []
    return UserRows("ann", [row("ann", f"own {n}", *answers) for n in range(pairs)], held, held)


@pytest.mark.parametrize("longer", [True, False])
def test_the_answers_furthest_apart_are_labelled_as_the_user_chose(basis, pool, longer):
    labelled, use = with_labels(user(12, longer), basis, pool)
    assert [pair.pair.prompt[0].content for pair in labelled.labelled] == ["prompt 0", "prompt 1", "prompt 2"]
    wanted = (ANSWERS[1], ANSWERS[0]) if longer else (ANSWERS[0], ANSWERS[1])
    for pair in labelled.labelled:
        assert (pair.pair.chosen, pair.pair.rejected) == wanted
        assert [bytes(one.completion[:-1]).decode() for one in (pair.chosen, pair.rejected)] == list(wanted)
        assert 0.8 < pair.probability < 1
    assert labelled.train == user(12, longer).train
    assert (use.sha256, use.pairs, use.labelled) == ("0" * 64, 12, 3)
    assert 0.2 < use.gain <= 0.5


def test_the_prompts_whose_answers_are_furthest_apart_are_labelled(basis):
    """Five words lie between the first two answers, three and two between the others; equal ones keep their order."""
    between = [(0, 2), (0, 1), (1, 2), (0, 1)]
    rows = [row("", f"prompt {n}", ANSWERS[a], ANSWERS[b]) for n, (a, b) in enumerate(between)]
    for most, prompts in ((1, "1"), (2, "13"), (3, "123"), (9, "0123")):
        labelled, use = with_labels(user(12, True), basis, answer_pool(basis, rows, most))
        assert "".join(pair.pair.prompt[0].content[-1] for pair in labelled.labelled) == prompts
        assert use.labelled == len(prompts)


def test_fewer_pairs_give_weaker_labels(basis, pool):
    strengths = [with_labels(user(pairs, True), basis, pool)[0].labelled[0].probability for pairs in (1, 3, 12)]
    assert 0.5 < strengths[0] < strengths[1] < strengths[2]


def test_a_tie_is_one_preference_each_way(basis, pool):
    plain = user(3, True)
    tie = plain.train[0]._replace(probability=0.5)
    turned = PairRow(replace(tie.pair, chosen=tie.pair.rejected, rejected=tie.pair.chosen), tie.rejected, tie.chosen)
    tied, use = with_labels(plain._replace(ties=[tie]), basis, pool)
    both, _ = with_labels(plain._replace(train=[*plain.train, tie, turned]), basis, pool)
    expected = [one.probability for one in both.labelled]
    assert [one.probability for one in tied.labelled] == pytest.approx(expected, abs=1e-12)
    assert all(
        0.5 < one < other.probability
        for one, other in zip(expected, with_labels(plain, basis, pool)[0].labelled, strict=True)
    )
    assert (use.pairs, tied.taught[:4]) == (4, [*plain.train, tie])


def test_one_pair_of_endless_answers_does_not_outweigh_the_others(basis, pool):
    endless = user(12, True)
    endless.train.append(row("ann", "endless", "one", "word " * 100_000))
    assert differences_of(basis, endless.train).abs().max() <= LARGEST_DIFFERENCE
    labelled = with_labels(endless, basis, pool)[0].labelled
    assert all(pair.probability < 0.9 for pair in labelled)


def test_held_out_pairs_and_deciding_pairs_change_no_label(basis, pool):
    with_held, without = (with_labels(user(3, True, held), basis, pool) for held in (True, False))
    assert with_held[0].labelled == without[0].labelled
    assert with_held[1] == without[1]


def test_labelled_pairs_hold_answers_of_the_base_alone(basis, pool):
    labelled, _ = with_labels(user(3, True), basis, pool)
    given = {(pair.pair.prompt, frozenset((pair.pair.chosen, pair.pair.rejected))) for pair in pool.rows}
    assert {(p.pair.prompt, frozenset((p.pair.chosen, p.pair.rejected))) for p in labelled.labelled} <= given
    assert {pair.pair.user_id for pair in labelled.labelled} == {""}


def test_the_gain_is_over_the_prior(basis, pool):
    leaning = replace(basis, prior=Prior(torch.full((1,), 2.0, dtype=torch.float64), 1.0))
    assert with_labels(user(12, True), leaning, pool)[1].gain == 0
    assert with_labels(user(12, False), leaning, pool)[1].gain > 0.2
