#!/usr/bin/env python3
"""Whether plain PEFT writes the answers that the fleet's engine writes: each exported adapter over its base, greedy.

    python scripts/check_peft.py runs/smollm2 [--prompts 20] [--tokens 48]

Prompts are held-out ones of the run's own users, and everyday ones. Both sides compute in float32 with the tokens of
the base's chat template. The exit code is 1 where an answer differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from persona_rlhf.config.experiment import read_run_config
from persona_rlhf.data.pairs import read_pairs
from persona_rlhf.data.tokenize import prompt_ids
from persona_rlhf.evaluation.prompt_sets import some
from persona_rlhf.models.adapted_model import AdaptedModel
from persona_rlhf.models.base import Base, load_base
from persona_rlhf.release.adapter import read_adapter
from persona_rlhf.release.results import read_results


def engine_answers(
    adapted: AdaptedModel, folder: Path, prompts: Sequence[tuple[int, ...]], tokens: int
) -> list[tuple[int, ...]]:
    """Greedy answers of the fleet's engine, without end tokens."""
    flat = read_adapter(folder, list(adapted.spans.values()))[None]
    with adapted.using(flat):
        (written,) = adapted.generate([prompts], tokens)
    return [answer.ids for answer in written]


@torch.no_grad()
def peft_answers(
    model: PreTrainedModel, base: Base, folder: Path, prompts: Sequence[tuple[int, ...]], tokens: int
) -> list[tuple[int, ...]]:
    """Greedy answers of PEFT and transformers, one prompt at a time, without end tokens."""
    adapted = PeftModel.from_pretrained(model, folder)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        whole = adapted.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
        answer = whole[0, len(prompt) :].tolist()
        ends = [at for at, token in enumerate(answer) if token in base.eos_ids]
        answers.append(tuple(answer[: ends[0]] if ends else answer))
    adapted.unload()
    return answers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--prompts", type=int, default=20, help="prompts of each adapter")
    parser.add_argument("--tokens", type=int, default=48, help="most tokens of an answer")
    options = parser.parse_args()
    config = read_run_config(options.run)
    base = load_base(config.base.model_copy(update={"device": "cpu", "dtype": "float32"}))
    adapted = AdaptedModel(base, config.lora)
    model = AutoModelForCausalLM.from_pretrained(config.base.model, dtype=torch.float32)
    pairs = read_pairs(config.users.path, config.users.heldout)
    texts = some((pair.prompt[-1].content for pair in pairs if len(pair.prompt) == 1), options.prompts)
    turns = [next(pair.prompt for pair in pairs if pair.prompt[-1].content == text) for text in texts]
    prompts = [prompt_ids(turn, base.tokenizer) for turn in turns]
    same = total = 0
    for result in read_results(options.run):
        if result.path is None:
            continue
        folder = options.run / result.path
        answers = engine_answers(adapted, folder, prompts, options.tokens)
        of_peft = peft_answers(model, base, folder, prompts, options.tokens)
        equal = sum(one == other for one, other in zip(answers, of_peft, strict=True))
        print(f"{result.user_id}: {equal} of {len(prompts)} greedy answers are the same", flush=True)
        same, total = same + equal, total + len(prompts)
    print(f"{same} of {total} greedy answers of PEFT are those of the fleet's engine")
    return 0 if same == total > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
