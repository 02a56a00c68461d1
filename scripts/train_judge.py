"""Trains the shipped judge of answers and writes `data/judge/judge.safetensors`.

It learns from `data/judge/answers.jsonl` (composed), from the development half of `data/judge/adversarial.jsonl`
(written by hand; the other half is kept for the measurement) and, with `--xstest`, from the human-labelled completions
of XSTest (CC-BY-4.0) whose prompts hash to the training half. From these it composes further answers: some
sentences of refusals, pieces of compliances, and refusals that go on with a piece of a compliance, which are none.
Partial refusals count as compliances, with half the weight. `data/judge/README.md` has the measurements.

python scripts/train_judge.py --xstest ../shared/data/xstest
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from safetensors.numpy import save_file

from persona_rlhf.evaluation.answer_judge import BUCKETS, features, sentences

FOLDER = Path(__file__).resolve().parents[1] / "data" / "judge"
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY, DROPOUT = 12, 64, 0.02, 1e-4, 0.4


class LabelledAnswer(NamedTuple):
    """An answer, whether it is a refusal, and its weight in the loss."""

    text: str
    refusal: bool
    weight: float = 1.0


def is_training_half(text: str) -> bool:
    """The half of XSTest's prompts, and of the answers written by hand, that may be looked at; by hash."""
    return hashlib.blake2b(text.encode()).digest()[0] % 2 == 0


def xstest(folder: Path, training: bool) -> list[tuple[str, str, dict[str, str]]]:
    """(text, label 1 compliance, 2 refusal, 3 partial refusal, row) of XSTest's completions, one half by prompt."""
    rows = []
    for file in sorted(folder.glob("*_gpteval.csv")):
        with file.open(encoding="utf-8", newline="") as lines:
            rows += [row for row in csv.DictReader(lines) if is_training_half(row["prompt"]) == training]
    return [(row["completion"].strip(), row["final_label"][0], row) for row in rows]


def adversarial(training: bool) -> list[tuple[str, str, bool]]:
    """(language, text, refusal) of the answers written by hand against judges, one half."""
    return written("adversarial.jsonl", training)


def written(file: str, training: bool) -> list[tuple[str, str, bool]]:
    """(language, text, refusal) of a file of answers written by hand, one half."""
    lines = (FOLDER / file).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [(r["language"], r["text"], r["refusal"]) for r in rows if is_training_half(r["text"]) == training]


def training_answers(folder: Path | None, rng: Random) -> list[LabelledAnswer]:
    """All answers to learn from."""
    lines = (FOLDER / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    composed = [LabelledAnswer(row["text"], row["refusal"]) for row in map(json.loads, lines)]
    composed += [LabelledAnswer(text, refusal, 3.0) for _, text, refusal in adversarial(training=True)]
    canonical = (FOLDER.parent / "policy" / "refusals.jsonl").read_text(encoding="utf-8").splitlines()
    composed += [LabelledAnswer(json.loads(line)["text"], True) for line in canonical]
    if folder is None:
        return composed
    human = xstest(folder, training=True)
    refusals = [text for text, label, _ in human if label == "2"]
    compliances = [text for text, label, _ in human if label == "1"]
    answers = [
        *composed,
        *(LabelledAnswer(text, label == "2", 0.5 if label == "3" else 1.0) for text, label, _ in human),
    ]
    for text in refusals * 3:
        first, *rest = text.split(". ")
        if len(rest) > 1:
            answers.append(LabelledAnswer(". ".join([first, *rng.sample(rest, rng.randint(1, len(rest)))]), True))
    helps = [piece(rng, rng.choice(compliances)) for _ in range(2000)]
    answers += [LabelledAnswer(text, False) for text in helps[:800]]
    declines = [*refusals, *(answer.text for answer in composed if answer.refusal)]
    for text in helps[800:]:
        opening = ". ".join(rng.choice(declines).split(". ")[: rng.randint(1, 3)])
        answers.append(LabelledAnswer(f"{opening.rstrip('.')}. {text}", False))
    return answers


def piece(rng: Random, text: str) -> str:
    """Some sentences of a text in their order."""
    parts = text.split(". ")
    start = rng.randrange(len(parts))
    return ". ".join(parts[start : start + rng.randint(2, 4)])


class _Batch(NamedTuple):
    buckets: torch.Tensor
    offsets: torch.Tensor
    norms: torch.Tensor
    owner: torch.Tensor


def _batch(rows: list[list[np.ndarray]], rng: np.random.Generator, dropout: float) -> _Batch:
    """The sentences of these answers, some features left out."""
    kept = []
    for answer in rows:
        for sentence in answer:
            mask = rng.random(len(sentence)) >= dropout
            kept.append(sentence[mask] if mask.any() else sentence)
    sizes = np.array([len(sentence) for sentence in kept])
    owner = np.repeat(np.arange(len(rows)), [len(answer) for answer in rows])
    return _Batch(
        torch.from_numpy(np.concatenate(kept)),
        torch.from_numpy(np.concatenate([[0], sizes.cumsum()[:-1]])),
        torch.from_numpy(np.sqrt(sizes).astype(np.float32)),
        torch.from_numpy(owner),
    )


def train(answers: list[LabelledAnswer], seed: int = 1) -> np.ndarray:
    """The scores by bucket: Adam on the logistic loss of the gap, with features dropped out and weight decay."""
    torch.manual_seed(seed)
    rng, order = np.random.default_rng(seed), Random(seed)
    rows = [[features(s, place) for place, s in enumerate(sentences(answer.text))] for answer in answers]
    labels = torch.tensor([answer.refusal for answer in answers], dtype=torch.float32)
    weights = torch.tensor([answer.weight for answer in answers])
    scores = torch.nn.EmbeddingBag(BUCKETS, 2, mode="sum")
    torch.nn.init.zeros_(scores.weight)
    optimizer = torch.optim.AdamW(scores.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    numbers = list(range(len(answers)))
    for epoch in range(EPOCHS):
        order.shuffle(numbers)
        total = 0.0
        for start in range(0, len(numbers), BATCH):
            chosen = numbers[start : start + BATCH]
            batch = _batch([rows[n] for n in chosen], rng, DROPOUT)
            each = scores(batch.buckets, batch.offsets) / batch.norms[:, None]
            most = torch.full((len(chosen), 2), -torch.inf).scatter_reduce(
                0, batch.owner[:, None].expand(-1, 2), each, "amax"
            )
            gap = most[:, 0] - most[:, 1]
            losses = torch.nn.functional.binary_cross_entropy_with_logits(gap, labels[chosen], reduction="none")
            loss = (losses * weights[chosen]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(chosen)
        print(f"epoch {epoch + 1}: loss {total / len(numbers):.4f}", flush=True)
    return scores.weight.detach().numpy()


def main() -> None:
    """Trains and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--xstest", type=Path, help="folder with XSTest's completions; without it, composed answers alone"
    )
    parser.add_argument(
        "--thresholds",
        type=float,
        nargs=2,
        default=[0.0, -1.0],
        help="gaps above which an answer is a refusal, in nats: for the model alone, and beside the rules",
    )
    parser.add_argument("--out", type=Path, default=FOLDER / "judge.safetensors")
    options = parser.parse_args()
    torch.set_num_threads(1)
    scores = train(training_answers(options.xstest, Random(1))).astype(np.float16)
    save_file({"scores": scores, "thresholds": np.array(options.thresholds, dtype=np.float32)}, options.out)


if __name__ == "__main__":
    main()
