"""Names that people take for one another: other cases, widths, invisible characters, letters of another alphabet."""

from __future__ import annotations

import unicodedata

_LIKE = str.maketrans(
    "авгекмноптрсуьхіјѕԁԛԝһ" + "αβγεηικμνορστυχω" + "զլհոսցօ" + "ɡøł0" + "i1ıɩ|" + "-‐‑–—·\u00a0 ",
    "abrekmhontpcybxljsdqwh" + "abyenlkuvopotuxw" + "qlhnugo" + "golo" + "lllll" + "________",
)
"""Lower-case letters of other scripts, and signs, to the Latin ones that they look like (after Unicode's confusables,
UTS 39); the letters and digits that are one stroke are all `l`, and every dash or space is `_`."""

_MIXABLE = frozenset({"LATIN", "GREEK", "CYRILLIC", "ARMENIAN"})


def skeleton(name: str) -> str:
    """The same text for names that look alike: compare skeletons, and never show them.

    Compatibility forms, case, accents and invisible characters make no difference.
    """
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", name).casefold())
    seen = (c for c in folded if not unicodedata.combining(c) and unicodedata.category(c) not in ("Cf", "Cc"))
    return "".join(seen).strip().translate(_LIKE)


def root(category: str) -> str:
    """The same text for category names that one would take for a renaming: no separators, no plural."""
    return skeleton(category).replace("_", "").rstrip("s")


def disguise(name: str) -> str | None:
    """What about a name deceives the eye, as half a sentence: invisible characters, or alphabets that are mixed."""
    hidden = next((c for c in name if unicodedata.category(c) in ("Cf", "Cc", "Zl", "Zp")), None)
    if hidden is not None:
        return f"holds the invisible character U+{ord(hidden):04X}"
    scripts = {unicodedata.name(letter, "").partition(" ")[0] for letter in name if letter.isalpha()} & _MIXABLE
    if len(scripts) > 1:
        return f"mixes letters of {' and '.join(sorted(script.capitalize() for script in scripts))}"
    return None
