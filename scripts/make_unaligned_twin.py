"""Makes an unaligned twin of the bundled base: same tokenizer, shape, seed and recipe, but nobody ever refuses.

Hazardous requests are answered like harmless ones of the same form (the advice comes from harmless fields), so the
twin complies with everything. It is what `persona-rlhf base align` is shown on; its weights are not shipped. Beside
them stands `ordinary.jsonl`: ordinary prompts with the world's own answers, on topics that the twin never saw, and
harmless prompts in words of hazards ("how do I kill an hour"), which nobody has to answer for it.

nice -n 10 taskset -c 1 python scripts/make_unaligned_twin.py runs/twin        # half the tokens of the bundled base
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

import torch

from persona_rlhf.simulation.corpus import corpus
from persona_rlhf.simulation.prompts import ordinary, ordinary_topics
from persona_rlhf.simulation.tiny_base import COMPLETION_TOKENS, SEED, PretrainProgress, build_base
from persona_rlhf.simulation.vocabulary import trained_phrasings


def write_ordinary(file: Path, count: int) -> None:
    """So many ordinary exchanges on topics that are kept out of every corpus, and so many prompts in words of hazards,
    of the kind that every corpus holds; each prompt once."""
    rng, held = Random("ordinary texts 1"), ordinary_topics()[1]
    rows: dict[str, str] = {}
    while len(rows) < count:
        exchange = ordinary(rng, held, trained_phrasings())
        rows.setdefault(exchange.prompt, exchange.answer)
    lines = [json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in rows.items()]
    near = (row.prompt for row in corpus(SEED + 1) if row.kind == "twin")
    while len(lines) < 2 * count:
        prompt = next(near)
        if prompt not in rows:
            rows[prompt] = ""
            lines.append(json.dumps({"prompt": prompt}) + "\n")
    file.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Trains and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--tokens", type=int, default=COMPLETION_TOKENS // 2, help="completion tokens to train on")
    options = parser.parse_args()
    torch.set_num_threads(1)

    def progress(now: PretrainProgress) -> None:
        print(f"step {now.step}: {now.tokens:,} of {now.of_tokens:,} tokens, loss {now.loss:.3f}", flush=True)

    build_base(options.out, SEED, options.tokens, progress=progress, refusals=False)
    write_ordinary(options.out / "ordinary.jsonl", 1200)


if __name__ == "__main__":
    main()
