"""Whose adapter writes the answers of the feedback page, over the adapters of a finished run."""

from __future__ import annotations

import pytest

from persona_rlhf.common.files import pseudonym, slug
from persona_rlhf.release.results import read_results, write_results
from persona_rlhf.serving.answer_sampler import AnswerSampler
from persona_rlhf.serving.comparisons import AnswerPair, OpenComparisons, SampledAnswer
from persona_rlhf.serving.pair_writing import written_pair
from persona_rlhf.serving.policy_filter import PolicyFilter
from tests.serving.test_collect import Writer


@pytest.fixture
def sampler(access) -> AnswerSampler:
    return AnswerSampler(Writer(), access, PolicyFilter(), access.weights_hash, 8)


def test_a_released_adapter_writes_and_no_other(run, sampler):
    adapters = {one.user_id: sampler.adapter(one.user_id) for one in read_results(run.path)}
    assert {user for user, adapter in adapters.items() if adapter is not None} == {"../../etc", "Ada", "ada"}
    assert adapters["Ada"].slug == slug("Ada")
    assert sampler.adapter("nobody") is None


def test_results_that_add_replaced_are_read_again(run, sampler):
    results = read_results(run.path)
    write_results(run.path, [one for one in results if one.user_id != "Ada"])
    assert sampler.adapter("Ada") is None
    write_results(run.path, results)
    assert sampler.adapter("Ada") is not None


def test_the_base_writes_for_an_adapter_that_is_withheld(run, sampler, access, log):
    assert written_pair(sampler.begin("Ada", "w5")).left.author == sampler.adapter("Ada").weights_sha256
    access.withhold(slug("Ada"), "it is being examined")
    pair = written_pair(sampler.begin("Ada", "w5"))
    assert (pair.left.author, pair.right.author, pair.base) == ("base", "base", access.weights_hash)
    assert any("it is being examined" in line for line in log)


def test_an_edited_adapter_does_not_write(run, sampler):
    weights = run.path / "adapters" / slug("Ada") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert sampler.adapter("Ada") is None


def test_pairs_of_forgotten_users_leave_the_memory():
    barred = set[str]()
    pairs = OpenComparisons(lambda: barred)
    answers = SampledAnswer("a", "base", 1), SampledAnswer("b", "base", 2)
    pairs.put(AnswerPair("Ada", "p", *answers, "base"))
    barred.add(pseudonym("Ada"))
    pairs.put(AnswerPair("Bob", "p", *answers, "base"))
    assert pairs.of("Ada") is None
    assert pairs.of("Bob") is not None
