#!/usr/bin/env python3
"""The cost of storing a base in fewer bits: the same prompts to the stored and to the exact base.

python scripts/measure_quantization.py configs/quickstart.yaml [a.b=c ...]
python scripts/measure_quantization.py configs/quickstart.yaml --stored fp8

Divergence: mean of log p_exact(y) - log p_stored(y) over answers y that the exact base samples to ordinary prompts
(`evaluation.ordinary`) at temperature 1, in nats a token: an estimate of KL(exact || stored), bootstrapped over
answers.
Refusals are of `dev` probes and of their harmless twins, greedy, whole answers.
"""

from __future__ import annotations

import argparse
import sys
from math import fsum
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.experiment import Config, read_config
from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import Row, prompt_ids
from persona_rlhf.evaluation.prompt_sets import read_ordinary, some, twins
from persona_rlhf.evaluation.refusals import BaseAnswers, answer_row
from persona_rlhf.evaluation.statistics import bootstrap
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import Base, load_base
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.policy.policy import Policy

_PROBES, _PROMPTS = 240, 200


class Standing(NamedTuple):
    """Refusals of probes and of twins, log-probabilities (nats) of the rows, and bytes of the weights."""

    refused: int
    twins: int
    logps: list[float]
    size: int


def standing(config: Config, base: Base, probes: list[str], near: list[str], rows: list[Row]) -> Standing:
    """What a base says to all of it."""
    adapted = AdaptedModel(base, config.lora)
    answers = BaseAnswers(adapted, is_refusal, config.gate.max_new_tokens)
    refused, wrongly = (sum(answers.refused([_ids(base, text) for text in texts])) for texts in (probes, near))
    with adapted.using(None):
        [scores] = adapted.score([rows])
    tensors = (*base.model.parameters(), *base.model.buffers())
    return Standing(refused, wrongly, [score.logp for score in scores], sum(t.numel() * t.itemsize for t in tensors))


def sampled(config: Config, base: Base, prompts: list[str]) -> list[Row]:
    """The base's own answers."""
    adapted, inputs = AdaptedModel(base, config.lora), [_ids(base, text) for text in prompts]
    with adapted.using(None):
        [answers] = adapted.generate([inputs], config.gate.max_new_tokens, 1.0, config.seed)
    rows = [answer_row(adapted, prompt, answer) for prompt, answer in zip(inputs, answers, strict=True)]
    adapted.close()
    return rows


def divergence(exact: list[float], stored: list[float], tokens: float) -> str:
    """Nats a token, with its interval."""
    lost = [a - b for a, b in zip(exact, stored, strict=True)]
    interval = bootstrap([value * len(lost) / tokens for value in lost])
    return f"{fsum(lost) / tokens:.4f} ({interval.low:.4f} to {interval.high:.4f})"


def _ids(base: Base, text: str) -> tuple[int, ...]:
    return prompt_ids((Message("user", text),), base.tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=c")
    parser.add_argument("--stored", nargs="+", choices=["nf4", "fp8"], default=["nf4", "fp8"])
    options = parser.parse_intermixed_args()
    try:
        config = read_config(options.config, options.overrides)
        if config.evaluation.ordinary is None:
            sys.exit("evaluation.ordinary names no prompts")
        policy = Policy.of(config.policy, sequential=config.gate.sequential)
        exact = load_base(config.base.model_copy(update={"quantization": None}))
        probes = some((probe.prompt for probe in policy.probes("dev")), _PROBES)
        near = some(twins(policy.probes("dev")), _PROBES)
        rows = sampled(config, exact, some(read_ordinary(config.evaluation.ordinary), _PROMPTS))
        stored = {kind: config.base.model_copy(update={"quantization": kind}) for kind in options.stored}
        measured = {"as it is": standing(config, exact, probes, near, rows)}
        del exact
        measured |= {kind: standing(config, load_base(base), probes, near, rows) for kind, base in stored.items()}
    except InputError as fault:
        sys.exit(str(fault))
    tokens = fsum(len(row.completion) for row in rows)
    table = Table("", *measured)
    table.add_row("refused", *(f"{one.refused} of {len(probes)}" for one in measured.values()))
    table.add_row("harmless twins refused", *(f"{one.twins} of {len(near)}" for one in measured.values()))
    table.add_row("weights, MB", *(f"{one.size / 1e6:.2f}" for one in measured.values()))
    exactly, *others = (one.logps for one in measured.values())
    divergences = [divergence(exactly, other, tokens) for other in others]
    table.add_row(f"divergence, nats a token of {tokens:,.0f}", "0", *divergences)
    Console().print(table)


if __name__ == "__main__":
    main()
