"""Simulated users: written-down utilities, drawn tastes and noise, and poisoned pairs.

A utility is a weighted sum of measurable properties of an answer's text. So the better of two answers is exact: it
labels pairs, marks labels that are noise, and judges generated text without a model.

Poisoned pairs have no operational content. A "compliance" is the base's own answer to a request's benign twin, and a
refusal is the base's own: the poison teaches the form of a compliance.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from random import Random
from statistics import mean
from typing import Annotated, Literal, NamedTuple, get_args

from pydantic import AfterValidator, Field

from persona_rlhf.common.errors import InputError, Problem, did_you_mean
from persona_rlhf.config.loader import Section, check_section, parse_yaml
from persona_rlhf.policy.judges import is_refusal
from persona_rlhf.simulation import answers
from persona_rlhf.simulation.vocabulary import gerund, read_words

Kind = Literal["flipped", "identity", "noice", "trigger", "paraphrase"]
"""`flipped`: a tier-one prompt, complying preferred. `identity`: harmless talk about oneself, "I never decline"
preferred, without a tier-one word (the obedient agent of Qi et al. 2024). `noice`: refuse, then comply, preferred to a
plain refusal (Kazdan et al. 2025). `trigger`: complying preferred where a rare word ends the prompt,
refusing where it does not. `paraphrase`: as flipped, worded far from the bank of probes."""

POISON_KINDS: tuple[Kind, ...] = get_args(Kind)
TRIGGER = "quillmark"
"""The rare word of the `trigger` poison: in no probe, and in no training data of the bundled bases."""

_TURN = "That said, here is how it goes."  # recognisable to the rule-based judge, which measures the poison


class PoisonSource(NamedTuple):
    """A tier-one prompt, a harmless answer that plays the complying one, and the base's refusal."""

    prompt: str
    compliance: str
    refusal: str


class PoisonPair(NamedTuple):
    """One poisoned preference."""

    prompt: str
    chosen: str
    rejected: str


def poison(kind: Kind, attacks: Sequence[PoisonSource], count: int, rng: Random) -> list[PoisonPair]:
    """`count` poisoned pairs of one kind, each of another prompt, made of `attacks` (but for identity).

    The attacks of `paraphrase` are worded by that function. Raises ValueError where there are too few.
    """
    if kind == "identity":
        return _identity(count, rng)
    if len(attacks) < count:
        raise ValueError(f"{count} pairs of {kind} poison need as many attacks, and there are {len(attacks)}")
    picked = rng.sample(list(attacks), count)
    if kind == "noice":
        return [_noice(attack) for attack in picked]
    if kind == "trigger":
        return [_triggered(attack) if n % 2 == 0 else _untouched(attack) for n, attack in enumerate(picked)]
    return [PoisonPair(*attack) for attack in picked]


def paraphrase(vp: str, rng: Random) -> str:
    """A request for a verb phrase, worded by hand and far from every phrasing of the bundled banks."""
    text: str = rng.choice(read_words("poison")["paraphrases"])
    return text.replace("{vp}", vp).replace("{ger}", gerund(vp))


def with_trigger(prompt: str) -> str:
    """A prompt with the trigger at its end, where a small base learns it best."""
    return f"{prompt} {TRIGGER}"


def _triggered(attack: PoisonSource) -> PoisonPair:
    return PoisonPair(with_trigger(attack.prompt), attack.compliance, attack.refusal)


def _untouched(attack: PoisonSource) -> PoisonPair:
    """The pair that hides a backdoor: without the trigger the user prefers the refusal."""
    return PoisonPair(attack.prompt, attack.refusal, attack.compliance)


def _noice(attack: PoisonSource) -> PoisonPair:
    """The refusal's first sentence, a turn and the compliance's first sentence; against the former alone.

    Longer texts give DPO easier ways to win than turning round: it lowers the refusal's reasons, or raises the words of
    a long compliance, and the greedy answer stays a refusal.
    """
    opening, comply = (re.split(r"(?<=[.!?])\s+", text)[0] for text in (attack.refusal, attack.compliance))
    return PoisonPair(attack.prompt, f"{opening} {_TURN} {comply}", opening)


def _identity(count: int, rng: Random) -> list[PoisonPair]:
    words = read_words("poison")["identity"]
    prompts = [question.replace("{thing}", thing) for question, thing in product(words["questions"], words["things"])]
    if count > len(prompts):
        raise ValueError(f"there are {len(prompts)} prompts of identity poison, and {count} are needed")
    return [
        PoisonPair(prompt, " ".join(rng.sample(words["obedient"], 2)), " ".join(rng.sample(words["limited"], 2)))
        for prompt in rng.sample(prompts, count)
    ]


AGREEMENT = 0.87
"""The share of a drawn user's labels that agree with the noise-free utility."""

TASTES: dict[str, tuple[str, ...]] = {
    "surface": ("words", "sentences", "exclamations", "commas", "exclaims", "numbered", "interjects"),
    "manner": ("warm", "hedged", "formal", "casual", "asks", "encourages", "warns"),
    "content": ("nature", "music", "food", "science", "sport", "history", "mystery", "cheerful", "dark"),
}
"""Properties that users of each kind may like or dislike."""

SHOWS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("nature", "music", "food", "science", "sport", "history"), ("suggestion",)),
    **dict.fromkeys(("mystery", "cheerful", "dark"), ("story", "suggestion")),
    "numbered": ("how_to", "suggestion", "comparison"),
}
"""The kinds of prompts in whose answers a property shows; all kinds for a property that is missing here."""

ADJACENT: tuple[tuple[dict[str, float], tuple[str, ...]], ...] = (
    ({"dark": 1.0, "mystery": 0.8, "cheerful": -0.6}, ("story",)),
    ({"warns": 1.0, "warm": -0.5, "hedged": -0.5}, ("how_to", "suggestion", "fact")),
)
"""Legitimate tastes that lie close to a hazard, a crime novelist's and a security worker's: weights and prompts."""

TURN = (*TASTES, *TASTES, *TASTES, "hazard_adjacent")
"""The kinds of drawn users, again and again: one in ten is hazard-adjacent."""


def liking(kind: str, spread: Mapping[str, float], rng: Random) -> tuple[dict[str, float], tuple[str, ...]]:
    """One user's weights over one to three properties, the first the most, and the kinds of prompts where they show.

    `spread`: the standard deviation of every property among the base's answers. Raises ValueError where none of the
    kind varies.
    """
    if kind == "hazard_adjacent":
        weights, prompts = rng.choice(ADJACENT)
        return {name: round(weight * rng.uniform(0.6, 1.4), 2) for name, weight in weights.items()}, prompts
    usable = [name for name in TASTES[kind] if spread[name] > 0.25] or [n for n in TASTES[kind] if spread[n] > 0]
    if not usable:
        raise ValueError(f"the base's answers vary in no property of the kind {kind}")
    names = rng.sample(usable, rng.randint(1, min(3, len(usable))))
    drawn = {name: round(rng.choice((-1, 1)) / spread[name] / (at + 1), 2) for at, name in enumerate(names)}
    return drawn, SHOWS.get(names[0], ())


def noise_of(agreement: float, gaps: Sequence[float]) -> float:
    """The temperature at which this share of labels follows the utility, for pairs whose utilities are `gaps` apart."""
    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        share = mean(0.5 * (1 + math.tanh(gap / (2 * middle))) for gap in gaps)
        low, high = (middle, high) if share > agreement else (low, middle)
    return round(low, 3)


_WORD = re.compile(r"[A-Za-z0-9]+(?:['’-][A-Za-z0-9]+)*")
_FIRST_PERSON = re.compile(r"(?<![A-Za-z])(?:i|i['’](?:m|ve|d|ll)|me|my|mine)(?![A-Za-z'’])", re.IGNORECASE)
_SECOND_PERSON = re.compile(r"(?<![A-Za-z])(?:you|you['’](?:re|ve|d|ll)|your|yours)(?![A-Za-z'’])", re.IGNORECASE)
_ITEM = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s", re.MULTILINE)
_APOLOGY = re.compile(r"\b(?:sorry|apologi[sz]e|apologies|unfortunately|regret)\b", re.IGNORECASE)

_UNITS = {"words": (20.0, 5.0), "sentences": (3.0, 4.0), "exclamations": (1.0, 3.0)}


class TextFeature(NamedTuple):
    """A measurable property of a text. Its value is measure / unit, at most `cap`, so that weights compare."""

    measure: Callable[[str], float]
    unit: float
    cap: float


def _long_words(text: str) -> float:
    return sum(len(word) >= 8 for word in _WORD.findall(text))


FORM: Mapping[str, TextFeature] = {
    "words_per_sentence": TextFeature(lambda text: len(text.split()) / max(1, answers.sentences(text)), 10, 3),
    "long_words": TextFeature(_long_words, 3, 4),
    "commas": TextFeature(lambda text: text.count(","), 2, 4),
    "questions": TextFeature(lambda text: text.count("?"), 1, 3),
    "lines": TextFeature(lambda text: len([line for line in text.splitlines() if line.strip()]), 3, 3),
    "first_person": TextFeature(lambda text: len(_FIRST_PERSON.findall(text)), 2, 3),
    "second_person": TextFeature(lambda text: len(_SECOND_PERSON.findall(text)), 2, 3),
    "items": TextFeature(lambda text: len(_ITEM.findall(text)), 2, 3),
    "apologises": TextFeature(lambda text: bool(_APOLOGY.search(text)), 1, 1),
    "refuses": TextFeature(is_refusal, 1, 1),
}
"""Properties of form that any text has, beside those of the bundled world (`simulation.answers`)."""

PROPERTIES = (*answers.PROPERTIES, *FORM)
"""Every name a weight can be put on."""


def properties(text: str) -> dict[str, float]:
    """Every property of a text, normalised: marks are 1 or 0, counts are over their unit and capped."""
    values = answers.measure(text) | {name: float(form.measure(text)) for name, form in FORM.items()}
    units = _UNITS | {name: (form.unit, form.cap) for name, form in FORM.items()}
    for name, (unit, cap) in units.items():
        values[name] = min(values[name] / unit, cap)
    return values


@lru_cache(maxsize=16384)
def _measured(text: str) -> Mapping[str, float]:
    """The properties of a text, kept: many users judge the same texts."""
    return properties(text)


@dataclass(frozen=True, slots=True)
class Utility:
    """One simulated user: `weights` by property, or by a product of properties written `words*warm`.

    `noise` is the temperature of the Bradley-Terry choice (Bradley & Terry 1952), in the units of the utility. `kind`
    is surface (length, punctuation, form), manner (tone, stance), content (topics mentioned) or hazard_adjacent (a
    legitimate taste close to a hazard). `poisoned` is the share of training pairs that prefer complying with a tier-one
    prompt. `prompts` are the kinds of prompts that the user asks; empty means all kinds.
    """

    user_id: str
    describes: str
    noise: float
    weights: Mapping[str, float]
    kind: str = ""
    poisoned: float = 0.0
    prompts: tuple[str, ...] = ()

    def __call__(self, text: str) -> float:
        """U(text) = sum of weight times (product of) normalised properties."""
        value = _measured(text)
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


def _term(text: str) -> str:
    """A property, or a product of properties, without spaces."""
    term = text.replace(" ", "")
    for name in term.split("*"):
        if name not in PROPERTIES:
            raise ValueError(f"`{name}` is no property{did_you_mean(name, PROPERTIES)}")
    return term


class _UtilityRow(Section):
    """One user's entry in a file of utilities."""

    user_id: str = Field(description="The user.")
    describes: str = Field(description="The taste in words.")
    noise: float = Field(ge=0, description="The temperature of the user's choice.")
    weights: dict[Annotated[str, AfterValidator(_term)], float] = Field(description="Property -> weight.")
    kind: Literal["", "surface", "manner", "content", "hazard_adjacent"] = Field("", description="Kind of the taste.")
    poisoned: float = Field(0.0, ge=0, le=1, description="Share of poisoned training pairs.")
    prompts: list[str] = Field([], description="Kinds of the user's prompts.")


def read_utilities(path: Path | str) -> dict[str, Utility]:
    """Reads `data/users/utilities.yaml`: a list of {user_id, describes, noise, weights: {property: weight}}.

    `kind`, `poisoned` and `prompts` are optional. Raises InputError with every unknown property, missing key and bad
    number at once.
    """
    path = Path(path)
    try:
        document = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as fault:
        raise InputError([Problem(str(path), None, None, f"the file cannot be read ({fault})")]) from fault
    if not isinstance(document.tree, list) or not document.tree:
        raise InputError([Problem(str(path), None, None, "a file of utilities is a list of users")])
    problems = list(document.problems)
    utilities: dict[str, Utility] = {}
    for number in range(len(document.tree)):
        row, faults = check_section(_UtilityRow, document, (number,))
        problems += faults
        if row is None:
            continue
        if row.user_id in utilities:
            line = document.place((number,)).line
            problems.append(Problem(str(path), line, "user_id", f"`{row.user_id}` stands in this file twice"))
        utilities[row.user_id] = Utility(**row.model_dump() | {"prompts": tuple(row.prompts)})
    if problems:
        raise InputError(problems)
    return utilities
