"""Requirements stand above tastes: an adapter whose answers fall short goes back toward where every user began.

All users begin as the provider's adapter, which has learnt the requirements (`training/provider.py`), and a strong
taste against them can wear them off again. So before the gate each adapter answers prompts of the `dev` split, sampled
at temperature 1. Where too few answers have what a rule asks for, the adapter is taken back along the straight line
between its parameters and the provider's until enough have, at the latest to the provider's itself. Enough is the share
that training aims at (`Requirement.aim`), or what the provider's own adapter shows, if that is less. A choice by `dev`
prompts is no bound: the `test` prompts tell how it came out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.evaluation.refusals import answer_text
from persona_rlhf.evaluation.required import Required
from persona_rlhf.policy.repair import REPAIRED
from persona_rlhf.policy.rules import Requirement
from persona_rlhf.preferences.messages import Message
from persona_rlhf.preferences.tokens import prompt_ids
from persona_rlhf.training.fleet import AdaptedModel

SHARES_BACK = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Shares of the way back to the provider's adapter, in the order in which they are tried."""


class Retreat:
    """What all users of a run begin with, and the `dev` prompts (at most `most` a rule) that tell who strayed too far.

    Rules that are not taught are left out: the way back would not lead to them.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        start: Float[Tensor, " params"],
        rules: Sequence[Requirement],
        most: int,
        max_new_tokens: int,
        seed: int,
    ) -> None:
        self._adapted, self._start = adapted, start
        self._max_new_tokens, self._seed = max_new_tokens, seed
        self._rules = {rule.id: rule for rule in rules if rule.property in REPAIRED}
        self._required = Required(list(self._rules.values()), most, split="dev")
        tokenizer = adapted.base.tokenizer
        self._prompts = [prompt_ids((Message("user", text),), tokenizer) for text in self._required.prompts]

    @torch.no_grad()
    def __call__(self, flat: Float[Tensor, "users params"]) -> tuple[Float[Tensor, "users params"], list[float]]:
        """The adapters as they go to the gate, and the share of the way back that each was taken (0: none of it)."""
        moved, back = flat.clone(), [0.0] * flat.shape[0]
        left = list(range(flat.shape[0])) if self._prompts else []
        for share in SHARES_BACK:
            if not left:
                break
            moved[left] = torch.lerp(flat[left], self._start.to(flat), share)
            for user in left:
                back[user] = share
            if share < 1:
                left = [user for user, rates in zip(left, self._rates(moved[left]), strict=True) if self._short(rates)]
        return moved, back

    def _short(self, shown: Mapping[str, float]) -> bool:
        return any(rate < self._enough[rule] for rule, rate in shown.items())

    @cached_property
    def _enough(self) -> dict[str, float]:
        [shown] = self._rates(self._start[None])
        return {rule: min(self._rules[rule].aim(), rate) for rule, rate in shown.items()}

    def _rates(self, flat: Float[Tensor, "users params"]) -> list[dict[str, float]]:
        """By user and rule: the share of his answers that have what it asks for."""
        asked, tokens = [self._prompts] * flat.shape[0], self._max_new_tokens
        with self._adapted.using(flat):
            written = self._adapted.generate(asked, tokens, temperature=1.0, seed=self._seed)
        texts = [[answer_text(self._adapted, answer) for answer in own] for own in written]
        return [{rule: met / n for rule, (n, met) in self._required.met(own).items()} for own in texts]
