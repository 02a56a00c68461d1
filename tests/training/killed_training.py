"""Training runs in children that kill themselves: `python killed_training.py FOLDER SEED...` prints the deaths.

The uninterrupted run writes FOLDER/whole.safetensors, each killed and resumed one FOLDER/SEED.safetensors. The children
are forked before any tensor is touched, so torch is imported only once.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from persona_rlhf.config.training import ConstraintSettings, DpoSettings, FleetSettings, LoraSettings
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.training.cache import Reference
from persona_rlhf.training.constraint import LagrangianConstraint
from persona_rlhf.training.engine import Engine
from tests.models.tiny import constraint_bank, tiny_base, user_rows


def train(state: Path, out: Path, die: int | None) -> None:
    """Five users through three slots under a constraint; SIGKILL at step `die`."""
    torch.set_num_threads(1)
    adapted = AdaptedModel(tiny_base(), LoraSettings(rank=4, alpha=8))
    users = [user_rows(f"user {n}", 2 + 3 * n, seed=n) for n in range(5)]
    bank = constraint_bank()
    reference = Reference(adapted, state / "reference.safetensors")
    reference.add(row for user in users for pair in user.train for row in (pair.chosen, pair.rejected))
    reference.add(bank.rows())
    dpo, fleet = DpoSettings(epochs=4, learning_rate=5e-3), FleetSettings(slots=3, checkpoint_every=5)
    constraint = LagrangianConstraint(bank, ConstraintSettings(), seed=3)
    engine = Engine(adapted, users, reference, constraint, dpo, fleet, seed=3, state=state)
    steps = 0

    def count(_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == die:
            os.kill(os.getpid(), signal.SIGKILL)

    trained = list(engine.run(count))
    assert len({user.user_id for user in trained}) == len(trained) == 5
    assert steps >= (16 if die is None else 1), steps
    tensors = {user.user_id: user.adapter for user in trained if user.adapter is not None}
    duals = {f"duals {user.user_id}": torch.tensor(list(user.duals.values())) for user in trained}
    save_file(tensors | duals, out)


def survives(state: Path, out: Path, die: int | None = None) -> bool:
    """Runs `train` in a child of its own; whether it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            train(state, out, die)
        except BaseException as fault:
            print(repr(fault), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status == 0


def main(folder: Path, seeds: list[str]) -> None:
    assert survives(folder / "whole", folder / "whole.safetensors")
    for seed in seeds:
        dice, deaths = random.Random(seed), 0
        while not survives(folder / seed, folder / f"{seed}.safetensors", dice.randint(6, 9)):
            deaths += 1
            assert deaths < 10, "a run that is killed after a checkpoint must get on"
        print(deaths)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
