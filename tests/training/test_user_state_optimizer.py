import pytest
import torch

from persona_rlhf.training.user_state import FleetAdamW

PARAMS = 40


def _gradients(users: int, steps: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """Gradients of very different size, so that some users are clipped and some are not."""
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 2, users, dtype=dtype)[:, None]
    return [torch.randn(users, PARAMS, generator=draw, dtype=dtype) * sizes for _ in range(steps)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_each_user_moves_as_under_torchs_adamw(weight_decay, dtype, tolerance):
    """Users that start one after the other (user u at step u), each against its own AdamW and clip_grad_norm_."""
    users, steps = 5, 12
    start = torch.randn(users, PARAMS, generator=torch.Generator().manual_seed(1), dtype=dtype)
    fleet = FleetAdamW(start.clone(), weight_decay=weight_decay, max_grad_norm=1.0)
    gradients = _gradients(users, steps, dtype)
    for step, gradient in enumerate(gradients):
        for user in range(users):
            if step == user:  # the slot's new user: whatever moved in it before is gone
                fleet.params[user] = start[user]
                fleet.reset(user)
        rates = torch.tensor([1e-2 / (1 + step - user) if step >= user else 1e-2 for user in range(users)])
        norms, moves = fleet.step(gradient, rates.double())
        assert torch.allclose(norms, gradient.norm(dim=1))
        assert moves.all()
    for user in range(users):
        alone = torch.nn.Parameter(start[user].clone())
        optimizer = torch.optim.AdamW([alone], lr=1e-2, weight_decay=weight_decay)
        for step in range(user, steps):
            optimizer.param_groups[0]["lr"] = float(torch.tensor(1e-2 / (1 + step - user)))
            alone.grad = gradients[step][user].clone()
            torch.nn.utils.clip_grad_norm_([alone], 1.0)
            optimizer.step()
        assert fleet.steps[user] == steps - user
        assert torch.allclose(fleet.params[user], alone.data, rtol=0, atol=tolerance), user


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_user_without_a_finite_gradient_stands_still_and_nobody_notices(bad):
    start = torch.randn(3, PARAMS, generator=torch.Generator().manual_seed(2))
    gradients = _gradients(3, 6, torch.float32)
    clean, hurt = FleetAdamW(start.clone(), weight_decay=0.1), FleetAdamW(start.clone(), weight_decay=0.1)
    rates = torch.full((3,), 1e-2, dtype=torch.float64)
    for step, gradient in enumerate(gradients):
        clean.step(gradient, rates)
        before = [state[1].clone() for state in (hurt.params, hurt.first, hurt.second, hurt.steps)]
        if step == 3:
            gradient = gradient.clone()
            gradient[1, 7] = bad
        moves = hurt.step(gradient, rates)[1]
        assert moves.tolist() == [True, step != 3, True]
        if step == 3:
            after = [state[1] for state in (hurt.params, hurt.first, hurt.second, hurt.steps)]
            assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    for name in ("params", "first", "second", "steps"):
        assert torch.equal(getattr(clean, name)[[0, 2]], getattr(hurt, name)[[0, 2]]), name
    assert torch.isfinite(hurt.params).all()


def test_reset_forgets_the_last_user():
    fleet = FleetAdamW(torch.zeros(2, PARAMS))
    for gradient in _gradients(2, 3, torch.float32):
        fleet.step(gradient, torch.full((2,), 1e-2, dtype=torch.float64))
    fleet.params[0].zero_()
    fleet.reset(0)
    gradient = _gradients(2, 1, torch.float32, seed=5)[0]
    fleet.step(gradient, torch.full((2,), 1e-2, dtype=torch.float64))
    fresh = FleetAdamW(torch.zeros(2, PARAMS))
    fresh.step(gradient, torch.full((2,), 1e-2, dtype=torch.float64))
    assert torch.equal(fleet.params[0], fresh.params[0])
    assert not torch.equal(fleet.params[1], fresh.params[1])
