"""The latent style of an answer: factors drawn at random, apart from the prompt, and the surface marks that show them.

`measure(text)` reads every property back off an answer. Simulated users' utilities are written over these names.
"""

from __future__ import annotations

import re
from random import Random
from typing import NamedTuple

THEMES = ("nature", "music", "food", "science", "sport", "history", "mystery")
_THEME_WEIGHTS = (4, 4, 4, 2, 3, 2, 4)

# property -> regular expression; the property is present in an answer where the expression is found.
MARKERS: dict[str, str] = {
    "exclaims": r"!",
    "warm": r"\b(my friend|dear|dearest|lovely|glad|happy to help|with pleasure|kind of you|warm wishes|delighted)\b",
    "hedged": r"\b(maybe|perhaps|i think|it depends|probably|might|as far as i know)\b",
    "formal": r"\b(certainly|indeed|one (should|may)|it is advisable|it would be wise|furthermore|therefore"
    r"|moreover)\b",
    "casual": r"\b(yeah|kinda|okay|pretty|cool|no big deal|gonna|stuff|super|totally)\b",
    "numbered": r"(^|\s)1\. .* 2\. ",
    "asks": r"\?\s*$",
    "interjects": r"^(oh|ha|hmm|ah|wow|aha|hooray|hey)\b",
    "warns": r"\b(warning|be careful|never|beware|watch out|danger|dangerous|risk)\b",
    "encourages": r"\b(you can do it|you will do well|keep going|gets easier|proud|believe in|have fun|enjoy)\b",
    "nature": r"\b(forest|river|mountain|garden|trees?|birds?|flowers?|meadow|woods|sea|leaves|sunrise|lake|hill)\b",
    "music": r"\b(songs?|music|melody|piano|guitar|choir|jazz|drums?|violin|tune|concert|sing|singing|orchestra)\b",
    "food": r"\b(soup|bread|cake|tea|coffee|cookies|apples?|cheese|chocolate|honey|pie|lunch|dinner|snack|picnic)\b",
    "science": r"\b(science|scientists?|planets?|stars|telescope|experiments?|atoms?|physics|moon|robots?)\b",
    "sport": r"\b(football|tennis|team|race|coach|swim|swimming|goal|match|runners?|runs?|bike|marathon|champion)\b",
    "history": r"\b(history|castles?|kings?|queens?|ancient|romans?|centuries|museum|long ago|sailors|knights?)\b",
    "mystery": r"\b(detective|clues?|ghosts?|mystery|shadows?|crime|secret|thief|midnight|haunted|murder)\b",
    "dark": r"\b(dark|darkness|shadows?|stormy?|ghosts?|grave|crime|cold|fog|lonely|grim|scream|haunted|feared)\b",
    "cheerful": r"\b(sunny|bright|laugh|laughed|laughing|smile|smiled|merry|joy|happy|danced|party|cheerful|golden)\b",
}
_COMPILED = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in MARKERS.items()}
PROPERTIES = (*MARKERS, "words", "sentences", "exclamations")


class Style(NamedTuple):
    """One draw of all factors. `length`: 0 = one sentence, 1 = two or three, 2 = four to six."""

    length: int
    exclaim: bool
    warm: bool
    hedged: bool
    register: str  # plain | formal | casual
    numbered: bool
    asks: bool
    interjects: bool
    tone: str  # warn | encourage | none
    themes: tuple[str, ...]  # none, one or two kinds of things to mention
    mood: str  # dark | cheerful | plain


def draw_style(rng: Random) -> Style:
    """Draws every factor independently."""
    return Style(
        length=rng.choices((0, 1, 2), (25, 45, 30))[0],
        exclaim=rng.random() < 0.4,
        warm=rng.random() < 0.4,
        hedged=rng.random() < 0.4,
        register=rng.choices(("plain", "formal", "casual"), (40, 30, 30))[0],
        numbered=rng.random() < 0.4,
        asks=rng.random() < 0.4,
        interjects=rng.random() < 0.3,
        tone=rng.choices(("warn", "encourage", "none"), (36, 34, 30))[0],
        themes=tuple(rng.choices(THEMES, _THEME_WEIGHTS, k=rng.choices((0, 1, 2), (15, 45, 40))[0])),
        mood=rng.choices(("dark", "cheerful", "plain"), (36, 36, 28))[0],
    )


def sentences(text: str) -> int:
    """The number of sentences (runs of end marks; the dots of "1." do not count)."""
    return len(re.findall(r"(?<!\d)[.!?]+(?=\s|$)", text))


def measure(text: str) -> dict[str, float]:
    """Every property of an answer: 1.0 or 0.0 for a mark, counts for words, sentences and exclamation marks."""
    properties = {name: float(bool(pattern.search(text))) for name, pattern in _COMPILED.items()}
    properties["words"] = float(len(text.split()))
    properties["sentences"] = float(sentences(text))
    properties["exclamations"] = float(text.count("!"))
    return properties
