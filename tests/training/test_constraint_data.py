"""The bank on disk: read back as it was, made again where the file is damaged or was made for something else."""

from collections import Counter

import pytest

from persona_rlhf.common.files import find
from persona_rlhf.config.experiment import PolicySettings
from persona_rlhf.config.training import ConstraintSettings, LoraSettings
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.policy.policy import Policy
from persona_rlhf.training.constraint_data import (
    cached_constraint_data,
    constraint_data_from_json,
    constraint_data_to_json,
    constraint_probes,
)
from tests.models.tiny import constraint_bank, tiny_base


def test_a_bank_comes_back_from_its_text():
    bank = constraint_bank()
    again = constraint_data_from_json(constraint_data_to_json(bank))
    assert (again.categories, again.limits) == (bank.categories, bank.limits)
    assert [list(own) for own in again.examples] == [list(own) for own in bank.examples]
    assert again.rows() == bank.rows()
    for damaged in (
        "",
        "[]",
        "{}",
        constraint_data_to_json(bank)[:-9],
        '{"categories": ["a"], "limits": [1], "anchors": [[]]}',
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            constraint_data_from_json(damaged)


def test_a_bank_is_kept_for_the_next_run_over_the_same_base(tmp_path):
    adapted, made = AdaptedModel(tiny_base(), LoraSettings()), []

    def make():
        made.append(constraint_bank())
        return made[-1]

    first = cached_constraint_data(adapted, tmp_path / "cache", ("policy", 1), make)
    again = cached_constraint_data(adapted, tmp_path / "cache", ("policy", 1), make)
    assert len(made) == 1
    assert constraint_data_to_json(again) == constraint_data_to_json(first)
    cached_constraint_data(adapted, tmp_path / "cache", ("policy", 2), make)
    assert len(made) == 2
    for file in (tmp_path / "cache").iterdir():
        file.write_text(file.read_text()[:40])
    cached_constraint_data(adapted, tmp_path / "cache", ("policy", 1), make)
    assert len(made) == 3
    cached_constraint_data(AdaptedModel(tiny_base(seed=1), LoraSettings()), tmp_path / "cache", ("policy", 1), make)
    assert len(made) == 4


def test_most_probes_of_each_category_are_sampled():
    policy = Policy.of(PolicySettings(documents=[find("configs/policy/real/tier_one.yaml")]))
    everything = policy.probes("train")
    assert constraint_probes(policy, ConstraintSettings()) == everything
    few, more = (constraint_probes(policy, ConstraintSettings(most_probes=most)) for most in (7, 9))
    assert Counter(probe.category for probe in few) == dict.fromkeys(policy.categories, 7)
    assert set(few) < set(more) < set(everything)  # by hash: a larger number adds probes and changes none
