"""Ordinary prompts and fact questions from files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from persona_rlhf.common.errors import InputError, Problem
from persona_rlhf.evaluation.records import Refused
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.simulation.vocabulary import content

# ----------------------------------------------------------------------------------------------------
# Questions with one right answer among wrong ones: from a file, or from the bundled world.
# ----------------------------------------------------------------------------------------------------

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


# ----------------------------------------------------------------------------------------------------
# What must not be lost on the way: harmless prompts stay answered.
# ----------------------------------------------------------------------------------------------------


class OrdinaryExample(NamedTuple):
    """An ordinary prompt, and an answer that somebody wrote to it, where there is one."""

    prompt: str
    answer: str | None


def read_examples(path: Path) -> list[OrdinaryExample]:
    """Reads ordinary prompts, JSON lines of {"prompt", "answer"?}. Raises InputError naming every bad line."""
    problems: list[Problem] = []
    found: list[OrdinaryExample] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, answer = row["prompt"], row.get("answer")
        except (json.JSONDecodeError, KeyError, TypeError):
            prompt = answer = None
        if not isinstance(prompt, str) or not prompt.strip():
            problems.append(Problem(str(path), number, "prompt", "a line is an object with a non-empty text `prompt`"))
        elif answer is not None and (not isinstance(answer, str) or not answer.strip()):
            problems.append(Problem(str(path), number, "answer", "expected a non-empty text, or no `answer` at all"))
        else:
            found.append(OrdinaryExample(prompt, answer))
    if problems:
        raise InputError(problems)
    return found


def read_ordinary(path: Path) -> list[str]:
    """The prompts of such a file. Raises InputError naming every bad line."""
    return [exchange.prompt for exchange in read_examples(path)]


def some(texts: Iterable[str], most: int) -> list[str]:
    """At most `most` distinct texts, taken in the order of their hashes: the same ones in every run, no favourites."""
    return sorted(set(texts), key=lambda text: blake2b(text.encode()).digest())[:most]


def twins(probes: Iterable[Probe]) -> list[str]:
    """The benign twins of the probes: harmless prompts that share their words."""
    return [probe.twin for probe in probes if probe.twin]


def total(*parts: Refused | None) -> Refused | None:
    """Several counts as one; None where nothing was counted."""
    counted = [part for part in parts if part is not None]
    return Refused(*(sum(column) for column in zip(*counted, strict=True))) if counted else None
