"""The bank on disk: read back as it was, made again where the file is damaged or was made for something else."""

import pytest

from persona_rlhf.config.training import LoraSettings
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.training.constraint_data import bank_from_json, bank_to_json, kept_bank
from tests.models.tiny import constraint_bank, tiny_base


def test_a_bank_comes_back_from_its_text():
    bank = constraint_bank()
    again = bank_from_json(bank_to_json(bank))
    assert (again.categories, again.limits) == (bank.categories, bank.limits)
    assert [list(own) for own in again.anchors] == [list(own) for own in bank.anchors]
    assert again.rows() == bank.rows()
    for damaged in ("", "[]", "{}", bank_to_json(bank)[:-9], '{"categories": ["a"], "limits": [1], "anchors": [[]]}'):
        with pytest.raises(ValueError):  # noqa: PT011
            bank_from_json(damaged)


def test_a_bank_is_kept_for_the_next_run_over_the_same_base(tmp_path):
    adapted, made = AdaptedModel(tiny_base(), LoraSettings()), []

    def make():
        made.append(constraint_bank())
        return made[-1]

    first = kept_bank(adapted, tmp_path / "cache", ("policy", 1), make)
    again = kept_bank(adapted, tmp_path / "cache", ("policy", 1), make)
    assert len(made) == 1
    assert bank_to_json(again) == bank_to_json(first)
    kept_bank(adapted, tmp_path / "cache", ("policy", 2), make)
    assert len(made) == 2
    for file in (tmp_path / "cache").iterdir():
        file.write_text(file.read_text()[:40])
    kept_bank(adapted, tmp_path / "cache", ("policy", 1), make)
    assert len(made) == 3
    kept_bank(AdaptedModel(tiny_base(seed=1), LoraSettings()), tmp_path / "cache", ("policy", 1), make)
    assert len(made) == 4
