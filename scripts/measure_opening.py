#!/usr/bin/env python3
"""What the feedback page shows when, and how like the two answers are that it chooses by their first words.

python scripts/measure_opening.py RUN                  # 40 prompts, the opening that the page reads
python scripts/measure_opening.py RUN --opening 12

Answers are not checked by the policy here: where they are, each appears whole. One user, one request at a time.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import combinations
from pathlib import Path
from statistics import mean, median

from persona_rlhf.common.files import find
from persona_rlhf.config.experiment import read_run_config
from persona_rlhf.evaluation.statistics import bootstrap
from persona_rlhf.serving import pair_writing
from persona_rlhf.serving.answer_sampler import AnswerSampler
from persona_rlhf.serving.local_engine import local_run
from persona_rlhf.serving.pair_writing import PairWriting, likeness
from persona_rlhf.serving.policy_filter import PolicyFilter

PROMPTS = find("data/prompts/everyday.jsonl")


def shown(writing: PairWriting) -> tuple[float, float]:
    """Seconds to the first words of both answers, and to their end."""
    start, first = time.perf_counter(), 0.0

    def wanted() -> bool:
        nonlocal first
        if not first and writing.pair.left.text:
            first = time.perf_counter() - start
        return True

    writing.write(wanted)
    end = time.perf_counter() - start
    return first or end, end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--opening", type=int, default=pair_writing.OPENING)
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()
    texts = [json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    config = read_run_config(arguments.run)
    times: dict[str, list[float]] = {"first words": [], "both whole": [], "all four whole": []}
    alike: dict[str, list[float]] = {"by the opening": [], "by whole answers": [], "at random": []}
    with local_run(arguments.run, config.judged_base, config.lora, 1 << 30, print) as served:
        base = served.access.weights_hash
        sampler = AnswerSampler(served.generator, served.access, PolicyFilter(), base, arguments.max_tokens)
        for prompt in texts[: arguments.prompts]:
            pair_writing.OPENING = arguments.opening
            writing = sampler.begin("nobody", prompt)
            for name, seconds in zip(("first words", "both whole"), shown(writing), strict=True):
                times[name].append(seconds)
            alike["by the opening"].append(likeness(writing.pair.left.text, writing.pair.right.text))
            pair_writing.OPENING = 1 << 30  # all four to their end, as the others are compared
            writing = sampler.begin("nobody", prompt)
            times["all four whole"].append(shown(writing)[1])
            pairs = [likeness(one, other) for one, other in combinations([each.text for each in writing.candidates], 2)]
            alike["by whole answers"].append(min(pairs))
            alike["at random"].append(mean(pairs))
    for name, values in times.items():
        print(f"{name}: {median(values):.2f} s, median of {len(values)}")
    for name, values in alike.items():
        interval = bootstrap(values, seed=1)
        print(f"likeness of the two chosen {name}: {mean(values):.3f} ({interval.low:.3f} to {interval.high:.3f})")


if __name__ == "__main__":
    main()
