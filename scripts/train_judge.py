"""Trains the shipped judge of answers and writes `data/judge/judge.safetensors`.

It learns from `data/judge/answers.jsonl` (composed), from the development halves of `data/judge/adversarial.jsonl` and
`modern.jsonl` (written by hand; the other halves are kept for the measurement) and, with `--xstest`, from the
human-labelled completions of XSTest (CC-BY-4.0) whose prompts hash to the training half. From these and from
`sentences.yaml` it mixes further answers: refusals that go on with sentences of others, and the same with a piece of
help among them, which are none. Partial refusals count as compliances, with half the weight.
`data/judge/README.md` has the measurements.

python scripts/train_judge.py --xstest ../shared/data/xstest
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
import yaml
from safetensors.numpy import save_file

from persona_rlhf.evaluation.answer_judge import BUCKETS, answer_features
from persona_rlhf.policy.judges import signs

FOLDER = Path(__file__).resolve().parents[1] / "data" / "judge"
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY, DROPOUT = 6, 64, 0.02, 1e-4, 0.4


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


def modern(training: bool) -> list[tuple[str, str, bool]]:
    """The same of the answers written by hand in the style of assistants: long, with lists and explanations."""
    return written("modern.jsonl", training)


def written(file: str, training: bool) -> list[tuple[str, str, bool]]:
    """(language, text, refusal) of a file of answers written by hand, one half."""
    lines = (FOLDER / file).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [(r["language"], r["text"], r["refusal"]) for r in rows if is_training_half(r["text"]) == training]


def training_answers(folder: Path | None, rng: Random) -> list[LabelledAnswer]:
    """All answers to learn from."""
    lines = (FOLDER / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    composed = [LabelledAnswer(row["text"], row["refusal"]) for row in map(json.loads, lines)]
    by_hand = [LabelledAnswer(text, refusal, 3.0) for _, text, refusal in adversarial(True) + modern(True)]
    canonical = (FOLDER.parent / "policy" / "refusals.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [*composed, *by_hand, *(LabelledAnswer(json.loads(line)["text"], True) for line in canonical)]
    human = [] if folder is None else xstest(folder, training=True)
    answers += [LabelledAnswer(text, label == "2", 0.5 if label == "3" else 1.0) for text, label, _ in human]
    real = [*(answer.text for answer in by_hand if answer.refusal), *(text for text, label, _ in human if label == "2")]
    helps = [answer.text for answer in by_hand if not answer.refusal]
    answers += sentence_mixtures(rng)
    answers += mixtures(rng, real, helps, [text for text, label, _ in human if label == "1"])
    declines = [*real, *(answer.text for answer in composed if answer.refusal)]
    for _ in range(600 if human else 0):
        opening = "".join(parts(rng.choice(declines))[: rng.randint(1, 3)])
        text = piece(rng, rng.choice([text for text, label, _ in human if label == "1"]))
        answers.append(LabelledAnswer(f"{opening.strip()} {text}", False))
    return answers


def mixtures(rng: Random, refusals: list[str], helps: list[str], compliances: list[str]) -> Iterator[LabelledAnswer]:
    """Answers of sentences of several ones: so the judge learns which sentences refuse or help, and which do neither.

    Refusals that begin as one does and go on with sentences of others; the same around a whole compliance of `helps`;
    and pieces of `compliances` alone.
    """
    later = [part for text in refusals for part in parts(text)[1:]]
    for _ in range(1500):
        first, *rest = parts(rng.choice(refusals))
        while rest and not any(sign.startswith("declines") for sign in signs(first.lower())):
            first += rest.pop(0)
        yield LabelledAnswer(first + "".join(rng.sample(later, rng.randint(0, 8))), True)
    for _ in range(1500):
        before, after = ("".join(rng.sample(later, rng.randint(0, 4))) for _ in range(2))
        decline = parts(rng.choice(refusals))[0] if rng.random() < 0.5 else ""
        yield LabelledAnswer(f"{decline}{before}{rng.choice(helps)} {after}", False)
    for _ in range(800 if compliances else 0):
        yield LabelledAnswer(piece(rng, rng.choice(compliances)), False)


def sentence_mixtures(rng: Random) -> Iterator[LabelledAnswer]:
    """Answers of the sentences of `sentences.yaml`: refusals that go on safely, and the same with help among it.

    Safe sentences alone are no refusal.
    """
    for language, count in (("en", 3600), ("fr", 1800)):
        lists = yaml.safe_load((FOLDER / "sentences.yaml").read_text(encoding="utf-8"))[language]
        for number in range(count):
            kind = ("refusal", "refusal", "refusal", "help", "help", "help", "safe talk")[number % 7]
            safe = rng.sample(lists["safe"], rng.randint(kind == "safe talk", 7))
            place = rng.choice([0, 0, 0, rng.randint(0, min(3, len(safe)))])
            declines = kind == "refusal" or (kind == "help" and rng.random() < 0.6)
            middle = [rng.choice(lists["declines"])] if declines else []
            if kind == "help":
                middle += rng.sample(lists["helps"], rng.randint(1, 3))
            chosen = [*safe[:place], *middle, *safe[place:]]
            text = "".join(sentence + rng.choice([" ", " ", "\n", "\n\n"]) for sentence in chosen)
            yield LabelledAnswer(text, kind == "refusal")


def parts(text: str) -> list[str]:
    """The sentences and lines of a text with the space after each."""
    return re.findall(r"\S.*?(?:[.!?](?:\s+|$)|\n+|$)", text + "\n")


def piece(rng: Random, text: str) -> str:
    """Some sentences of a text in their order."""
    sentences = text.split(". ")
    start = rng.randrange(len(sentences))
    return ". ".join(sentences[start : start + rng.randint(2, 4)])


class _Batch(NamedTuple):
    buckets: torch.Tensor
    offsets: torch.Tensor
    norms: torch.Tensor
    owner: torch.Tensor


def _batch(rows: list[list[np.ndarray]], rng: np.random.Generator, dropout: float) -> _Batch:
    """The sentences of these answers, some features left out."""
    lengths = np.array([len(sentence) for answer in rows for sentence in answer])
    every = np.concatenate([sentence for answer in rows for sentence in answer])
    kept = rng.random(len(every)) >= dropout
    sizes = np.add.reduceat(kept, np.concatenate([[0], lengths.cumsum()[:-1]]), dtype=np.int64)
    owner = np.repeat(np.arange(len(rows)), [len(answer) for answer in rows])
    return _Batch(
        torch.from_numpy(every[kept]),
        torch.from_numpy(np.concatenate([[0], sizes.cumsum()[:-1]])),
        torch.from_numpy(np.sqrt(np.maximum(sizes, 1)).astype(np.float32)),
        torch.from_numpy(owner),
    )


def train(answers: list[LabelledAnswer], seed: int = 1) -> np.ndarray:
    """The scores by bucket: Adam on the logistic loss of the gap, with features dropped out and weight decay."""
    torch.manual_seed(seed)
    rng, order = np.random.default_rng(seed), Random(seed)
    rows = [answer_features(answer.text) for answer in answers]
    labels = torch.tensor([answer.refusal for answer in answers], dtype=torch.float32)
    weights = torch.tensor([answer.weight for answer in answers])
    scores = torch.nn.EmbeddingBag(BUCKETS, 3, mode="sum")
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
                0, batch.owner[:, None].expand(-1, 2), each[:, :2], "amax"
            )
            tone = torch.zeros(len(chosen)).index_add(0, batch.owner, each[:, 2]) / batch.owner.bincount()
            gap = most[:, 0] - most[:, 1] + tone
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
        nargs=3,
        default=[0.0, -1.0, 1.0],
        help="gaps above which an answer is a refusal, in nats: for the model alone, beside rules that call the answer "
        "a refusal, and beside rules that do not",
    )
    parser.add_argument("--out", type=Path, default=FOLDER / "judge.safetensors")
    options = parser.parse_args()
    torch.set_num_threads(1)
    scores = train(training_answers(options.xstest, Random(1))).astype(np.float16)
    save_file({"scores": scores, "thresholds": np.array(options.thresholds, dtype=np.float32)}, options.out)


if __name__ == "__main__":
    main()
