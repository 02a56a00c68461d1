import json
from types import SimpleNamespace

import pytest
import torch

from persona_rlhf.config.evaluation import GateSettings
from persona_rlhf.evaluation.evaluator import Evaluator
from persona_rlhf.evaluation.records import Conditions
from persona_rlhf.pipeline import kept_answers
from persona_rlhf.pipeline.kept_answers import read_answers, write_answers
from persona_rlhf.policy.policy import Policy

PUBLIC = object.__new__(Policy)
object.__setattr__(PUBLIC, "private", None)
WRITTEN = {"a prompt": [[5, 7], True], "another": [[], False]}


class Kind:
    """Stands for `BaseAnswers`."""

    def __init__(self, written=()):
        self.written, self.kept = dict(written), None

    def to_json(self):
        return self.written

    def keep(self, answers):
        self.kept = answers


class Judging(Evaluator):
    """An evaluator with these answers, and without a model."""

    base = conditions = None

    def __init__(self, written=(), weights="w", tokens=48, gate=None):
        self.gate, self.base_answers = gate or GateSettings(), (Kind(written), Kind(), Kind())
        model = SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(weight=torch.zeros(9, 1)))
        self.base = SimpleNamespace(weights_hash=weights, eos_ids=(1,), model=model)
        self.conditions = Conditions("float32", "sdpa", "cpu", tokens)


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "base_answers.json"
    write_answers(Judging(WRITTEN), PUBLIC, file)
    return file


def test_the_same_gate_reads_them_again(file):
    again = Judging()
    read_answers(again, file)
    kept = {name: (ids, finished) for name, (ids, finished) in WRITTEN.items()}
    assert [kind.kept for kind in again.base_answers] == [kept, {}, {}]


@pytest.mark.parametrize(
    "change",
    [{"weights": "v"}, {"tokens": 64}, {"gate": GateSettings(judge="rules")}],
    ids=lambda change: next(iter(change)),
)
def test_another_base_limit_or_judge_writes_its_own(file, change):
    other = Judging(**change)
    read_answers(other, file)
    assert [kind.kept for kind in other.base_answers] == [None, None, None]


def test_another_version_writes_its_own(file, monkeypatch):
    monkeypatch.setattr(kept_answers, "__version__", "0.0.1")
    other = Judging()
    read_answers(other, file)
    assert other.base_answers[0].kept is None


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"of": 1}'])
def test_a_damaged_or_missing_file_is_no_fault(file, content):
    file.write_bytes(content)
    read_answers(Judging(), file)
    file.unlink()
    read_answers(Judging(), file)


@pytest.mark.parametrize(
    "answers",
    [[[], [], []], [{}, {}], [{"p": [[9], True]}, {}, {}], [{"p": [[-1], True]}, {}, {}], [{"p": [["x"], 1]}, {}, {}]],
    ids=["lists", "two kinds", "beyond the vocabulary", "below it", "texts"],
)
def test_answers_of_another_form_are_written_anew(file, answers):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "answers": answers}))
    other = Judging()
    read_answers(other, file)
    assert [kind.kept for kind in other.base_answers] == [None, None, None]


def test_answers_to_a_private_bank_are_not_written(tmp_path):
    policy = object.__new__(Policy)
    object.__setattr__(policy, "private", "a bank")
    write_answers(Judging(WRITTEN), policy, tmp_path / "answers.json")
    assert not list(tmp_path.iterdir())


def test_no_prompt_is_in_the_file(file):
    assert set(json.loads(file.read_text())) == {"of", "answers"}
