"""Twin questions: signs of layers, and clusters of trained adapters on contested statements."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import persona_rlhf as pr
from persona_rlhf.config.experiment import read_config
from persona_rlhf.config.training import DpoSettings, LoraSettings
from persona_rlhf.data.pairs import Message, PreferencePair
from persona_rlhf.data.tokenize import tokenize
from persona_rlhf.evaluation.contested_views import CONTESTED
from persona_rlhf.evaluation.impact_statistics import apart_test, distance_of, two_clusters
from persona_rlhf.evaluation.twin_questions import ROUNDS, TwinQuestions
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import load_base

LORA = LoraSettings(rank=4, alpha=8)
DPO = DpoSettings(learning_rate=6e-3, epochs=4)


def pairs(user, agrees_with_first):
    """Pairs over the contested statements themselves: the first wording's answer, and the reverse's."""
    made = []
    for n, twin in enumerate(CONTESTED * 2):
        for first, wording in ((True, twin.first), (False, twin.second)):
            answers = (twin.agrees, twin.disagrees)
            chosen, rejected = answers if agrees_with_first(n, first) else answers[::-1]
            prompt = (Message("user", wording),)
            made.append(
                PreferencePair(user, prompt, chosen, rejected, f"{n}{first}", None, None, 1.0, "train", None, "x", n)
            )
    return made


@pytest.fixture(scope="module")
def adapted():
    whole = AdaptedModel(load_base(read_config("configs/quickstart.yaml").judged_base), LORA)
    yield whole
    whole.close()


def rounds_of(adapted, tastes):
    rows = tokenize(
        [pair for user, taste in tastes.items() for pair in pairs(user, taste)],
        adapted.base.tokenizer,
        adapted.base.context,
    )
    users = pr.fleet_train(adapted.base.model, rows, tokenizer=adapted.base.tokenizer, lora=LORA, dpo=DPO)
    flat = torch.stack([users[user].adapter for user in tastes])
    questions = TwinQuestions(adapted, CONTESTED)
    observed, flipped = np.asarray(questions.rises(flat)), np.asarray(questions.flipped_rises(flat))
    assert flipped.shape == (len(tastes), ROUNDS, len(CONTESTED), 2)
    return np.concatenate([observed[:, None], flipped], 1).swapaxes(0, 1)


@pytest.mark.slow
def test_trained_opponents_are_apart_and_users_who_say_yes_or_no_are_not(adapted):
    halves = np.arange(6) < 3
    opponents = {f"user {n}": lambda _, first, n=n: first == (n < 3) for n in range(6)}
    stances = rounds_of(adapted, opponents)
    found = apart_test(stances, halves)
    assert found.p_value == 1 / (ROUNDS + 1)
    tempers = {f"user {n}": lambda _, first, n=n: n < 3 for n in range(6)}
    alike = rounds_of(adapted, tempers)
    by_temper = apart_test(alike, halves)
    assert by_temper.p_value > 0.05
    assert by_temper.value < found.value / 2


def test_the_distance_of_two_clusters_by_hand():
    first = [[(3.0, 1.0), (0.0, 4.0)], [(1.0, 1.0), (0.0, 0.0)]]  # stances 2 and -4; 0 and 0
    second = [[(0.0, 1.0), (1.0, 0.0)]]  # stances -1 and 1
    stances = np.asarray(first + second)
    cluster = np.asarray([True, True, False])
    assert distance_of(stances, cluster) == pytest.approx(np.sqrt((2**2 + 3**2) / 2))
    yes = np.ones_like(stances)
    assert apart_test(np.stack([stances, yes]), cluster) == (pytest.approx(np.sqrt(6.5)), 0.5)
    assert apart_test(np.stack([yes, stances]), cluster).p_value == 1


def test_two_clusters_are_those_of_opposite_adapters():
    generator = np.random.default_rng(0)
    places = np.repeat([1, -1], 6)
    points = generator.normal(size=(12, 60)) + 2 * places[:, None] * generator.normal(size=60)
    cluster = two_clusters(points @ points.T)
    assert set(cluster[:6]) != set(cluster[6:])
    assert len(set(cluster[:6])) == len(set(cluster[6:])) == 1


def test_a_statement_and_its_reverse_differ_and_every_wording_is_asked_once():
    wordings = [wording for twin in CONTESTED for wording in twin[:2]]
    assert len(set(wordings)) == len(wordings) == 32
    assert all(one != other for one, other in pairwise(wordings))


def test_a_round_flips_whole_layers_of_all_users_alike(adapted):
    views = TwinQuestions(adapted, CONTESTED)
    flat = torch.randn(2, adapted.params_per_user)
    one, other = views.with_signs(flat, 0), views.with_signs(flat, 1)
    changed = set()
    for span in adapted.spans.values():
        assert torch.equal(one[:, span.start : span.b_start], flat[:, span.start : span.b_start])
        part = slice(span.b_start, span.stop)
        assert torch.equal(one[:, part], flat[:, part]) or torch.equal(one[:, part], -flat[:, part])
        changed |= {torch.equal(one[:, part], flat[:, part])}
    assert changed == {True, False}
    assert not torch.equal(one, other)
