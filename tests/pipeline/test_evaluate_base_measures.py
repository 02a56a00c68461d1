"""Perplexities of the same texts before and after."""

from math import exp, log
from random import Random

import pytest

from persona_rlhf.pipeline.evaluate_base import TextScore, perplexity_ratio


def test_the_ratio_is_that_of_the_perplexities():
    before, after = [TextScore(-20.0, 10), TextScore(-9.0, 5)], [TextScore(-22.0, 10), TextScore(-9.5, 5)]
    ratio = perplexity_ratio(before, after)
    assert ratio.value == pytest.approx(exp(31.5 / 15) / exp(29 / 15))
    assert ratio.low < ratio.value < ratio.high
    assert perplexity_ratio(before, before) == (1.0, 1.0, 1.0)


def test_the_interval_covers_as_often_as_it_says():
    """Texts of unlike lengths whose log-probabilities fall by 0.02 nats a token on average."""
    rng, covered, runs = Random(5), 0, 400
    for _ in range(runs):
        before, after = [], []
        for _ in range(80):
            tokens = rng.randint(5, 60)
            before.append(TextScore(-2.0 * tokens, tokens))
            after.append(TextScore(-2.0 * tokens - rng.gauss(0.02, 0.1) * tokens, tokens))
        ratio = perplexity_ratio(before, after)
        covered += ratio.low <= exp(0.02) <= ratio.high
    assert 0.91 <= covered / runs <= 0.98
    assert log(ratio.high / ratio.low) < 0.2
