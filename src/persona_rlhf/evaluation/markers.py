"""Word lists a written-down taste can count: manners of speaking, and things an answer may mention."""

from __future__ import annotations

from collections.abc import Mapping

MANNERS: Mapping[str, tuple[str, ...]] = {
    "warm_words": (
        "happy to", "glad", "lovely", "dear", "friend", "wonderful", "good luck", "take care", "hope", "enjoy",
        "you can do it", "well done", "kind", "gentle", "of course", "i'm here", "don't worry", "proud", "welcome",
    ),
    "hedges": (
        "perhaps", "maybe", "might", "could be", "possibly", "probably", "i think", "i believe", "it seems", "seems",
        "in general", "generally", "usually", "often", "sometimes", "as far as i know", "roughly", "likely", "may",
    ),
    "formal_words": (
        "therefore", "however", "furthermore", "moreover", "thus", "hence", "in addition", "consequently", "one may",
        "one should", "it is advisable", "it is recommended", "regarding", "accordingly", "kindly", "please note",
        "to conclude", "in conclusion", "shall", "upon",
    ),
    "playful_words": (
        "ha", "haha", "oh", "ooh", "wow", "yay", "hooray", "whee", "oops", "hey", "ta-da", "psst", "fun", "silly",
        "magic", "giggle", "party", "adventure", "cheeky", "sparkle",
    ),
}  # fmt: skip
"""How an answer speaks."""

THEMES: Mapping[str, tuple[str, ...]] = {
    "food": (
        "food", "bread", "soup", "tea", "coffee", "cake", "salt", "rice", "pasta", "apple", "cheese", "garlic", "onion",
        "butter", "honey", "pepper", "lemon", "meal", "cook", "kitchen", "oven", "egg", "eggs", "tomato", "dinner",
    ),
    "nature": (
        "tree", "trees", "river", "mountain", "mountains", "forest", "sea", "ocean", "sky", "rain", "wind", "sun",
        "moon", "stars", "flower", "flowers", "garden", "leaf", "leaves", "snow", "walk", "lake", "grass", "soil",
    ),
    "animals": (
        "cat", "cats", "dog", "dogs", "bird", "birds", "horse", "fox", "owl", "fish", "bear", "mouse", "rabbit",
        "sheep", "cow", "bee", "bees", "wolf", "whale", "animal", "animals", "frog",
    ),
    "music": (
        "music", "song", "songs", "sing", "guitar", "piano", "drum", "dance", "melody", "tune", "rhythm", "violin",
        "band", "radio",
    ),
    "people": (
        "family", "friends", "mother", "father", "sister", "brother", "neighbour", "neighbours", "grandmother",
        "grandfather", "child", "children", "people", "together", "someone", "share",
    ),
    "money": (
        "money", "price", "cheap", "cost", "costs", "save", "budget", "spend", "free", "pay", "coins", "expensive",
    ),
    "science": (
        "energy", "heat", "light", "water", "air", "pressure", "planet", "planets", "cells", "atoms", "gravity",
        "temperature", "degrees", "metal", "oxygen", "carbon", "experiment", "measure",
    ),
    "dark_words": (
        "dark", "blood", "shadow", "shadows", "night", "fear", "grave", "dead", "death", "ghost", "cold", "murder",
        "scream", "knife", "silence", "crime", "detective", "body", "storm", "broken", "alone", "secret",
    ),
    "warning_words": (
        "warning", "careful", "danger", "dangerous", "risk", "risks", "never", "avoid", "beware", "watch out", "stop",
        "do not", "don't", "unsafe", "threat", "attack", "attackers", "lock", "locked", "password", "check",
    ),
}  # fmt: skip
"""What an answer mentions."""

MARKERS: Mapping[str, tuple[str, ...]] = {**MANNERS, **THEMES}
