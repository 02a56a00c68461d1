"""Measures the judges of `gate.judge` on answers whose labels people gave, and prints counts with 95% intervals.

- Answers written by hand, by half and language: against judges (`data/judge/adversarial.jsonl`), and in the style of
  assistants (`modern.jsonl`).
- `--xstest FOLDER`: XSTest's completions, by prompt: the half that the shipped model learnt from, and the other one.
  A partial refusal is a compliance. The last rows are the counts that `gate.judge_calibration: shipped` stands for.
- `--pyrit FILE`: PyRIT's `refusal.csv` (105 labels). PyRIT calls answers off topic refusals; they are counted apart,
  by the rows that a person named in `--off-topic`.
- `--answers FILE`: JSON lines with `answer` and `refusal`, such as a base's answers read by a person.

python scripts/measure_judge.py --xstest ../shared/data/xstest
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable
from itertools import dropwhile
from pathlib import Path
from typing import NamedTuple

import torch
from train_judge import written, xstest

from persona_rlhf.config.evaluation import GateSettings
from persona_rlhf.evaluation.answer_judge import judges_of
from persona_rlhf.evaluation.statistics import wilson


class Labelled(NamedTuple):
    """An answer as text, and whether people call it a refusal."""

    text: str
    refusal: bool


def table(name: str, answers: Iterable[Labelled], shown: bool) -> None:
    """Prints a line for each judge: compliances called refusals, and refusals that it finds."""
    rows = list(answers)
    for kind in ("rules", "model", "both"):
        judge = judges_of(GateSettings(judge=kind), torch.device("cpu")).text_judge()
        wrong = [row for row in rows if judge(row.text) != row.refusal]
        false, refusals = sum(not row.refusal for row in wrong), sum(row.refusal for row in rows)
        compliances, missed = len(rows) - refusals, len(wrong) - false
        print(f"| {name} | {kind} | {share(false, compliances)} | {share(refusals - missed, refusals)} |")
        if shown:
            for row in wrong:
                print(f"    {'missed' if row.refusal else 'false'}: {row.text[:160]!r}")


def share(hits: int, n: int) -> str:
    """A count with its interval."""
    if not n:
        return "-"
    low, high = wilson(hits, n)
    return f"{hits} of {n} ({100 * low:.1f} to {100 * high:.1f}%)"


def pyrit(file: Path) -> list[Labelled]:
    """PyRIT's answers with the labels of people; comments come before the names of the columns."""
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(dropwhile(lambda line: line.startswith("#"), lines)))
    return [Labelled(row["assistant_response"].strip(), float(row["human_score"]) == 1) for row in rows]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--development", action="store_true", help="the halves that may be looked at, and no others")
    parser.add_argument("--xstest", type=Path)
    parser.add_argument("--pyrit", type=Path)
    parser.add_argument("--off-topic", type=int, nargs="*", default=[], help="rows of --pyrit, from 0")
    parser.add_argument("--answers", type=Path)
    parser.add_argument("--show", action="store_true", help="print the errors")
    options = parser.parse_args()
    print("| answers | judge | compliances called refusals | refusals found |\n|---|---|---|---|")
    for training in (True,) if options.development else (True, False):
        half = "development half" if training else "held-out half"
        for language in ("en", "fr"):
            for name, file in (("against judges", "adversarial.jsonl"), ("as assistants write", "modern.jsonl")):
                rows = [Labelled(text, refusal) for code, text, refusal in written(file, training) if code == language]
                table(f"by hand, {name}, {language}, {half}", rows, options.show)
        if options.xstest:
            human = xstest(options.xstest, training)
            table(
                f"XSTest, {half}",
                (Labelled(text, label == "2") for text, label, _ in human if label != "3"),
                options.show,
            )
            unsafe = [(text, label) for text, label, row in human if "contrast" in row["type"]]
            table(
                f"XSTest, unsafe prompts, partial as compliance, {half}",
                (Labelled(t, n == "2") for t, n in unsafe),
                options.show,
            )
    if options.pyrit:
        rows = pyrit(options.pyrit)
        table("PyRIT, all", rows, False)
        table("PyRIT, off topic", (rows[n] for n in options.off_topic), options.show)
        table("PyRIT, the rest", (row for n, row in enumerate(rows) if n not in options.off_topic), options.show)
    if options.answers:
        lines = map(json.loads, options.answers.read_text(encoding="utf-8").splitlines())
        table(options.answers.stem, (Labelled(row["answer"], row["refusal"]) for row in lines), options.show)


if __name__ == "__main__":
    main()
