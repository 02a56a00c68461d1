"""Held-out accuracy of rewards on subsets of a user's pairs."""

from random import Random

import pytest
import torch

from persona_rlhf.data.pairs import Message, PreferencePair
from persona_rlhf.training.answer_features import scaled_features
from persona_rlhf.training.reward_basis import Prior, RewardBasis
from persona_rlhf.training.subset_accuracy import LabelledUser, TextReward, subset_accuracies

WORDS = ("river", "stone", "cloud", "lamp", "paper", "glass")


def pairs_of(n: int, split: str, taste: bool, seed: int) -> list[PreferencePair]:
    """Pairs of a user who prefers the longer answer, or whose labels are coin flips."""
    source = Random(f"{seed} {split}")
    rows = []
    for number in range(n):
        texts = [" ".join(source.choices(WORDS, k=source.randint(1, 12))) + "." for _ in range(2)]
        chosen, rejected = sorted(texts, key=len, reverse=True) if taste else texts
        prompt = (Message("user", f"{split} {number}"),)
        unset = (None, None, 1.0, split, None, "f.jsonl", number)
        rows.append(PreferencePair("ann", prompt, chosen, rejected, f"{number}", *unset))
    return rows


def user_of(taste: bool, seed: int = 0) -> LabelledUser:
    return LabelledUser("ann", pairs_of(40, "train", taste, seed), pairs_of(40, "heldout", taste, seed))


@pytest.fixture(scope="module")
def basis() -> RewardBasis:
    """One direction: the number of words."""
    features = scaled_features(["One.", "One and two."])
    directions = torch.zeros(len(features.scale), 1, dtype=torch.float64)
    directions[0] = 1
    return RewardBasis(features, directions, Prior(torch.zeros(1, dtype=torch.float64), 1.0))


@pytest.mark.parametrize("with_basis", [True, False])
def test_a_taste_is_learnt_from_more_pairs_and_coin_flips_are_not(basis, with_basis):
    used = basis if with_basis else None

    def means(taste: bool) -> dict[int, float]:
        totals: dict[int, list[float]] = {}
        for seed in range(3):
            user = user_of(taste, seed)
            for size, accuracies in subset_accuracies(TextReward.of(used, [user]), user).items():
                assert len(accuracies) == 40
                totals.setdefault(size, []).append(sum(accuracies) / 40)
        return {size: sum(values) / len(values) for size, values in totals.items()}

    clear, random = means(True), means(False)
    assert list(clear) == [0, 1, 2, 5, 10, 20, 40]
    assert (clear[0], random[0]) == (0.5, 0.5)
    assert clear[40] > 0.85
    assert clear[40] >= clear[5] - 0.02 > 0.55
    assert abs(random[40] - 0.5) < 0.12


def test_pairs_of_one_prompt_count_once(basis):
    user = user_of(True)
    alike = user._replace(heldout=[*user.heldout, *[user.heldout[0]] * 9])
    reward = TextReward.of(basis, [user])
    assert subset_accuracies(reward, alike) == subset_accuracies(reward, user)


def test_users_without_either_kind_of_pairs_have_no_curve(basis):
    user = user_of(True)
    reward = TextReward.of(basis, [user])
    assert subset_accuracies(reward, user._replace(train=[])) == {}
    assert subset_accuracies(reward, user._replace(heldout=[])) == {}
