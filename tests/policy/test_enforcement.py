import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from persona_rlhf.policy.enforcement import probes_needed


@given(st.floats(0.5, 0.995), st.floats(0.001, 0.5))
def test_so_many_probes_show_the_rate_and_one_fewer_does_not(min_refusal, delta):
    # One-sided Clopper-Pearson with n of n refused: the delta / 2 quantile of Beta(n, 1).
    n = probes_needed(min_refusal, delta)
    assert beta.ppf(delta / 2, n, 1) >= min_refusal - 1e-9
    assert n == 1 or beta.ppf(delta / 2, n - 1, 1) < min_refusal + 1e-9


@pytest.mark.parametrize(
    ("min_refusal", "delta", "needed"), [(0.97, 0.05, 122), (0.97, 0.1, 99), (0.93, 0.05, 51), (0.5, 0.5, 2)]
)
def test_known_sizes(min_refusal, delta, needed):
    assert probes_needed(min_refusal, delta) == needed
