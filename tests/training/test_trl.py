"""TRL's trainer with our constraint is a fleet of one; however a step is cut up, stopped and taken up again."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.training import ConstraintSettings, FleetSettings
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.training.cache import Reference
from persona_rlhf.training.constraint import ConstraintData, LagrangianConstraint
from persona_rlhf.training.engine import Engine, TrainedUser
from persona_rlhf.training.trl import ConstrainedDPOTrainer
from tests.models.tiny import constraint_bank, tiny_base
from tests.training.constrained_trl import (
    CONSTRAINT,
    DPO,
    LORA,
    SEED,
    STEPS,
    attacker,
    constrained_trainer,
    train_both,
    trainer_of_all_weights,
)
from tests.training.oracles import read_flat

SCRIPT = Path(__file__).with_name("constrained_trl.py")


@pytest.fixture(scope="module")
def bank() -> ConstraintData:
    return constraint_bank(limit=0.0)


def _fleet(bank: ConstraintData | None, constraint: ConstraintSettings = CONSTRAINT) -> TrainedUser:
    user = attacker(constraint_bank(limit=0.0))
    adapted = AdaptedModel(tiny_base(), LORA)
    reference = Reference(adapted)
    reference.add(row for pair in user.train for row in (pair.chosen, pair.rejected))
    reference.add(bank.rows() if bank else [])
    functional = bank and LagrangianConstraint(bank, constraint, SEED)
    engine = Engine(adapted, [user], reference, functional, DPO, FleetSettings(slots=1), SEED)
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
    with pytest.raises(InputError, match="other constraint data"):
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


def test_without_peft_the_reference_is_the_ref_model_or_the_model_before_its_first_step(bank, tmp_path):
    known = Reference(AdaptedModel(tiny_base(), LORA))
    known.add(bank.rows())

    def trainer(folder, **named):
        model = tiny_base().model.requires_grad_(True)
        return trainer_of_all_weights(
            model, tmp_path / folder, bank, max_steps=3, save_strategy="steps", save_steps=1, **named
        )

    runs = {
        "ref_model": trainer("one", ref_model=tiny_base().model),
        "itself": trainer("two", precompute_ref_log_probs=True),
        "resumed": trainer("two", precompute_ref_log_probs=True),
    }
    for name, trainer in runs.items():
        trainer.train(str(tmp_path / "two" / "checkpoint-2") if name == "resumed" else None)
        assert all(trainer._reference[row] == pytest.approx(known[row], abs=1e-4) for row in bank.rows())
        assert torch.equal(trainer.duals.values, runs["ref_model"].duals.values)
    assert (trainer.duals.violations != 0).all()


def _saved(folder):
    """The adapter and all weights that were saved; of what is tied, some ways of saving name both and some one."""
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    model = load_file(folder / "weights" / "model.safetensors")
    model.pop("lm_head.weight", None)
    return {"adapter": _flat(adapter), "weights": _flat(model)}


def _flat(tensors):
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.fixture(scope="module")
def alone(bank, tmp_path_factory):
    """What one process makes of the base in FOLDER/base, and its duals."""
    folder = tmp_path_factory.mktemp("alone")
    tiny_base().model.save_pretrained(folder / "base")
    return folder, train_both(folder, bank, **STEPS)


_ZERO = ["--use_deepspeed", "--gradient_accumulation_steps=2", "--gradient_clipping=1.0"]
_NO_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
LAUNCHED = [
    pytest.param(["--multi_gpu"], id="ddp"),
    pytest.param(["--use_fsdp", "--fsdp_version=2", "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP"], id="fsdp"),
    pytest.param([*_ZERO, "--zero_stage=2"], id="zero2", marks=_NO_DEEPSPEED),
    pytest.param([*_ZERO, "--zero_stage=3", "--zero3_save_16bit_model=true"], id="zero3", marks=_NO_DEEPSPEED),
]


@pytest.mark.slow
@pytest.mark.parametrize("how", LAUNCHED)
def test_two_launched_processes_train_what_one_does(how, alone, tmp_path):
    """Half of each step's pairs in each process, one by one, whatever bank the second one has."""
    folder, duals = alone
    (tmp_path / "base").symlink_to(folder / "base")
    one_cpu = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    paths = os.pathsep.join([str(SCRIPT.parents[2] / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | one_cpu | {"PYTHONPATH": paths}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--num_machines=1"]
    plain = ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    command = [*launcher, *plain, *how, "--fsdp_state_dict_type=FULL_STATE_DICT", str(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    before, ours, theirs = _flat(load_file(folder / "base" / "model.safetensors")), _saved(folder), _saved(tmp_path)
    assert _apart(theirs["adapter"], ours["adapter"]) <= 1e-4
    assert _apart(theirs["weights"] - before, ours["weights"] - before) <= 1e-4
    for name, values in duals.items():
        assert values.max() > 1e-3
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], values, rtol=1e-3, atol=1e-6)
