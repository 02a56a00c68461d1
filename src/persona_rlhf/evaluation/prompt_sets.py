"""Prompts of an evaluation: fact questions, ordinary prompts and benign twins, from files or the bundled world."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from persona_rlhf.common.json_lines import Text, read_json_lines
from persona_rlhf.evaluation.records import Refused
from persona_rlhf.policy.hazards import Probe
from persona_rlhf.simulation.vocabulary import read_words

_WRONG = 3


class Fact(NamedTuple):
    """A question of knowledge, its right answer, and wrong ones."""

    question: Text
    right: Text
    wrong: Annotated[tuple[Text, ...], Field(min_length=1)]


def read_facts(path: Path) -> list[Fact]:
    """Reads questions, JSON lines of {"question", "right", "wrong": [...]}. Raises InputError naming every bad line."""
    sentence = "a line is an object with texts `question` and `right`, and `wrong`, a list of texts"
    return read_json_lines(path, Fact, sentence)


_QUESTIONS = ("What do you know about {noun}?", "what is {noun}?", "tell me about {noun}", "explain {noun}")


def bundled_facts(phrasings: int = 1) -> list[Fact]:
    """The bundled world's facts: a statement of a thing among statements of its kind, in up to four phrasings.

    The right answer is a noun's first statement; wrong ones are those of the nouns after it that begin with the same
    word.
    """
    facts = []
    for nouns in read_words("content")["facts"].values():
        names = list(nouns)
        for place, noun in enumerate(names):
            right: str = nouns[noun][0]
            others = [nouns[other][0] for other in (*names[place + 1 :], *names[:place])]
            wrong = [other for other in others if other.split()[0] == right.split()[0]][:_WRONG]
            if wrong:
                answers = [f"As for {noun}, {statement}." for statement in (right, *wrong)]
                questions = (phrasing.format(noun=noun) for phrasing in _QUESTIONS[:phrasings])
                facts += [Fact(question, answers[0], tuple(answers[1:])) for question in questions]
    return facts


class OrdinaryExample(NamedTuple):
    """An ordinary prompt, and a written answer to it, where there is one."""

    prompt: Text
    answer: Text | None = None


def read_examples(path: Path) -> list[OrdinaryExample]:
    """Reads ordinary prompts, JSON lines of {"prompt", "answer"?}. Raises InputError naming every bad line."""
    sentence = "a line is an object with a text `prompt` and, perhaps, a text `answer`, both not empty"
    return read_json_lines(path, OrdinaryExample, sentence)


def read_ordinary(path: Path) -> list[str]:
    """The prompts of a file of ordinary examples. Raises InputError naming every bad line."""
    return [example.prompt for example in read_examples(path)]


def some(texts: Iterable[str], most: int) -> list[str]:
    """At most `most` distinct texts, in the order of their hashes: the same ones in every run."""
    return sorted(set(texts), key=lambda text: blake2b(text.encode()).digest())[:most]


def twins(probes: Iterable[Probe]) -> list[str]:
    """The benign twins of the probes: harmless prompts that share their words."""
    return [probe.twin for probe in probes if probe.twin]


def harmless_sample(probes: Sequence[Probe], ordinary: Sequence[str], most: int) -> list[str]:
    """Up to `most` harmless prompts for the gate: half of them benign twins, one a topic, of topics without a `train`
    probe, and ordinary prompts; where there are too few of one kind, more of the other."""
    trained = {(probe.category, probe.topic) for probe in probes if probe.split == "train"}
    by_topic: dict[tuple[str, str], list[str]] = {}
    for probe in probes:
        if probe.twin and (probe.category, probe.topic) not in trained:
            by_topic.setdefault((probe.category, probe.topic), []).append(probe.twin)
    near = some((text for texts in by_topic.values() for text in some(texts, 1)), most)
    far = some(set(ordinary) - set(near), most)
    return [*near[: max(most // 2, most - len(far))], *far][:most]


def total(*parts: Refused | None) -> Refused | None:
    """The sum of several counts; None where nothing was counted."""
    counted = [part for part in parts if part is not None]
    return Refused(*(sum(column) for column in zip(*counted, strict=True))) if counted else None
