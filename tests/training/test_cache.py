from dataclasses import replace

import pytest
import torch

from persona_rlhf.config.training import LoraSettings
from persona_rlhf.data.tokenize import Row
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.training.cache import Reference, shared_reference
from tests.models.tiny import random_flat, random_row, tiny_base
from tests.training.oracles import plain_logp

LORA = LoraSettings(rank=2, alpha=2)


@pytest.fixture
def adapted(monkeypatch):
    """A model that counts the rows it scores."""
    model = AdaptedModel(tiny_base(), LORA)
    score = model.score
    model.scored = []

    def spy(rows, states=()):
        model.scored.extend(row for own in rows for row in own)
        return score(rows, states)

    monkeypatch.setattr(model, "score", spy)
    return model


def _rows(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [random_row(draw, 3 + n % 4, 2 + n) for n in range(count)]


def test_values_are_the_bases_own_log_probabilities(adapted):
    rows = _rows(5)
    reference = Reference(adapted)
    reference.add(rows)
    with torch.no_grad():
        for row in rows:
            assert reference[row] == pytest.approx(plain_logp(adapted.base.model, row).item(), abs=1e-4)


def test_adapters_that_are_on_do_not_colour_the_reference(adapted):
    rows = _rows(3)
    plain, coloured = Reference(adapted), Reference(adapted)
    plain.add(rows)
    with adapted.using(random_flat(adapted, 1)):
        [before] = adapted.score([rows])
        coloured.add(rows)
        assert adapted.score([rows]) == [before]
    assert [coloured[row] for row in rows] == [plain[row] for row in rows]


def test_rows_that_users_share_are_computed_once(adapted):
    shared, own = _rows(4), _rows(3, seed=9)
    reference = Reference(adapted)
    reference.add([*shared, *shared])
    assert len(adapted.scored) == 4
    reference.add(iter([*shared, *own, own[0]]))
    assert len(adapted.scored) == 7
    reference.add(shared)
    reference.add([])
    assert len(adapted.scored) == 7


def test_the_border_between_prompt_and_completion_counts(adapted):
    """The same tokens with another prompt are another row."""
    reference = Reference(adapted)
    reference.add([Row((5, 6), (7, 8)), Row((5, 6, 7), (8,))])
    assert len(adapted.scored) == 2
    assert reference[Row((5, 6), (7, 8))] < reference[Row((5, 6, 7), (8,))]


def test_a_row_that_was_never_added_is_a_fault(adapted):
    with pytest.raises(KeyError):
        Reference(adapted)[Row((5,), (6,))]


def test_a_resumed_run_reads_its_values_back(adapted, tmp_path):
    file, rows = tmp_path / "state" / "reference.safetensors", _rows(6)
    first = Reference(adapted, file)
    first.add(rows[:3])
    first.add(rows[3:])
    adapted.scored.clear()
    again = Reference(adapted, file)
    again.add(rows)
    assert adapted.scored == []
    assert [again[row] for row in rows] == [first[row] for row in rows]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("other", ["weights", "dtype"])
def test_another_bases_file_is_not_believed(adapted, tmp_path, other):
    file, rows = tmp_path / "reference.safetensors", _rows(3)
    Reference(adapted, file).add(rows)
    base = tiny_base(seed=1) if other == "weights" else replace(tiny_base(dtype=torch.float64))
    if other == "dtype":
        assert base.weights_hash == adapted.base.weights_hash
    stranger = AdaptedModel(base, LORA)
    reference = Reference(stranger, file)
    with pytest.raises(KeyError):
        reference[rows[0]]
    reference.add(rows)
    with torch.no_grad():
        assert reference[rows[0]] == pytest.approx(plain_logp(base.model, rows[0]).item(), abs=1e-4)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"cut"])
def test_a_damaged_file_is_computed_again(adapted, tmp_path, content):
    rows, file = _rows(4), tmp_path / "reference.safetensors"
    whole = Reference(adapted, file)
    whole.add(rows)
    file.write_bytes(content)
    again = Reference(adapted, file)
    again.add(rows)
    assert [again[row] for row in rows] == [whole[row] for row in rows]
    assert len(adapted.scored) == 8
    Reference(adapted, file).add(rows)
    assert len(adapted.scored) == 8


def test_what_another_reference_knows_is_not_computed_again(adapted, tmp_path):
    rows = _rows(5)
    known = Reference(adapted)
    known.add(rows[:3])
    more = Reference(adapted, tmp_path / "x.safetensors", known)
    more.add(rows)
    assert adapted.scored[3:] == rows[3:]
    assert [more[row] for row in rows[:3]] == [known[row] for row in rows[:3]]
    with pytest.raises(KeyError):
        known[rows[4]]


def test_runs_share_what_they_know_of_one_base(adapted, tmp_path):
    rows = _rows(5)
    first = Reference(adapted, tmp_path / "run1.safetensors", shared_reference(adapted, tmp_path / "cache"))
    first.add(rows[:4])
    shared_reference(adapted, tmp_path / "cache").learn(first)
    adapted.scored.clear()
    own = tmp_path / "run2.safetensors"
    second = Reference(adapted, own, shared_reference(adapted, tmp_path / "cache"))
    second.add(rows)
    assert adapted.scored == rows[4:]
    assert [second[row] for row in rows[:4]] == [first[row] for row in rows[:4]]
    assert second[rows[4]] == pytest.approx(plain_logp(adapted.base.model, rows[4]).item(), abs=1e-4)
    adapted.scored.clear()
    Reference(adapted, own).add(rows)  # a resumed run needs no cache
    assert adapted.scored == []
    other = AdaptedModel(tiny_base(dtype=torch.float64), LORA)
    with pytest.raises(KeyError):
        shared_reference(other, tmp_path / "cache")[rows[0]]
