import threading

import pytest

from persona_rlhf.pipeline.release import overlapped


def test_results_come_in_order():
    assert list(overlapped(lambda n: n * n, range(5))) == [0, 1, 4, 9, 16]
    assert list(overlapped(lambda n: n, [])) == []


def test_the_next_item_is_made_while_the_work_goes_on():
    """Each side waits for the other to have begun: one after the other they would wait forever."""
    begun, made = [threading.Event() for _ in range(3)], [threading.Event() for _ in range(3)]

    def items():
        for n in range(3):
            assert n == 0 or begun[n - 1].wait(10)
            made[n].set()
            yield n

    def work(n):
        begun[n].set()
        assert n == 2 or made[n + 1].wait(10)
        return n

    assert list(overlapped(work, items())) == [0, 1, 2]


def test_no_more_than_one_piece_of_work_waits():
    done = []

    def items():
        for n in range(4):
            assert len(done) >= n - 1
            yield n

    assert list(overlapped(lambda n: done.append(n), items())) == [None] * 4


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
def test_what_was_under_way_is_given_before_the_fault_of_the_next_item(fault):
    def items():
        yield 1
        raise fault("the second")

    found = []
    with pytest.raises(fault, match="the second"):
        found.extend(overlapped(lambda n: n, items()))
    assert found == [1]


def test_a_fault_of_the_work_comes_in_the_place_of_its_result():
    found = overlapped(lambda n: 1 / n, [2, 0, 1])
    assert next(found) == 0.5
    with pytest.raises(ZeroDivisionError):
        next(found)
