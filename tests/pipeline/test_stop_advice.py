"""Advice to stop: by the posterior of a basis, by the pairs that a curve calls needed, and none without both."""

from __future__ import annotations

import json

import pytest

from persona_rlhf.common.files import find
from persona_rlhf.config.experiment import Config
from persona_rlhf.evaluation.data_curve import CurvePoint, UserCurve
from persona_rlhf.pipeline.run_dir import RunDir
from persona_rlhf.pipeline.stop_advice import PosteriorAdvice, stop_advice
from persona_rlhf.release.data_curve_file import DataCurve, write_data_curve
from persona_rlhf.training.reward_basis import load_basis
from tests.data.test_choice_ledger import choice
from tests.pipeline.test_export_choices import CONFIG

BASIS = "data/basis/quickstart.safetensors"
TEXTS = [f"{'Please note that' * (n % 3)} the garden is {'very ' * n}green{'!' * (n % 5)}" for n in range(40)]
PAIRS = list(zip(TEXTS, TEXTS[1:] + TEXTS[:1], strict=True))


@pytest.fixture
def advice():
    return PosteriorAdvice(load_basis(find(BASIS)), PAIRS)


def shorter(count: int):
    """Choices of a user who likes short answers."""
    pairs = [PAIRS[n % len(PAIRS)] for n in range(count)]
    verdicts = ["left" if len(left) < len(right) else "right" for left, right in pairs]
    return [choice(n, left=left, right=right, verdict=verdicts[n]) for n, (left, right) in enumerate(pairs)]


def test_advice_comes_after_enough_choices_that_agree(advice, monkeypatch):
    gains = []
    gain = PosteriorAdvice.gain
    monkeypatch.setattr(PosteriorAdvice, "gain", lambda *arguments: gains.append(gain(*arguments)) or gains[-1])
    assert not advice(shorter(9))
    assert gains == []
    advised = [advice(shorter(count)) for count in (10, 40, 160, 400)]
    assert gains == sorted(gains, reverse=True)
    assert advised == sorted(advised)
    assert (advised[0], advised[-1]) == (False, True)
    assert advice(shorter(400))
    assert len(gains) == 4  # the advice is remembered
    ties = [choice(n, verdict="tie") for n in range(50)]
    assert not advice(ties)


def test_without_a_basis_the_curve_tells_the_pairs_and_without_both_there_is_none(tmp_path):
    users = {"path": str(find("data/users"))}
    config = Config.model_validate({**CONFIG, "users": users})
    assert stop_advice(tmp_path, config) is None
    reached = {5: 0.6, 10: 0.7, 20: 0.9, 40: 0.92}
    points = [CurvePoint(pairs, accuracy, None, None, 20) for pairs, accuracy in reached.items()]
    curve = DataCurve("features", [UserCurve(user, user, 40, points) for user in ("ada", "bob", "carl")])
    write_data_curve(tmp_path, curve)
    need = curve.need.pairs
    advice = stop_advice(tmp_path, config)
    assert [advice(shorter(count)) for count in (need - 1, need)] == [False, True]
    assert not advice([*shorter(need - 1), choice(99, verdict="tie")])


def test_with_a_basis_the_runs_answers_are_the_pairs(tmp_path):
    basis = {"file": str(find(BASIS))}
    config = Config.model_validate({**CONFIG, "users": {"path": str(find("data/users"))}, "basis": basis})
    answers = RunDir(tmp_path).answers
    answers.parent.mkdir()
    answers.write_text("".join(json.dumps(["prompt", *pair]) + "\n" for pair in PAIRS))
    assert isinstance(stop_advice(tmp_path, config), PosteriorAdvice)
