"""An adapter that misses a requirement, moved back toward the warm start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import prompt_ids
from persona_rlhf.evaluation.metrics import RequirementPrompts
from persona_rlhf.evaluation.refusals import answer_text
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.policy.properties import REPAIRED
from persona_rlhf.policy.rules import Requirement

SHARES_BACK = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Weights of the provider's adapter in the interpolation, in the order in which they are tried."""


class WarmStartInterpolation:
    """Interpolates an adapter toward the warm start until it meets the requirements on `dev` prompts.

    Every user's adapter starts from the provider's, which was trained on the requirements; a strong taste against them
    can undo that. So before the gate each adapter answers up to `most` `dev` prompts a rule, sampled at temperature 1.
    Where too few answers have a rule's property, the adapter moves along the straight line to the provider's until
    enough do, at the latest onto it. Enough is the share that training aims at (`Requirement.aim`), or the provider's
    own, if that is less. A choice on `dev` prompts is no bound: the `test` prompts measure the result. Rules that are
    not trained are left out: the provider's adapter does not meet them either.
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
        self._required = RequirementPrompts(list(self._rules.values()), most, split="dev")
        tokenizer = adapted.base.tokenizer
        self._prompts = [prompt_ids((Message("user", text),), tokenizer) for text in self._required.prompts]

    @torch.no_grad()
    def __call__(self, flat: Float[Tensor, "users params"]) -> tuple[Float[Tensor, "users params"], list[float]]:
        """The adapters as they go to the gate, and the weight of the provider's adapter in each (0: unchanged)."""
        moved, back = flat.clone(), [0.0] * flat.shape[0]
        short = list(range(flat.shape[0])) if self._prompts else []
        for share in SHARES_BACK:
            if not short:
                break
            moved[short] = torch.lerp(flat[short], self._start.to(flat), share)
            for user in short:
                back[user] = share
            if share < 1:
                rates = self._rates(moved[short])
                short = [user for user, shown in zip(short, rates, strict=True) if self._short(shown)]
        return moved, back

    def _short(self, shown: Mapping[str, float]) -> bool:
        return any(rate < self._enough[rule] for rule, rate in shown.items())

    @cached_property
    def _enough(self) -> dict[str, float]:
        [shown] = self._rates(self._start[None])
        return {rule: min(self._rules[rule].aim(), rate) for rule, rate in shown.items()}

    def _rates(self, flat: Float[Tensor, "users params"]) -> list[dict[str, float]]:
        """By user and rule: the share of the user's answers that have the rule's property."""
        prompts, tokens = [self._prompts] * flat.shape[0], self._max_new_tokens
        with self._adapted.using(flat):
            written = self._adapted.generate(prompts, tokens, temperature=1.0, seed=self._seed)
        texts = [[answer_text(self._adapted, answer) for answer in answers] for answers in written]
        return [{rule: met / n for rule, (n, met) in self._required.met(answers).items()} for answers in texts]
