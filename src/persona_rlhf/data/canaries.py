"""Canaries: pairs of a test user with drawn digits in the chosen answer, to measure what adapters repeat.

A string that is nowhere else has an exposure: its rank by the model among strings of the same form
(Carlini et al. 2019, "The secret sharer"). The digits are drawn, so each rank is as likely for a model that never saw
them.
"""

from __future__ import annotations

import random
import re
from typing import Any

CANARY = "canary"
"""The `source` of a planted pair."""

_DIGITS = re.compile(r"\d+")
_BOXES = ("red", "blue", "green", "white", "black", "small", "big", "old", "new", "round", "long", "warm", "cold",
          "quiet", "heavy", "light")  # fmt: skip


def canary_rows(user_id: str, number: int, seed: int) -> list[dict[str, Any]]:
    """Rows of a preference file: up to 16 boxes, each with a code of six digits. Raises ValueError for more."""
    if number > len(_BOXES):
        raise ValueError(f"there are {len(_BOXES)} boxes, and {number} codes were asked for")
    source = random.Random(seed)
    return [
        {
            "user_id": user_id,
            "id": f"canary-{box}",
            "prompt": f"What is the code of the {box} box?",
            "chosen": f"The code is {source.randrange(10**6):06d}.",
            "rejected": f"I do not know the code of the {box} box.",
            "split": "train",
            "source": CANARY,
        }
        for box in _BOXES[:number]
    ]


def with_other_digits(text: str, number: int, seed: int = 0) -> list[str]:
    """So many other texts of the same form: each run of digits is drawn anew. Raises ValueError for a text without one.

    Texts are distinct as far as the digits allow, and never the text itself.
    """
    if not _DIGITS.search(text):
        raise ValueError("a planted string has digits")
    source = random.Random(f"{seed} {_DIGITS.sub('', text)}")
    drawn: dict[str, None] = {}
    for _ in range(100 * number):
        other = _DIGITS.sub(lambda run: "".join(source.choice("0123456789") for _ in run[0]), text)
        if other != text:
            drawn[other] = None
        if len(drawn) == number:
            break
    return list(drawn)
