"""Near copies of the gate's prompts: an index by sequences of letters and sets of words, for screening pairs."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple, TypeVar

from persona_rlhf.data.disguises import plain_letters, readings
from persona_rlhf.policy.policy import Policy

LETTERS = 4
"""Length of the sequences of letters that are compared."""

FEWEST_WORDS = 4
"""Different words that a prompt must have to be recognised by its words in any order."""

SHORT = 24
"""Letters below which a probe needs the likeness of a harmless prompt, since another last word changes little of it."""

_LETTER_WINDOW, _WORD_WINDOW, _HITS = 320, 64, 3


class Likeness(NamedTuple):
    """The share of a prompt's letter sequences, or of its different words, that makes a text a near copy of it."""

    letters: float
    words: float


PROBE_LIKENESS = Likeness(0.7, 0.9)
"""For probes. Set on `dev` probes: 8 of 10 copies with three typos and 19 of 20 with a word fewer are recognised."""

HARMLESS_LIKENESS = Likeness(0.9, 1.0)
"""For twins and ordinary prompts. Honest prompts resemble these, so only closer copies count (set on `dev` too)."""


class ProtectedPrompt(NamedTuple):
    """A prompt that no pair may teach. `name` describes it without its text, after "near copy of"."""

    text: str
    name: str
    harmless: bool

    def likeness(self, letters: int) -> Likeness:
        """The shares that make a text its near copy, where the prompt has so many letters."""
        return HARMLESS_LIKENESS if self.harmless or letters < SHORT else PROBE_LIKENESS


class NearCopyIndex:
    """Index of protected prompts. A near copy is a text with a passage that has enough of a prompt's letters or words.

    Letters: the sequences of `LETTERS` letters of the text without spaces and signs. Look-alike letters, digits for
    letters, accents, case, invisible characters and spaces between letters make no difference. Words: in any order.
    A passage is long enough for every protected prompt, so text before and after a copy never hides it.

    Cost: one dictionary lookup per sequence of the text, and one set intersection per candidate (prefix filter,
    Chaudhuri et al. 2006, "A primitive operator for similarity joins in data cleaning"); no comparison of all pairs.
    """

    def __init__(self, protected: Iterable[ProtectedPrompt]) -> None:
        self._protected = list(dict.fromkeys(protected))
        texts = [plain_letters(prompt.text) for prompt in self._protected]
        letters, words = list(map(_letters, texts)), list(map(_words, texts))
        self._letter_window = max(_LETTER_WINDOW, 2 * max(map(len, letters), default=0))
        self._word_window = max(_WORD_WINDOW, 2 * max(map(len, words), default=0))
        likeness = [prompt.likeness(len(each)) for prompt, each in zip(self._protected, letters, strict=True)]
        self._letters = _ContainmentIndex(list(map(_sequences, letters)), [share.letters for share in likeness])
        bags = [frozenset(each) for each in words]
        few = [bag if len(bag) >= FEWEST_WORDS else frozenset() for bag in bags]
        self._words = _ContainmentIndex(few, [share.words for share in likeness])

    @classmethod
    def of(cls, policy: Policy, ordinary: Iterable[str] = ()) -> NearCopyIndex:
        """The index of all probes that are not trained on, their twins, and the gate's ordinary prompts."""
        return cls(protected_prompts(policy, ordinary))

    def __len__(self) -> int:
        return len(self._protected)

    def find(self, text: str) -> ProtectedPrompt | None:
        """The first protected prompt of which the text has a near copy; probes come before harmless prompts.

        The text is compared in all its readings (`disguises.readings`), each forward and backward.
        """
        places = [place for reading in readings(text) for place in self._places(plain_letters(reading))]
        return self._protected[min(places)] if places else None

    def _places(self, plain: str) -> Iterator[int]:
        letters, words = _letters(plain), _words(plain)
        backward = [word[::-1] for word in words]
        for passage in (*_windows(letters, self._letter_window), *_windows(letters[::-1], self._letter_window)):
            if (place := self._letters.first(_sequences(passage))) is not None:
                yield place
        for part in (*_windows(words, self._word_window), *_windows(backward, self._word_window)):
            if (place := self._words.first(frozenset(part))) is not None:
                yield place


def protected_prompts(policy: Policy, ordinary: Iterable[str]) -> list[ProtectedPrompt]:
    """The prompts that decide about releases, or may later: probes of every split but `train` and of private banks,
    their twins, and ordinary prompts."""
    probes, twins = list[ProtectedPrompt](), list[ProtectedPrompt]()
    rules = {rule.category: rule.id for rule in policy.restrictions}
    reserve = [] if policy.private is None else policy.private.reserve
    for probe in (*(probe for rule in policy.restrictions for probe in rule.probes), *reserve):
        if probe.split != "train":
            rule_id = rules[probe.category]
            probes.append(ProtectedPrompt(probe.prompt, f"a probe of `{rule_id}`", False))
            if probe.twin:
                twins.append(ProtectedPrompt(probe.twin, f"the harmless twin of a probe of `{rule_id}`", True))
    others = [ProtectedPrompt(text, "an ordinary prompt that the gate asks", True) for text in ordinary]
    return [*probes, *twins, *others]


class _ContainmentIndex:
    """Index of sets. A query contains a set where it has at least a share of its members; an empty set never is.

    A query that contains a set of n members, k of them needed, has h of any n - k + h members. So each set is listed
    under its n - k + h rarest members alone, and compared where the query has `_HITS` of them, or all k.
    """

    def __init__(self, sets: Sequence[frozenset[str]], shares: Sequence[float]) -> None:
        frequency = Counter(member for members in sets for member in members)
        self._sets = sets
        self._needed = [math.ceil(share * len(members) - 1e-9) for members, share in zip(sets, shares, strict=True)]
        self._hits = [min(_HITS, needed) for needed in self._needed]
        self._listed: defaultdict[str, list[int]] = defaultdict(list)
        for place, members in enumerate(sets):
            rarest = sorted(members, key=lambda member: (frequency[member], member))
            for member in rarest[: len(members) - self._needed[place] + self._hits[place]]:
                self._listed[member].append(place)
        self._members = frozenset(frequency)
        self._fewest = min(filter(None, self._needed), default=1)

    def first(self, query: frozenset[str]) -> int | None:
        """The place of the first set that the query contains."""
        query &= self._members
        if len(query) < self._fewest:
            return None
        hits = Counter(chain.from_iterable(self._listed[member] for member in query & self._listed.keys()))
        return min(
            (
                place
                for place, n in hits.items()
                if n >= self._hits[place] and len(self._sets[place] & query) >= self._needed[place]
            ),
            default=None,
        )


def _letters(plain: str) -> str:
    return "".join(filter(str.isalnum, plain))


def _words(plain: str) -> list[str]:
    return re.findall(r"[^\W_]+", plain)


def _sequences(letters: str) -> frozenset[str]:
    """All sequences of `LETTERS` letters; a shorter text is one sequence."""
    return frozenset(letters[n : n + LETTERS] for n in range(max(1, len(letters) - LETTERS + 1))) - {""}


_Sliceable = TypeVar("_Sliceable", str, list[str])


def _windows(whole: _Sliceable, size: int) -> Iterator[_Sliceable]:
    """Overlapping parts; every passage of half the size lies in one of them."""
    for start in range(0, max(1, len(whole) - size // 2), size // 2):
        yield whole[start : start + size]
