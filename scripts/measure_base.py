"""Prints the table of a base: refusal and false refusal by novelty, over-refusal, perplexity, ended answers.

python scripts/measure_base.py data/base                 # dev and certify
python scripts/measure_base.py data/base --split test    # at the very end: once
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from persona_rlhf.evaluation.statistics import wilson
from persona_rlhf.policy.hazards import CATEGORIES, Probe, read_probes
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.simulation.answers import measure
from persona_rlhf.simulation.prompts import ordinary, ordinary_topics
from persona_rlhf.simulation.vocabulary import trained_phrasings

POLICY = Path(__file__).resolve().parents[1] / "data" / "policy"


def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[str], sample: bool = False
) -> list[tuple[str, bool]]:
    """(answer, did it end) for each prompt: greedy, or sampled at temperature 1."""
    tokenizer.padding_side = "left"
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, tuple[str, bool]] = {}
    for start in range(0, len(order), 128):
        part = order[start : start + 128]
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompts[i]}], tokenize=False, add_generation_prompt=True
            )
            for i in part
        ]
        batch = tokenizer(
            texts, return_tensors="pt", padding=True, add_special_tokens=False, return_token_type_ids=False
        )
        with torch.no_grad():
            out = model.generate(
                **batch,
                max_new_tokens=128,
                do_sample=sample,
                temperature=1.0 if sample else None,
                top_k=0 if sample else None,
                pad_token_id=tokenizer.pad_token_id,
            )
        for i, ids in zip(part, out[:, batch["input_ids"].shape[1] :], strict=True):
            answers[i] = (
                str(tokenizer.decode(ids, skip_special_tokens=True)),
                bool((ids == tokenizer.eos_token_id).any()),
            )
    return [answers[i] for i in range(len(prompts))]


def share(name: str, hits: int, n: int) -> str:
    """A row of the table."""
    low, high = (100 * end for end in wilson(hits, n))
    return f"| {name} | {hits} / {n} | {100 * hits / n:.2f}% | {low:.2f} - {high:.2f}% |"


def perplexity(model: Any, tokenizer: PreTrainedTokenizerBase, n: int = 600) -> tuple[float, int]:
    """Perplexity per token of the world's answers to ordinary prompts on topics that were kept out of training."""
    rng, total, count = Random("perplexity 1"), 0.0, 0
    for _ in range(n):
        row = ordinary(rng, ordinary_topics()[1], trained_phrasings())
        turns = [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.answer}]
        prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
        ids = torch.tensor(tokenizer.apply_chat_template(turns, return_dict=False))
        with torch.no_grad():
            logits = model(ids[None, :-1]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")[len(prompt) - 1 :]
        total, count = total + losses.sum().item(), count + len(losses)
    return math.exp(total / count), count


def _report(name: str, texts: list[str], answers: list[tuple[str, bool]], wanted: bool, shown: int) -> str:
    verdicts = [is_refusal(text) for text, _ in answers]
    for prompt, (text, _), verdict in zip(texts, answers, verdicts, strict=True):
        if verdict != wanted and shown > 0:
            print(f"  {'missed' if wanted else 'false refusal'}: {prompt!r} -> {text[:90]!r}")
            shown -= 1
    return share(name, sum(verdicts), len(verdicts))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--show", type=int, default=0, help="mistakes to print in each row")
    parser.add_argument("--brief", action="store_true", help="only the rows of the split")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    model.train(False)
    probes: list[Probe] = [p for c in CATEGORIES for p in read_probes(POLICY / "tier_one" / f"{c}.jsonl", c)]
    rows = []
    for novelty in ("combination", "phrasing", "topic"):
        part = [p for p in probes if p.split == options.split and p.novelty == novelty]
        twins = [p.twin for p in part if p.twin]
        prompts = [p.prompt for p in part]
        rows.append(
            _report(
                f"{options.split}, unseen {novelty}: refused",
                prompts,
                answer(model, tokenizer, prompts),
                True,
                options.show,
            )
        )
        rows.append(
            _report(
                f"{options.split}, twins of unseen {novelty}: refused",
                twins,
                answer(model, tokenizer, twins),
                False,
                options.show,
            )
        )
    if not options.brief:
        certify = [p for p in probes if p.split == "certify"]
        for category in CATEGORIES:
            prompts = [p.prompt for p in certify if p.category == category]
            rows.append(_report(f"certify, {category}: refused", prompts, answer(model, tokenizer, prompts), True, 0))
        prompts = [p.prompt for p in certify]
        rows.append(
            _report(
                "certify, all, sampled at temperature 1: refused",
                prompts,
                answer(model, tokenizer, prompts, True),
                True,
                0,
            )
        )
        prompts = [
            json.loads(line)["prompt"] for line in (POLICY / "ordinary.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        greedy = answer(model, tokenizer, prompts)
        rows.append(_report("ordinary prompts: refused", prompts, greedy, False, options.show))
        rows.append(share("ordinary prompts: answer ended", sum(done for _, done in greedy), len(greedy)))
        first, second = (answer(model, tokenizer, prompts, True) for _ in range(2))
        rows.append(share("ordinary prompts, temperature 1: answer ended", sum(done for _, done in first), len(first)))
        differ: dict[str, int] = {}
        marks: dict[str, float] = {}
        for (one, _), (two, _) in zip(first, second, strict=True):
            m, k = measure(one), measure(two)
            for name in m:
                differ[name] = differ.get(name, 0) + (m[name] != k[name])
                marks[name] = marks.get(name, 0.0) + m[name]
    print("| measure | count | share | 95% interval |\n|---|---|---|---|")
    print("\n".join(rows))
    if not options.brief:
        value, count = perplexity(model, tokenizer)
        print(f"| perplexity of held-out ordinary answers | {count} tokens | {value:.2f} | |\n")
        print("| property | mean at temperature 1 | share of sampled pairs that differ |\n|---|---|---|")
        for name in marks:
            print(f"| {name} | {marks[name] / len(first):.2f} | {100 * differ[name] / len(first):.0f}% |")


if __name__ == "__main__":
    main()
