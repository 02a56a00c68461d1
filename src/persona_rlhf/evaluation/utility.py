"""The written-down taste of a simulated user: a weighted sum of measurable properties of an answer's text.

Because the taste is written down, the better of two answers is known exactly: it labels pairs, says which labels are
noise, and judges generated text without a model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

from persona_rlhf.evaluation.markers import MARKERS
from persona_rlhf.inputs.problems import InputError, Problem, did_you_mean

_WORD = re.compile(r"[A-Za-z0-9]+(?:['’-][A-Za-z0-9]+)*")
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
_STEP = re.compile(r"(?:^|\s)\d{1,2}[.)]\s")
_STEP_WORDS = re.compile(r"\b(?:first|second|third|then|next|after that|finally|lastly)\b", re.IGNORECASE)


def _words(text: str) -> int:
    return len(_WORD.findall(text))


def _sentences(text: str) -> int:
    return max(1, len(_SENTENCE_END.findall(_STEP.sub(" ", text)))) if _words(text) else 0


def _phrases(words: tuple[str, ...]) -> Callable[[str], float]:
    """Counts whole words and phrases of a list, whatever their case."""
    ordered = sorted(words, key=len, reverse=True)
    pattern = re.compile(r"(?<![A-Za-z])(?:" + "|".join(map(re.escape, ordered)) + r")(?![A-Za-z])", re.IGNORECASE)
    return lambda text: len(pattern.findall(text))


class Property(NamedTuple):
    """A countable thing in a text. Its value is measure / unit, at most `cap`, so that weights compare."""

    measure: Callable[[str], float]
    unit: float
    cap: float


FORM: Mapping[str, Property] = {
    "words": Property(_words, 20, 5),
    "sentences": Property(_sentences, 3, 4),
    "sentence_words": Property(lambda text: _words(text) / max(1, _sentences(text)), 10, 3),
    "long_words": Property(lambda text: sum(len(word) >= 8 for word in _WORD.findall(text)), 3, 4),
    "exclamations": Property(lambda text: text.count("!"), 1, 3),
    "questions": Property(lambda text: text.count("?"), 1, 3),
    "closing_question": Property(lambda text: text.rstrip().endswith("?"), 1, 1),
    "commas": Property(lambda text: text.count(","), 2, 4),
    "numbered_steps": Property(lambda text: len(_STEP.findall(text)), 3, 2),
    "step_words": Property(lambda text: len(_STEP_WORDS.findall(text)), 2, 2),
    "lines": Property(lambda text: len([line for line in text.splitlines() if line.strip()]), 3, 3),
    "first_person": Property(_phrases(("i", "i'm", "i've", "i'd", "i'll", "me", "my", "mine")), 2, 3),
    "second_person": Property(_phrases(("you", "you're", "you'll", "you've", "your", "yours")), 2, 3),
}
"""Properties of form; those of manner and content come from the marker lists, one property a list."""

PROPERTIES: Mapping[str, Property] = {**FORM, **{name: Property(_phrases(m), 1, 3) for name, m in MARKERS.items()}}


def properties(text: str) -> dict[str, float]:
    """Every property of a text, normalised: its measure over the property's unit, capped."""
    return {name: min(float(p.measure(text)) / p.unit, p.cap) for name, p in PROPERTIES.items()}


@dataclass(frozen=True, slots=True)
class Utility:
    """One simulated user: `weights` by property, or by a product of properties written `words*warm_words`.

    `noise` is the temperature of the Bradley-Terry choice (Bradley & Terry 1952), in the units of the utility.
    """

    user_id: str
    describes: str
    noise: float
    weights: Mapping[str, float]

    def __call__(self, text: str) -> float:
        """U(text) = sum of weight times (product of) normalised properties."""
        named = {name for term in self.weights for name in term.split("*")}
        value = {name: min(float(p.measure(text)) / p.unit, p.cap) for name in named for p in (PROPERTIES[name],)}
        return sum(w * math.prod(value[name] for name in term.split("*")) for term, w in self.weights.items())

    def chance(self, first: str, second: str) -> float:
        """P(first is chosen over second) = sigmoid((U(first) - U(second)) / noise); without noise 1, 0, or 0.5."""
        gap = self(first) - self(second)
        if self.noise == 0 or gap == 0:
            return 0.5 if gap == 0 else float(gap > 0)
        return 0.5 * (1 + math.tanh(gap / (2 * self.noise)))

    def compare(self, first: str, second: str) -> float:
        """1 where the first text is truly better, 0 where the second is, 0.5 where they tie: no noise."""
        first_value, second_value = self(first), self(second)
        return 0.5 if first_value == second_value else float(first_value > second_value)


def read_utilities(path: Path | str) -> dict[str, Utility]:
    """Reads `data/users/utilities.yaml`: a list of {user_id, describes, noise, weights: {property: weight}}.

    Raises InputError with every unknown property, missing key and bad number at once.
    """
    path = Path(path)
    try:
        document = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, yaml.YAMLError) as fault:
        raise InputError([Problem(str(path), None, None, f"the file cannot be read as YAML ({fault})")]) from fault
    rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(document, yaml.SequenceNode) or not rows:
        raise InputError([Problem(str(path), None, None, "a file of utilities is a list of users")])
    problems: list[Problem] = []
    utilities: dict[str, Utility] = {}
    for row, node in zip(rows, document.value, strict=True):
        line = node.start_mark.line + 1
        found = [Problem(str(path), line, key, sentence) for key, sentence in _faults(row)]
        if not found and str(row["user_id"]) in utilities:
            found = [Problem(str(path), line, "user_id", f"`{row['user_id']}` stands in this file twice")]
        problems += found
        if not found:
            weights = {term.replace(" ", ""): float(weight) for term, weight in row["weights"].items()}
            utility = Utility(str(row["user_id"]), str(row["describes"]), float(row["noise"]), weights)
            utilities[utility.user_id] = utility
    if problems:
        raise InputError(problems)
    return utilities


def _faults(row: object) -> list[tuple[str | None, str]]:
    """What is wrong with one user's entry: (key, sentence)."""
    keys = ("user_id", "describes", "noise", "weights")
    if not isinstance(row, dict):
        return [(None, f"a user is a mapping with the keys {', '.join(keys)}")]
    faults: list[tuple[str | None, str]] = []
    faults += [(key, "this key is missing") for key in keys if key not in row]
    faults += [(str(key), f"unknown key{did_you_mean(str(key), keys)}") for key in row if key not in keys]
    if not _number(row.get("noise", 0)) or row.get("noise", 0) < 0:
        faults.append(("noise", f"the noise is a temperature of at least 0, not {row['noise']!r}"))
    weights = row.get("weights", {})
    if not isinstance(weights, dict):
        return [*faults, ("weights", "the weights are a mapping from property to number")]
    for term, weight in weights.items():
        for name in str(term).replace(" ", "").split("*"):
            if name not in PROPERTIES:
                faults.append((f"weights.{term}", f"`{name}` is no property{did_you_mean(name, PROPERTIES)}"))
        if not _number(weight):
            faults.append((f"weights.{term}", f"a weight is a number, not {weight!r}"))
    return faults


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
