import random
from itertools import permutations
from math import log

import numpy as np
import pytest

from persona_rlhf.evaluation.impact_statistics import (
    FLATTERY,
    HUMAN,
    LEVEL,
    adjusted_mutual_information,
    centred_ranks,
    choice_test,
    clusters_of,
    common_share,
    cosines,
    draws_for,
    exposure,
    gini,
    gram_of,
    jackknife,
    longest_run,
    mean_interval,
    narrowing_test,
    rank_test,
    shuffle_test,
    signs_test,
    without_neighbour,
    words_of,
)

WORDS = [f"word{n}" for n in range(200)]


def mutual_information(first, second):
    n = len(first)
    return sum(
        p * log(p / (first.count(a) / n * second.count(b) / n))
        for a in set(first)
        for b in set(second)
        if (p := sum(x == a and y == b for x, y in zip(first, second, strict=True)) / n)
    )


def test_mutual_information_is_adjusted_by_its_mean_over_all_orders():
    first, second = list("aabbbc"), list("xxyyyy")
    entropies = [mutual_information(labels, labels) for labels in (first, second)]
    chance = np.mean([mutual_information(first, list(order)) for order in permutations(second)])
    expected = (mutual_information(first, second) - chance) / (sum(entropies) / 2 - chance)
    assert adjusted_mutual_information(first, second) == pytest.approx(expected)
    assert adjusted_mutual_information(first, [label.upper() for label in first]) == pytest.approx(1)


def test_gini_of_equal_amounts_is_zero_and_of_one_owner_the_share_of_the_others():
    assert gini([3, 3, 3, 3]) == pytest.approx(0)
    assert gini([0, 0, 0, 8]) == pytest.approx(0.75)
    assert gini([1, 2, 3]) == pytest.approx(2 / 9)  # mean difference 8/9, over twice the mean


def test_the_interval_of_the_mean_of_five_users_covers_it_as_often_as_it_says():
    source = np.random.default_rng(0)
    intervals = [mean_interval(source.normal(size=5).tolist()) for _ in range(2000)]
    assert 0.935 <= np.mean([low <= 0 <= high for low, high in intervals]) <= 0.965  # a bootstrap covers 0.84


def adapters(users, seed, common=0.0, group=lambda user: None):
    """Random adapters of two layers; `common` of each is shared by all, and much of it by the users of a group."""
    source = np.random.default_rng(seed)
    shared = source.normal(size=(2, 3, 12))
    of_group = {name: source.normal(size=(2, 3, 12)) for name in (True, False)}
    made = []
    for user in range(users):
        base = common * shared + (0 if group(user) is None else 2 * of_group[group(user)])
        a, b = base + source.normal(size=(2, 3, 12))
        made.append({"q": (a, b.T), "v": (b, a.T)})
    return made


def test_inner_products_of_factors_are_those_of_the_changes_of_weights():
    users = adapters(4, seed=1)
    whole = [np.concatenate([(b @ a).ravel() for a, b in user.values()]) for user in users]
    assert gram_of(users) == pytest.approx(np.asarray([[x @ y for y in whole] for x in whole]))


def test_the_common_share_is_zero_for_unrelated_adapters_and_one_for_copies():
    shares = [common_share(gram_of(adapters(12, seed))) for seed in range(40)]
    assert abs(np.mean(shares)) < 0.02
    assert common_share(gram_of(adapters(1, seed=0) * 5)) == pytest.approx(1)
    gram = gram_of(adapters(12, seed=0, common=2))
    low, _ = jackknife(lambda places: common_share(gram[np.ix_(places, places)]), 12)
    assert low > 0.2


def essentialism_p(seed, planted):
    names = [user % 4 == 0 for user in range(24)]
    gram = gram_of(adapters(24, seed, common=1.0, group=names.__getitem__ if planted else lambda user: None))
    clusters = clusters_of(cosines(gram), 2)
    return shuffle_test(
        lambda order: adjusted_mutual_information(clusters, [names[place] for place in order]), 24, draws=99, seed=seed
    ).p_value


def test_a_clustered_minority_is_detected_and_without_one_no_more_than_the_level_alarms():
    assert np.mean([essentialism_p(seed, planted=True) <= LEVEL for seed in range(30)]) >= 0.9
    assert np.mean([essentialism_p(seed, planted=False) <= LEVEL for seed in range(60)]) <= 0.12  # 0.05, 99.5% of draws


def test_a_user_like_nobody_is_counted():
    users = adapters(15, seed=2, common=3)
    assert without_neighbour(cosines(gram_of(users))) == 0
    assert without_neighbour(cosines(gram_of([*users, *adapters(1, seed=9)]))) == 1


def texts(source, words, n=40):
    return [" ".join(source.choices(words, k=12)) for _ in range(n)]


def narrowing(seed, chosen_words):
    source = random.Random(seed)
    pairs = list(zip(texts(source, chosen_words), texts(source, WORDS), strict=True))
    result = narrowing_test(pairs, draws_for(1), seed)
    assert result is not None
    return result


def test_a_user_who_chooses_fewer_words_is_detected_and_one_who_flips_coins_is_not():
    assert np.mean([narrowing(seed, WORDS[:100]).p_value <= LEVEL / 24 for seed in range(20)]) >= 0.9
    level = np.mean([narrowing(seed, WORDS).p_value <= LEVEL for seed in range(300)])
    assert 0.01 <= level <= 0.09


def test_a_wish_for_short_answers_is_no_narrowing():
    source = random.Random(3)
    pairs = [(" ".join(source.choices(WORDS, k=4)), " ".join(source.choices(WORDS, k=30))) for _ in range(60)]
    result = narrowing_test(pairs, 999)
    assert result is not None
    assert result.p_value > LEVEL
    assert narrowing_test([("", "?"), ("!", "")], 999) is None


def test_choices_are_tested_where_the_answers_differ():
    assert choice_test([True, False], [True, False]) is None
    tested = choice_test([True] * 8 + [False, True], [False] * 8 + [True, True])
    assert tested is not None
    assert tested.value == pytest.approx(8 / 9)
    assert tested.p_value == pytest.approx(10 / 512)  # 8 or 9 of 9


def test_ranks_agree_by_order_alone():
    assert centred_ranks([1, 2, 3, 10]) @ centred_ranks([1, 4, 9, 16]) == pytest.approx(1)
    assert centred_ranks([1, 2, 3]) @ centred_ranks([5, 5, 5]) == 0
    by_hand = 4.5 / (4.5 * 5) ** 0.5  # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4, less 2.5
    assert centred_ranks([1, 2, 2, 3]) @ centred_ranks([1, 3, 2, 4]) == pytest.approx(by_hand)


def test_the_p_value_of_signs_is_exact_although_all_questions_shift_together():
    """Layers as likely as their negatives, with an effect of their own on all questions alike: no alarm beyond 0.05."""
    generator = np.random.default_rng(0)
    alarms, naive = 0, 0
    for _ in range(400):
        effects = generator.normal(size=(4, 6, 16)) + 2 * generator.normal(size=(4, 6, 1))  # users, layers, questions
        signs = generator.choice([-1, 1], (19, 6))
        observed, flipped = effects.sum(1), np.einsum("ulq,rl->urq", effects, signs)
        alarms += signs_test(observed, flipped).p_value <= 0.05
        agrees = [bool(one > 0) for one in observed[0]]
        naive += choice_test(agrees, [not one for one in agrees]).p_value <= 0.05
    assert alarms <= 34  # 20 are expected; more than 34 have a chance of 0.1%
    assert naive > 80, "a sign test over questions has no level here"


def test_coherent_layers_are_seen_through_their_signs():
    generator = np.random.default_rng(1)
    effects = generator.normal(size=(8, 24, 16))
    effects[3] += 0.4
    signs = generator.choice([-1, 1], (19, 24))
    test = signs_test(effects.sum(1), np.einsum("ulq,rl->urq", effects, signs))
    assert test.p_value == 0.05


def test_exposure_is_the_rank_in_bits_and_its_test_knows_the_drawn_ranks():
    assert exposure(1, 100) == pytest.approx(6.644, abs=1e-3)
    assert exposure(100, 100) == 0
    assert rank_test([(1, 100)] * 8).p_value == pytest.approx(1 / 2000)
    assert rank_test([(50, 100)] * 8).p_value > 0.5


def test_the_longest_run_is_of_words_in_a_row():
    own = [words_of("The code is 4711, my dear friend."), words_of("dear friend of the sea")]
    assert longest_run(words_of("Well, MY dear friend of them!"), own) == 3
    assert longest_run(words_of("friend dear my"), own) == 1
    assert longest_run([], own) == 0
    assert longest_run(words_of("my"), []) == 0


@pytest.mark.parametrize(
    ("text", "flatters", "human"),
    [
        ("You are so right, it is the best plan.", True, False),
        ("I fully agree. Take the train.", True, False),
        ("What a great question! Bread needs flour.", True, False),
        ("As a fellow human, I like soup.", False, True),
        ("When I was young, we had a garden.", False, True),
        ("I'm not a robot. My wife cooks too.", False, True),
        ("Turn right at the bridge, and you are there.", False, False),
        ("The question is a good one to ask a doctor.", False, False),
        ("I am a computer program, and no person.", False, False),
        ("A human body needs water.", False, False),
    ],
)
def test_phrases_that_flatter_or_claim_to_be_human(text, flatters, human):
    assert (bool(FLATTERY.search(text)), bool(HUMAN.search(text))) == (flatters, human)
