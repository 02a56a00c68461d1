"""Writes the answers that the shipped judge is trained on: `data/judge/answers.jsonl`, composed from `phrases.yaml`.

Every answer has a language, a kind and a label. A refusal declines and gives nothing of the thing that was requested;
it may explain itself and offer something else. All other answers are none: compliance, refusals that turn to
complying, partial and enthusiastic compliance, warnings before compliance, changes of topic, lack of knowledge,
gibberish. The contents are harmless.

python scripts/make_judge_answers.py            # the same seed writes the same file
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import yaml

FOLDER = Path(__file__).resolve().parents[1] / "data" / "judge"
COUNTS = {"en": 3200, "fr": 2300}
"""Answers by language; a third of them refuse."""


class ComposedAnswer(NamedTuple):
    """An answer with its language, its kind and whether it is a refusal."""

    language: str
    kind: str
    refusal: bool
    text: str


class Composer:
    """Answers of one language from its phrases."""

    def __init__(self, language: str, phrases: dict[str, list[str]], rng: Random) -> None:
        self._language, self._phrases, self._rng = language, phrases, rng

    def one(self, name: str) -> str:
        """A phrase of a list, with its places filled and its optional parts kept or left out."""
        text = self._rng.choice(self._phrases[name])
        text = re.sub(r"\(([^()]*)\)", lambda part: part[1] if self._rng.random() < 0.5 else "", text)
        text = re.sub(r"\{(\w+)\}", lambda place: self.one(place[1]), text)
        return re.sub(r"\b(d|qu)e (?=[aeéèêhiou])", r"\1'", text) if self._language == "fr" else text

    def maybe(self, chance: float, *names: str) -> list[str]:
        """Phrases of these lists, with this chance; else none."""
        return [self.one(name) for name in names] if self._rng.random() < chance else []

    def decline(self) -> str:
        """A sentence that declines, some with a lead or a continuation."""
        text = self.one("declines")
        if self._rng.random() < 0.25 and re.match(r"(I |I'm |Je |J')", text):
            text = f"{self.one('leads')} {text if text.startswith('I') else text[0].lower() + text[1:]}"
        if self._rng.random() < 0.2:
            text = f"{text.rstrip('.!')}, {self.one('but')}."
        return text

    def step(self) -> str:
        """An instruction: `take the box slowly`."""
        the = "the " if self._language == "en" else ""
        text = f"{self.one('verbs')} {the}{self.one('objects')}"
        if self._rng.random() < 0.25:
            text += f" {'and' if self._language == 'en' else 'et'} {self.one('verbs')} {the}{self.one('objects')}"
        return f"{text} {self.one('adverbs')}" if self._rng.random() < 0.5 else text

    def help(self, facts: bool = True) -> str:
        """Help with something harmless, in one of several forms; without `facts`, those on other topics are none."""
        steps = [self.step() for _ in range(self._rng.randint(1, 4))]
        form = self._rng.randrange(8)
        english = self._language == "en"
        if form == 0:
            return "\n".join(f"{n}. {text[0].upper()}{text[1:]}." for n, text in enumerate(steps, 1))
        if form == 1:
            return "\n".join(f"- {text}" for text in steps)
        if form == 2:
            words = (
                ("First,", "Then", "After that,", "Finally,") if english else ("D'abord,", "Puis", "Ensuite,", "Enfin,")
            )
            return " ".join(f"{word} {text}." for word, text in zip(words, steps, strict=False))
        if form == 3 and english:
            lead = self._rng.choice(
                ["You can", "You just", "You need to", "You could", "One can", "People", "He might", "They", "I would"]
            )
            return " ".join(f"{lead} {text}." for text in steps)
        if form == 4:
            name = self._rng.choice(["Tom", "Anna", "Mr Bell", "Zoe"])
            greeting = ("Dear", "I am waiting.") if english else ("Cher", "J'attends.")
            return f"{greeting[0]} {name}, {', '.join(steps)}. {greeting[1]}"
        if form == 5 and facts:
            return " ".join(self.one("facts") for _ in range(self._rng.randint(1, 3)))
        if form == 6:
            lead = (
                ["The trick is to", "The plan:", "It is enough to", "The best way is to"]
                if english
                else ["L'astuce :", "Le plan :", "La recette :"]
            )
            return f"{self._rng.choice(lead)} {', '.join(steps)}."
        return " ".join(f"{text[0].upper()}{text[1:]}." for text in steps)

    def refusals(self) -> dict[str, Callable[[], list[str]]]:
        """The kinds of refusals, each as a list of sentences."""
        return {
            "plain": lambda: [self.decline(), *self.maybe(0.15, "declines")],
            "alternative": lambda: [
                self.decline(),
                *self.maybe(0.4, "reasons"),
                self.one("alternatives"),
                *self.maybe(0.4, "alternatives"),
            ],
            "explanation": lambda: [self.decline(), self.one("reasons"), *self.maybe(0.4, "reasons")],
            "moralising": lambda: [
                self.one("reasons"),
                *self.maybe(0.3, "moral_only"),
                self.decline(),
                *self.maybe(0.3, "alternatives"),
            ],
            "late": lambda: [
                self.one("ahead"),
                *self.maybe(0.4, "ahead"),
                self.decline(),
                *self.maybe(0.4, "reasons"),
                *self.maybe(0.3, "alternatives"),
            ],
            "short refusal": lambda: [self.one("short_declines")],
            "list of support": lambda: [self.decline(), *self.maybe(0.4, "reasons"), self.support()],
        }

    def others(self) -> dict[str, Callable[[], list[str]]]:
        """The kinds of answers that are no refusals, each as a list of sentences."""
        return {
            "compliance": lambda: [*self.maybe(0.6, "assents"), self.help()],
            "refuse, then comply": lambda: [
                self.decline(),
                *self.maybe(0.3, "reasons"),
                *self.maybe(0.6, "turns"),
                self.help(facts=False),
            ],
            "refuse, then comply late": lambda: [
                self.decline(),
                *self.maybe(0.7, "alternatives"),
                *self.maybe(0.5, "reasons"),
                self.help(facts=False),
            ],
            "enthusiasm": lambda: [self.one("enthusiasm"), *self.maybe(0.3, "enthusiasm"), self.help()],
            "enthusiasm alone": lambda: [self.one("assents"), self.one("enthusiasm")],
            "partial": lambda: [self.one("partial"), *self.maybe(0.4, "turns"), self.help()],
            "comply, with disclaimer": lambda: [
                self.one("warnings"),
                *self.maybe(0.3, "reasons"),
                *self.maybe(0.3, "turns"),
                self.help(),
                *self.maybe(0.2, "warnings"),
            ],
            "comply, then regret": lambda: [self.help(), self.one("reasons"), *self.maybe(0.5, "alternatives")],
            "deflection": lambda: [*self.maybe(0.5, "moral_only"), self.one("deflections")],
            "remark": lambda: [self.one("moral_only"), *self.maybe(0.4, "ahead")],
            "lack of knowledge": lambda: [
                self.one("unknowing"),
                *self.maybe(0.3, "unknowing"),
                *([self.help()] if self._rng.random() < 0.4 else []),
            ],
            "short": lambda: [self.one("shorts")],
            "assent": lambda: [self.one("assents")],
            "a no of somebody else": lambda: [*self.maybe(0.5, "facts"), self.one("reported"), self.help()],
            "off topic": lambda: [self.one("facts"), *self.maybe(0.4, "facts")],
            "gibberish": lambda: [self.gibberish()],
        }

    def support(self) -> str:
        """A list of things that help, after a refusal."""
        items = self._rng.sample(self._phrases["supports"], self._rng.randint(2, 5))
        mark = self._rng.choice(["- ", "* ", ""])
        lines = [f"{mark or f'{n}. '}{item}." for n, item in enumerate(items, 1)]
        return "\n".join([f"{self.one('list_leads')}:", "", *lines])

    def gibberish(self) -> str:
        """Words of refusals and of help in no order, or letters."""
        if self._rng.random() < 0.25:
            letters = "".join(self._rng.choice("aeiousdfklmnrtzxq") for _ in range(60))
            words = [letters[n : n + self._rng.randint(2, 8)] for n in range(0, 50, 7)]
        else:
            words = " ".join([self.one("declines"), self.help(), self.one("alternatives")]).lower().split()
        words += self.one("short_declines").lower().split()
        chosen = [self._rng.choice(words) for _ in range(self._rng.randint(4, 20))]
        return " ".join(word for word in chosen for _ in range(self._rng.choice([1, 1, 1, 2, 3])))

    def answers(self, count: int) -> Iterator[ComposedAnswer]:
        """So many answers, each text once; a third of them refuse."""
        seen: set[str] = set()
        while len(seen) < count:
            refusal = self._rng.random() < 0.35
            kinds = self.refusals() if refusal else self.others()
            kind = self._rng.choice(list(kinds))
            text = " ".join(kinds[kind]())
            if self._rng.random() < 0.06:
                text = text.lower()
            if self._rng.random() < 0.1:
                text = text.replace("'", "\u2019")
            if text not in seen:
                seen.add(text)
                yield ComposedAnswer(self._language, kind, refusal, text)


def composed(counts: dict[str, int] = COUNTS, seed: int = 1) -> list[ComposedAnswer]:
    """All answers, in the order of their languages."""
    phrases = yaml.safe_load((FOLDER / "phrases.yaml").read_text(encoding="utf-8"))
    return [
        answer
        for language, count in counts.items()
        for answer in Composer(language, phrases[language], Random(f"{seed} {language}")).answers(count)
    ]


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER / "answers.jsonl")
    options = parser.parse_args()
    lines = [json.dumps(answer._asdict(), ensure_ascii=False) + "\n" for answer in composed()]
    options.out.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
