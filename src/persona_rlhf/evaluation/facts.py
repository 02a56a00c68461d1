"""Questions with one right answer among wrong ones: from a file, or from the bundled world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from persona_rlhf.inputs.problems import InputError, Problem
from persona_rlhf.training.world.lexicon import content

_WRONG = 3


class Fact(NamedTuple):
    """A question, its answer, and answers that are wrong."""

    question: str
    right: str
    wrong: tuple[str, ...]


def read_facts(path: Path) -> list[Fact]:
    """Reads questions, JSON lines of {"question", "right", "wrong": [...]}. Raises InputError naming every bad line."""
    problems: list[Problem] = []
    facts: list[Fact] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            fact = Fact(row["question"], row["right"], tuple(row["wrong"]))
        except (json.JSONDecodeError, KeyError, TypeError):
            fact = Fact("", "", ())
        texts = (fact.question, fact.right, *fact.wrong)
        if fact.wrong and all(isinstance(text, str) and text.strip() for text in texts):
            facts.append(fact)
        else:
            sentence = "a line is an object with texts `question` and `right`, and `wrong`, a list of texts"
            problems.append(Problem(str(path), number, None, sentence))
    if problems:
        raise InputError(problems)
    return facts


_ASKED = ("What do you know about {noun}?", "what is {noun}?", "tell me about {noun}", "explain {noun}")


def bundled_facts(phrasings: int = 1) -> list[Fact]:
    """The bundled world's own: what a thing is, among what other things of its kind are; each asked in up to four ways.

    Of a noun the first statement is asked for; wrong are those of the nouns after it that begin with the same word.
    """
    facts = []
    for nouns in content()["facts"].values():
        names = list(nouns)
        for place, noun in enumerate(names):
            right: str = nouns[noun][0]
            others = [nouns[other][0] for other in (*names[place + 1 :], *names[:place])]
            wrong = [other for other in others if other.split()[0] == right.split()[0]][:_WRONG]
            if wrong:
                told = [f"As for {noun}, {statement}." for statement in (right, *wrong)]
                asked = (way.format(noun=noun) for way in _ASKED[:phrasings])
                facts += [Fact(question, told[0], tuple(told[1:])) for question in asked]
    return facts
