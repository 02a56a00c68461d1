"""The data-need curve over users, and the pairs needed for a share of its gain."""

import pytest

from persona_rlhf.evaluation.data_curve import CurvePoint, UserCurve, data_need, over_users


def curve_of(name, **accuracies):
    points = [CurvePoint(int(size[1:]), value, 0.0, 1.0, 20) for size, value in accuracies.items()]
    return UserCurve(name, name, points[-1].pairs, points)


def test_the_mean_is_over_the_users_who_have_so_many_pairs():
    curves = [curve_of("a", n0=0.5, n1=0.6, n3=0.9), curve_of("b", n0=0.5, n1=0.8)]
    points = over_users(curves)
    assert [(point.pairs, round(point.accuracy, 9), point.n) for point in points] == [(0, 0.5, 2), (1, 0.7, 2)]
    assert (points[1].low, points[1].high) == (None, None), "two users have no interval"


def test_the_interval_of_a_mean_needs_eight_users():
    for users, given in ((7, False), (8, True)):
        curves = [curve_of(str(n), n0=0.5, n1=0.6 + n / 100) for n in range(users)]
        [_, point], need = over_users(curves), data_need(curves)
        assert need is not None
        assert (point.low is not None, need.low is not None, need.high is not None) == (given, given, given)
        assert ("too few users for an interval" in need.sentence()) != given


def test_the_need_lies_between_the_points_by_the_logarithm():
    curves = [curve_of(name, n0=0.5, n1=0.6, n3=0.7, n15=0.9) for name in "abcdefgh"]
    need = data_need(curves)
    assert need is not None
    assert (
        need.pairs == 9
    )  # accuracy 0.82 lies 0.6 of the way from 1 + 3 to 1 + 15: 4 * 4 ** 0.6 - 1 = 8.19, rounded up
    assert (need.low, need.high, need.of, need.users) == (need.pairs, need.pairs, 15, 8)


def test_users_without_the_largest_number_of_pairs_take_no_part():
    curves = [curve_of("a", n0=0.5, n7=0.9), curve_of("b", n0=0.5, n7=0.9), curve_of("c", n0=0.5, n1=0.1)]
    need = data_need(curves)
    assert need is not None
    assert (need.users, need.of) == (2, 7)
    assert data_need(curves[:1]) is None


@pytest.mark.parametrize("last", [0.5, 0.45])
def test_labels_without_a_gain_need_no_number_of_pairs(last):
    need = data_need([curve_of(name, n0=0.5, n1=0.6, n7=last) for name in "ab"])
    assert need is not None
    assert need.pairs is None
    assert "no gain" in need.sentence()


def test_a_gain_that_hangs_on_one_user_is_none():
    curves = [curve_of("lucky", n0=0.5, n7=0.9), *(curve_of(name, n0=0.5, n7=0.45) for name in "abc")]
    need = data_need(curves)
    assert need is not None
    assert need.pairs is None
