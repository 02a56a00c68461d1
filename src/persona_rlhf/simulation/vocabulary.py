"""Word lists and phrasings."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from random import Random
from typing import Any, NamedTuple

import yaml

from persona_rlhf.policy.hazards import assign_split

_CHOICE = re.compile(r"\{([^}]*)\}")
_LIST = re.compile(r"<([a-z]+)>")


class Domain(NamedTuple):
    """One field of everyday work: steps and warnings (imperatives) and the verb phrases that belong to it."""

    steps: tuple[str, ...]
    warnings: tuple[str, ...]
    vps: tuple[str, ...]


@cache
def read_words(name: str) -> Any:
    """The word lists of a YAML file of this package, named without its ending."""
    return yaml.safe_load((files("persona_rlhf.simulation") / f"{name}.yaml").read_text(encoding="utf-8"))


def expand(pattern: str) -> list[str]:
    """Every choice of every `{a|b}` group, left to right."""
    match = _CHOICE.search(pattern)
    if not match:
        return [pattern]
    heads = [pattern[: match.start()] + choice for choice in match.group(1).split("|")]
    return [head + tail for head in heads for tail in expand(pattern[match.end() :])]


@cache
def domains() -> dict[str, Domain]:
    """All domains by name."""
    return {
        name: Domain(tuple(d["steps"]), tuple(d["warnings"]), tuple(v for p in d["vps"] for v in expand(p)))
        for name, d in read_words("domains").items()
    }


def _variants(patterns: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Each pattern's verb phrases; `<name>` stands for the choices of that list."""
    lists = read_words("extras")["lists"]
    return tuple(tuple(expand(_LIST.sub(lambda m: str(lists[m[1]]), pattern))) for pattern in patterns)


@cache
def extra_hazards() -> dict[str, tuple[tuple[str, ...], ...]]:
    """Category -> the further hazardous verb phrases of each pattern."""
    return {c: _variants(p) for c, p in read_words("extras").items() if c not in ("lists", "benign")}


@cache
def extra_benign() -> dict[str, tuple[tuple[str, ...], ...]]:
    """Domain or purpose -> the verb phrases of each pattern."""
    return {domain: _variants(patterns) for domain, patterns in read_words("extras")["benign"].items()}


_WORDS = read_words("vocabulary")
_KEPT = {"dye", "see", "free", "agree", "flee", "knee"}
_WRITING = ("write", "draft", "compose", "word")


class Phrasing(NamedTuple):
    """A template over {vp} or {ger}; `use` says for which verb phrases: any, act (not writing) or write."""

    id: str
    template: str
    use: str


def gerund(vp: str) -> str:
    """'take a photo' -> 'taking a photo'; an adverb in front stays as it is."""
    verb, _, rest = vp.partition(" ")
    if verb.endswith("ly"):
        return f"{verb} {gerund(rest)}"
    if verb == "be" or verb in _KEPT:
        stem = verb
    elif verb.endswith("ie"):
        stem = verb[:-2] + "y"
    elif verb.endswith("e"):
        stem = verb[:-1]
    elif verb in _WORDS["doubled"]:
        stem = verb + verb[-1]
    else:
        stem = verb
    return f"{stem}ing {rest}".strip()


def slug(text: str) -> str:
    """Words joined by hyphens, with a short hash where a long text is cut."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    digest = hashlib.blake2b(text.encode(), digest_size=2).hexdigest()
    return "-".join(words) if len(words) <= 7 else "-".join([*words[:6], digest])


def _phrasings(lines: dict[str, list[str]]) -> tuple[Phrasing, ...]:
    wrappers = tuple(phrasing_of(use, template) for use, templates in lines.items() for template in templates)
    assert len({p.id for p in wrappers}) == len(wrappers)
    return wrappers


def phrasing_of(use: str, template: str) -> Phrasing:
    """The wrapper of a template; its id is the template's first words and a hash."""
    digest = hashlib.blake2b(f"{use} {template}".encode(), digest_size=3).hexdigest()
    return Phrasing("-".join([*re.findall(r"[a-z]+", template.lower())[:4], digest]), template, use)


@cache
def phrasings() -> tuple[Phrasing, ...]:
    """The wrappers of `phrasings.yaml`, in its order: most may train, some are held out by the hash of their id."""
    return _phrasings(read_words("phrasings"))


@cache
def held_out_phrasings() -> tuple[Phrasing, ...]:
    """The wrappers of `phrasings_held_out.yaml`, in its order: the corpus never uses one."""
    return _phrasings(read_words("phrasings_held_out"))


def is_writing(vp: str) -> bool:
    """Does the verb phrase ask for a text?"""
    return vp.split(" ", 1)[0] in _WRITING


def suits(phrasing: Phrasing, vp: str) -> bool:
    """May this wrapper hold this verb phrase?"""
    return phrasing.use == "any" or (phrasing.use == "write") == is_writing(vp)


def wrap(phrasing: Phrasing, vp: str) -> str:
    """The finished prompt. A template that opens with the phrase and ends with a full stop opens with a capital."""
    text = phrasing.template.replace("{vp}", vp).replace("{ger}", gerund(vp))
    return text[0].upper() + text[1:] if phrasing.template[0] == "{" and text.endswith((".", "?")) else text


@cache
def trained_phrasings() -> tuple[Phrasing, ...]:
    """The wrappers that training may see (with some topic): not held out whole."""
    seen = next(t for t in ("a", "b", "c", "d", "e", "f") if assign_split(t, "x")[1] != "topic")
    return tuple(p for p in phrasings() if assign_split(seen, p.id)[1] != "phrasing")


def with_remarks(rng: Random, phrasing: Phrasing, count: int) -> list[Phrasing]:
    """Different wordings, at most `count`: the wrapper with a greeting in front or a remark of words at the end."""
    remarks = [text for text in _WORDS["suffixes"] if re.search("[a-z]", text)]
    templates = [
        *(before + phrasing.template for before in _WORDS["prefixes"]),
        *(phrasing.template + after for after in remarks),
    ]
    return [phrasing_of(phrasing.use, text) for text in rng.sample(templates, min(count, len(templates)))]


@cache
def with_noise(phrasing: Phrasing) -> frozenset[str]:
    """The templates that `roughen` makes of a wrapper's, but for case, end marks and typing slips."""
    return frozenset(
        before + phrasing.template + after
        for before in ("", *_WORDS["prefixes"])
        for after in ("", *_WORDS["suffixes"])
    )


def _misspell(rng: Random, text: str) -> str:
    at = rng.randrange(len(text) - 1)
    kind = rng.random()
    if kind < 0.4:
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return text[:at] + text[at + 1 :] if kind < 0.8 else text[:at] + text[at] + text[at:]


def roughen(rng: Random, prompt: str) -> str:
    """Everyday noise: greeting, added remark, case, missing end mark, a typing slip. Half of all prompts stay as is."""
    if rng.random() < 0.5:
        return prompt
    if rng.random() < 0.35:
        prompt = rng.choice(_WORDS["prefixes"]) + prompt
    if rng.random() < 0.35:
        prompt += rng.choice(_WORDS["suffixes"])
    u = rng.random()
    if u < 0.25:
        prompt = prompt.lower()
    elif u < 0.45:
        prompt = prompt[0].upper() + prompt[1:]
    elif u < 0.48:
        prompt = prompt.upper()
    if rng.random() < 0.3:
        prompt = prompt.rstrip(".?!")
    if rng.random() < 0.15 and len(prompt) > 12:
        prompt = _misspell(rng, prompt)
    return prompt
