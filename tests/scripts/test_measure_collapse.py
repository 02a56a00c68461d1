"""A cell of the table of collapsed text, by hand."""

import pytest

from tests.scripts.loading import load_script

SCRIPT = load_script("measure_collapse")


@pytest.mark.parametrize(
    ("perplexity", "kept", "collapsed"),
    [(1.5, 0.95, False), (1.51, 1.0, True), (1.0, 42 / 45, True), (1.0, 43 / 45, False)],
)
def test_collapsed_is_beyond_the_limits_of_the_gate(perplexity, kept, collapsed):
    assert SCRIPT.UserText("u", 0.8, 0.7, perplexity, kept).collapsed == collapsed


def test_a_row_has_means_the_worst_text_and_the_count():
    texts = [SCRIPT.UserText("a", 0.8, 0.6, 1.2, 1.0), SCRIPT.UserText("b", 0.6, 0.8, 68.0, 0.4)]
    accuracy, won, *worst = SCRIPT.line(texts).split(" | ")
    assert accuracy == won == "0.700"  # of too few users for an interval
    assert worst == ["68.00", "60%", "1 of 2"]
    eight = SCRIPT.line([SCRIPT.UserText(str(n), 0.8, 0.6, 1.0, 1.0) for n in range(8)])
    assert eight.startswith("0.800 (0.800 to 0.800) | 0.600 (0.600 to 0.600)")
