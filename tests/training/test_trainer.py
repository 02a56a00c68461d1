"""TRL's trainer with our constraint is a fleet of one; however a step is cut up, stopped and taken up again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from trl import DPOConfig

from persona_rlhf.inputs.problems import InputError
from persona_rlhf.training.bank import ConstraintBank
from persona_rlhf.training.engine import Engine, TrainedUser
from persona_rlhf.training.fleet import AdaptedModel
from persona_rlhf.training.reference import Reference
from persona_rlhf.training.settings import ConstraintSettings, FleetSettings
from persona_rlhf.training.trainer import ConstrainedDPOTrainer

from .constrained import CONSTRAINT, DPO, LORA, SEED, attacker, constrained_trainer
from .oracles import OPTIONS, read_flat
from .tiny import constraint_bank, tiny_base, tiny_tokenizer

SCRIPT = Path(__file__).with_name("constrained.py")


@pytest.fixture(scope="module")
def bank() -> ConstraintBank:
    return constraint_bank(limit=0.0)


def _fleet(bank: ConstraintBank | None, constraint: ConstraintSettings = CONSTRAINT) -> TrainedUser:
    user = attacker(constraint_bank(limit=0.0))
    adapted = AdaptedModel(tiny_base(), LORA)
    reference = Reference(adapted)
    reference.add(row for pair in user.train for row in (pair.chosen, pair.rejected))
    reference.add(bank.rows() if bank else [])
    engine = Engine(adapted, [user], reference, bank, DPO, constraint, FleetSettings(slots=1), SEED)
    [trained] = engine.run()
    return trained


@pytest.fixture(scope="module")
def whole(bank, tmp_path_factory):
    """The trainer's own run, never interrupted, with 4 pairs in a batch."""
    trainer, spans = constrained_trainer(tmp_path_factory.mktemp("whole"), bank)
    trainer.train()
    return trainer, read_flat(trainer.model, spans)


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_a_user_is_what_the_fleet_trains(bank, whole):
    """24 steps, every part of the penalty at work: without any of them the adapters are far apart."""
    trainer, theirs = whole
    ours = _fleet(bank)
    assert trainer.state.global_step == ours.steps == 24
    assert _apart(theirs, ours.adapter) <= 1e-4
    for name, trace in zip(bank.categories, trainer.duals.traces(0), strict=True):
        assert trace == pytest.approx(ours.duals[name], rel=1e-3)
        assert trace.final > 0.05
    assert _apart(theirs, _fleet(None).adapter) > 0.1
    for part in ({"opening_weight": 0.0}, {"compliance_rows_per_step": 0}, {"twin_rows_per_step": 0}, {"gain": 1e-9}):
        assert _apart(theirs, _fleet(bank, CONSTRAINT.model_copy(update=part)).adapter) > 0.05


def test_it_logs_what_the_constraint_does(whole):
    trainer, _ = whole
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert lines[-1]["constraint/dual"] == pytest.approx(trainer.duals.values.max().item())
    assert lines[-1]["constraint/violation"] == pytest.approx(trainer.duals.violations.max().item())
    assert lines[0]["constraint/violation"] == pytest.approx(0, abs=1e-4)
    assert "rewards/margins" in lines[-1]


def test_micro_batches_change_nothing(bank, whole, tmp_path):
    trainer, spans = constrained_trainer(tmp_path, bank, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    trainer.train()
    assert trainer.state.global_step == 24
    assert _apart(read_flat(trainer.model, spans), whole[1]) <= 1e-4


def test_a_resumed_run_ends_where_the_whole_one_does(bank, whole, tmp_path):
    first, spans = constrained_trainer(tmp_path, bank, save_strategy="steps", save_steps=12, max_steps=24)
    first.train()
    again, spans = constrained_trainer(tmp_path, bank, max_steps=24)
    again.train(str(tmp_path / "checkpoint-12"))
    assert torch.equal(again.duals.values, whole[0].duals.values)
    assert again.duals.traces(0) == whole[0].duals.traces(0)
    assert torch.equal(read_flat(again.model, spans), whole[1])


def test_a_checkpoint_without_this_constraint_is_not_resumed(bank, tmp_path):
    first, _ = constrained_trainer(tmp_path, bank, save_strategy="steps", save_steps=2, max_steps=2)
    first.train()
    other, _ = constrained_trainer(tmp_path, constraint_bank(seed=9))
    with pytest.raises(InputError, match="another constraint bank"):
        other.train(True)
    (tmp_path / "checkpoint-2" / "constraint.safetensors").unlink()
    with pytest.raises(InputError, match="without the constraint"):
        first.train(True)


def test_the_loss_of_held_out_pairs_is_dpo_alone(bank, whole):
    trainer, _ = whole
    before = trainer.duals.values.clone()
    found = trainer.evaluate(trainer.train_dataset)
    assert 0 < found["eval_loss"] < 0.6931
    assert "eval_constraint/dual" not in found
    assert torch.equal(trainer.duals.values, before)


def test_a_constraint_that_is_off_is_no_constraint(bank):
    with pytest.raises(ValueError, match="use TRL's DPOTrainer"):
        ConstrainedDPOTrainer(bank=bank, constraint=ConstraintSettings(enabled=False))


def _of_all_weights(folder, bank, **named):
    """The trainer without PEFT, on pairs of no interest."""
    model = tiny_base().model.requires_grad_(True)
    data = [{"prompt": f"w{n} w3", "chosen": f" w{n + 1} w5", "rejected": f" w{n + 2}"} for n in range(4, 20)]
    options = {"learning_rate": 1e-3, "per_device_train_batch_size": 4, "max_steps": 3, "save_steps": 1} | OPTIONS
    named |= {"bank": bank, "train_dataset": Dataset.from_list(data), "processing_class": tiny_tokenizer()}
    if "ref_model" not in named:
        options["precompute_ref_log_probs"] = True
    return ConstrainedDPOTrainer(model, args=DPOConfig(str(folder), **options), **named)


def test_without_peft_the_reference_is_the_ref_model_or_the_model_before_its_first_step(bank, tmp_path):
    known = Reference(AdaptedModel(tiny_base(), LORA))
    known.add(bank.rows())
    runs = {
        "ref_model": _of_all_weights(tmp_path / "one", bank, ref_model=tiny_base().model),
        "itself": _of_all_weights(tmp_path / "two", bank),
        "resumed": _of_all_weights(tmp_path / "two", bank),
    }
    for name, trainer in runs.items():
        trainer.train(str(tmp_path / "two" / "checkpoint-2") if name == "resumed" else None)
        assert all(trainer._reference[row] == pytest.approx(known[row], abs=1e-4) for row in bank.rows())
        assert torch.equal(trainer.duals.values, runs["ref_model"].duals.values)
    assert (trainer.duals.violations != 0).all()


@pytest.mark.slow
def test_two_processes_train_what_one_does(whole, tmp_path):
    """Half of each step's pairs in each process, one by one, whatever bank the second one has."""
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2] / "src"), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert torch.equal(first["duals"], second["duals"])
    assert torch.equal(first["adapter"], second["adapter"])
    assert _apart(first["adapter"], whole[1]) <= 1e-4
    assert torch.allclose(first["duals"], whole[0].duals.values, rtol=1e-3)
