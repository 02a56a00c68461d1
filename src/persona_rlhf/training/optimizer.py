"""AdamW over a stack of users who share nothing: each has his own step count, clip, learning rate and freeze."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class FleetAdamW:
    """Decoupled Adam (Loshchilov & Hutter 2019, algorithm 2), one row a user; the formulas are torch.optim.AdamW's.

    torch's own optimizer has one step counter a tensor, so users that start at different times need this one. A user
    who does not move in a step keeps his moments too.
    """

    def __init__(
        self,
        params: Float[Tensor, "users params"],
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
    ) -> None:
        self.params = params
        self.first = torch.zeros_like(params)
        self.second = torch.zeros_like(params)
        self.steps: Int[Tensor, " users"] = torch.zeros(params.shape[0], dtype=torch.int64, device=params.device)
        self.betas, self.epsilon = betas, epsilon
        self.weight_decay, self.max_grad_norm = weight_decay, max_grad_norm

    def reset(self, user: int) -> None:
        """Makes row `user` as new: for the next user who takes the slot."""
        self.first[user].zero_()
        self.second[user].zero_()
        self.steps[user] = 0

    @torch.no_grad()
    def step(
        self, grads: Float[Tensor, "users params"], rates: Float[Tensor, " users"]
    ) -> tuple[Float[Tensor, " users"], Bool[Tensor, " users"]]:
        """One step at each user's learning rate; a user whose gradient is not finite does not move.

        Returns each user's gradient norm before the clip, and who moved.
        """
        norms = torch.linalg.vector_norm(grads, dim=1)
        moves = torch.isfinite(norms)
        clip = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        grads = torch.where(moves[:, None], grads * clip[:, None], 0.0)
        self.steps += moves
        beta1, beta2 = self.betas
        # 1 - beta is rounded once, from fp64: 1 - 0.999 in fp32 is wrong in the fifth digit.
        new1, new2 = ((moves.double() * (1 - beta))[:, None] for beta in self.betas)
        self.first.lerp_(grads, new1.to(grads.dtype))
        self.second.mul_((1 - new2).to(grads.dtype)).addcmul_(grads * grads, new2.to(grads.dtype))
        count = self.steps.clamp(min=1).to(torch.float64)
        correction1 = (1 - beta1**count).to(grads.dtype)[:, None]
        correction2 = (1 - beta2**count).to(grads.dtype)[:, None]
        rates = torch.where(moves, rates, 0.0).to(grads.dtype)[:, None]
        if self.weight_decay:
            self.params.mul_(1 - rates * self.weight_decay)
        denominator = (self.second / correction2).sqrt_().add_(self.epsilon)
        self.params.addcdiv_(self.first * (-rates / correction1), denominator)
        return norms, moves
