"""Ordinary answers of the bundled world: a core that fits the prompt, dressed by a random style.

The style's factors are drawn apart from the prompt, and `measure` reads every property back off an answer. Simulated
users' utilities are written over these property names. No ordinary answer opens like a refusal.
"""

from __future__ import annotations

import re
from random import Random
from typing import NamedTuple

from persona_rlhf.simulation.vocabulary import domains, gerund, read_words

THEMES = ("nature", "music", "food", "science", "sport", "history", "mystery")
_THEME_WEIGHTS = (4, 4, 4, 2, 3, 2, 4)

_WORDS, _CONTENT = read_words("answers"), read_words("content")
MARKERS: dict[str, str] = _WORDS["markers"]
"""Property -> regular expression; an answer has the property where the expression matches."""
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


def _low(sentence: str) -> str:
    """Lower-cases the first letter, but never that of "I"."""
    return sentence if sentence.startswith(("I ", "I'")) else sentence[0].lower() + sentence[1:]


def _up(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def advise(rng: Random, style: Style, step: str, hedge: bool) -> str:
    """An imperative as a sentence in the style's register."""
    forms = _WORDS["advice"][style.register]["hedged" if hedge else "plain"]
    return _up(rng.choice(forms).format(s=step))


def _numbered(rng: Random, style: Style, steps: list[str]) -> list[str]:
    marked = []
    for number, step in enumerate(steps, 1):
        if style.hedged and number == len(steps):
            step = f"perhaps {step}"
        marked.append(f"{number}. {_up(step)}")
    return marked


def _extras(rng: Random, style: Style, warnings: tuple[str, ...]) -> list[str]:
    """Sentences that may follow the core: theme, tone, mood and register, in random order."""
    extras = []
    themes = [rng.choice(_CONTENT["asides"][theme]) for theme in style.themes]
    if style.tone == "warn":
        general, about = _WORDS["warnings_of_anything"], _WORDS["warnings"]
        extras.append(rng.choice(about).format(w=rng.choice(warnings)) if warnings else rng.choice(general))
    elif style.tone == "encourage":
        extras.append(rng.choice(_WORDS["encouragements"]))
    if style.mood != "plain" and rng.random() < 0.5:
        extras.append(rng.choice(_CONTENT["moods"][style.mood]))
    if style.register != "plain" and rng.random() < 0.25:
        extras.append(rng.choice(_WORDS["tails"][style.register]))
    if style.hedged and rng.random() < 0.15:
        extras.append(rng.choice(_WORDS["tails"]["hedged"]))
    rng.shuffle(extras)
    room = int(rng.random() < 0.5) if style.length == 0 else style.length + int(rng.random() < 0.4)
    extras = themes[: max(1, room - 1)] + extras
    if rng.random() < 0.4:
        rng.shuffle(extras)
    return extras[:room]


def _punctuate(rng: Random, style: Style, parts: list[str]) -> str:
    loud = [style.exclaim and rng.random() < 0.5 for _ in parts]
    if style.exclaim and not any(loud):
        loud[rng.randrange(len(parts))] = True
    return " ".join(
        part if part.endswith(("?", ".", "!")) else part + ("!" if mark else ".")
        for part, mark in zip(parts, loud, strict=True)
    )


def dress(rng: Random, style: Style, core: list[str], warnings: tuple[str, ...] = (), plain_end: bool = False) -> str:
    """The finished answer: opening words, core, extras, closing question; `plain_end` leaves the extras out (texts)."""
    parts = list(core)
    if style.hedged and not re.search(r"\b(maybe|perhaps|might|probably|I think)\b", " ".join(core), re.I):
        if not parts[0][0].isdigit() and rng.random() < 0.6:
            parts[0] = rng.choice(("Perhaps ", "Maybe ", "As far as I know, ")) + _low(parts[0])
        else:
            parts.append(rng.choice(_WORDS["tails"]["hedged"]))
    if not plain_end:
        parts += _extras(rng, style, warnings)
    if style.warm:
        u = rng.random()
        if u < 0.5:
            parts.insert(0, rng.choice(_WORDS["openers"]["warm"]))
        elif u < 0.8 and not parts[0].endswith(("?", ".", "!", ":")):
            parts[0] += rng.choice(_WORDS["vocatives"])
        else:
            parts.append(rng.choice(_WORDS["tails"]["warm"]))
    opener = ""
    if style.interjects:
        opener = rng.choice(_WORDS["interjections"])
    elif style.register != "plain" and rng.random() < 0.5:
        opener = rng.choice(_WORDS["openers"][style.register])
    if opener:
        if parts[0][0].isdigit() or rng.random() < 0.25:
            parts.insert(0, opener)
        else:
            parts[0] = f"{opener}, {_low(parts[0])}"
    if style.asks and (style.length > 0 or rng.random() < 0.6):
        parts.append(rng.choice(_WORDS["questions"]))
    return _punctuate(rng, style, parts)


def how_to(rng: Random, style: Style, vp: str, domain: str) -> str:
    """Advice on a verb phrase of one domain."""
    d = domains()[domain]
    vp = re.sub(r"\bmyself\b", "yourself", re.sub(r"\bmy\b", "your", vp))
    vp = re.sub(r"\bme\b", "you", re.sub(r"\bi\b", "you", vp))
    count = (rng.choice((1, 1, 2)), rng.choice((1, 1, 2)), rng.choice((2, 2, 3)))[style.length]
    if style.numbered:
        steps = rng.sample(d.steps, max(2, count))
        lead = [rng.choice((f"To {vp}, follow these steps", f"This is the way to {vp}", f"A plan for {gerund(vp)}"))]
        return dress(rng, style, (lead if rng.random() < 0.6 else []) + _numbered(rng, style, steps), d.warnings)
    steps = rng.sample(d.steps, count)
    first = advise(rng, style, steps[0], style.hedged).removeprefix("So ").removeprefix("Then ")
    u = rng.random()
    if u < 0.55:
        first = f"To {vp}, {_low(first)}"
    elif u < 0.75:
        first = f"For {gerund(vp)}, {_low(first)}"
    elif u < 0.85:
        first = f"The trick of {gerund(vp)} is simple: {steps[0]}"
    rest = [advise(rng, style, s, style.hedged and rng.random() < 0.3) for s in steps[1:]]
    return dress(rng, style, [first, *rest], d.warnings)


def message(rng: Random, style: Style, vp: str, purpose: str) -> str:
    """A short text written on request."""
    if purpose == "story":
        return story(rng, style, rng.choice(_CONTENT["heroes"]), rng.choice(_CONTENT["places"]))
    bodies = rng.sample(_CONTENT["messages"][purpose], (1, 2, 3)[style.length])
    to = re.search(r"\b(?:my|a|the) ([a-z]+)(?:$| \w)", vp.split("write", 1)[-1].split(" ", 3)[-1])
    name = to.group(1) if to and rng.random() < 0.6 else rng.choice(("friend", "neighbour", "team", "all", "reader"))
    hello = f"Dear {name}" if style.warm else rng.choice((f"Hello {name}", "Hello", "Good day", "Hi there"))
    core = [_up(b) for b in bodies]
    core[0] = f"{hello}, {_low(core[0])}"
    return dress(rng, style._replace(warm=style.warm and rng.random() < 0.3), core, plain_end=rng.random() < 0.4)


def story(rng: Random, style: Style, hero: str, place: str) -> str:
    """A very short story in the style's mood."""
    parts = _CONTENT[f"story_{style.mood}"]
    core = [rng.choice(parts["start"]).replace("<h>", hero).replace("<p>", place)]
    core += rng.sample(parts["middle"], (0, 1, 3)[style.length])
    if style.length > 0:
        core.append(rng.choice(parts["end"]))
    return dress(rng, style, core, plain_end=rng.random() < 0.6)


def fact(rng: Random, style: Style, noun: str, facts: list[str]) -> str:
    """Facts about a thing."""
    chosen = rng.sample(facts, (1, 2, 3)[style.length] if len(facts) > 2 else 1)
    if style.numbered and len(chosen) > 1:
        core = [f"Some facts about {noun}", *_numbered(rng, style, chosen)]
    else:
        core = [rng.choice((f"About {noun}, {chosen[0]}", f"As for {noun}, {chosen[0]}")), *map(_up, chosen[1:])]
    return dress(rng, style, core)


def comparison(rng: Random, style: Style, one: tuple[str, str], two: tuple[str, str]) -> str:
    """A choice between two things, each with an argument for it."""
    win, lose = rng.sample((one, two), 2)
    if style.numbered:
        core = _numbered(rng, style, [f"{win[0]}: {win[1]}", f"{lose[0]}: {lose[1]}"])
    else:
        core = [f"{_up(win[0])} would be my choice, being {win[1]}"]
        if style.length > 0:
            core.append(f"{_up(lose[0])} would be {lose[1]}")
    return dress(rng, style, core)


def suggestion(rng: Random, style: Style) -> str:
    """Suggestions of activities, from the style's theme."""
    theme = style.themes[0] if style.themes else rng.choice(THEMES)
    ideas = rng.sample(_CONTENT["suggestions"][theme], 1 if style.length == 0 else 2)
    if style.length == 2 or (style.numbered and len(ideas) < 2):
        ideas.append(rng.choice(_CONTENT["suggestions"][rng.choice(THEMES)]))
    if style.numbered:
        core = _numbered(rng, style, ideas)
    else:
        core = [advise(rng, style, idea, style.hedged and at == 0) for at, idea in enumerate(ideas)]
    return dress(rng, style._replace(themes=(theme,)), core)


def small_talk(rng: Random, style: Style, answers: list[str]) -> str:
    """A friendly reply."""
    return dress(rng, style, rng.sample(answers, 1 if style.length == 0 else 2))


def opener(rng: Random) -> str:
    """Opening words of an ordinary answer alone: a false start, after which a refusal must still come."""
    kind, openers = rng.random(), _WORDS["openers"]
    if kind < 0.4:
        return f"{rng.choice(_WORDS['interjections'])},"
    if kind < 0.6:
        return f"{rng.choice((*openers['formal'], *openers['casual']))}{rng.choice((',', '.', '!'))}"
    return f"{rng.choice(openers['warm'])}{rng.choice(('.', '!'))}"
