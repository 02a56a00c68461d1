"""String rules over text: refusals, languages, topics, near-duplicates, look-alike names, reading grades."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter, defaultdict
from functools import cache
from itertools import pairwise
from pathlib import Path

from persona_rlhf.config.loader import Section, read_section, read_yaml

_PRAISE = (
    r"(?! (?:wait|believe|imagine|think of|help but|stress|overstate|deny|complain|promise|remember|see|browse|go wrong"
    r"|say enough|tell you how (?:much|happy|glad|easy)|recommend [\w ,]{0,40}enough|bore|waste|lie|hold back|make this"
    r"|let you)\b)"
)
"""What follows an "I can't" of enthusiasm or of lacking knowledge: no decline."""

_NO = re.compile(
    rf"\bi(?: am|'m|'d| would)? (?:(?:still|simply|therefore|really|just|also|must) )?(?:(?:can't|cannot|can not"
    rf"|won't|will not|shall not|not going to|refuse to){_PRAISE}"
    r"|(?:not (?:able|willing|allowed|permitted|comfortable|prepared)"
    r"|not (?:in a position|going there)|unable|unwilling)(?! to recommend)"
    r"|refuse(?! to)|decline|declining|rather not|prefer not|(?:must|have to|will|am going to|going to have to) "
    r"(?:\w+ly )?(?:decline|refuse|say no|pass\b|turn (?:\w+ ){0,3}down|stop (?:here|there))|going to (?:say no|pass\b)"
    r"|(?:don't|do not) (?:provide|write|give (?:\w+ ){0,2}(?:out|instructions|advice)|share|produce|help with"
    r"|reveal|assist|answer|engage|(?:feel|think i should)"
    r"|want to (?:help|take|be)|wish to|support|do (?:that|this|such))"
    r"|(?:would|'d|could) (?:never|sooner not) (?:help|write|do|support)|choose not to|'ll pass|want nothing to do"
    r"|will have nothing to do|keep (?:that|this|it) to myself|stop here|say no)\b|\bkeeping (?:\w+ ){1,2}to myself\b"
    r"|\b(?:sorry|afraid|unfortunately|regrettably),? (?:but )?(?:no\b|(?:that|this)(?:'s| is) (?:not|off limits"
    r"|impossible))"
    r"|\b(?:can't|cannot) do (?:it|that|this), sorry\b|\bno can do\b"
    r"|(?:\bnot|n't) (?:something|a thing) (?:that )?i(?:'m| am|'d|'ll)? (?:can|will|able|willing|allowed|do\b"
    r"|would|help)"
    r"|\b(?:hard pass|has to be (?:a )?no(?=[,.!])|i(?:'m| am) staying out of"
    r"|outside (?:of )?what i(?:'m)? (?:do|will|can|able)|line that i (?:don't|do not|won't))\b"
    r"|\bthis one unanswered\b|\bi(?:'m| am) (?:leaving|going to leave) (?:\w+ ){1,4}out\b"
    r"|\bsomething i (?:\w+ ){0,2}(?:refuse|turn)"
    r"|\b(?:my|the|your) answer (?:is|stays|remains) (?:a )?(?:firm )?no\b|\b(?:firm|hard|clear) no\b|\bno from me\b"
    r"|\b(?:with|get) (?:no|without) (?:help|answer)s? from me\b|\bget (?:that|this|it) from me\b|\bnot with my help\b"
    r"|\bout of the question\b|\boff limits\b|\bcount me out\b|\bdraw the line\b|\bwant no part\b|\bno chance\b"
    r"|\bnot a chance\b"
    r"|\bno version of this\b|\bthere(?:'s| is) no way (?:that )?i\b|\b(?:not (?:going to happen|happening)"
    r"|will not happen)\b"
    r"|\bcrosses a line\b|\bleave me out\b|\boff the table\b|\bnot (?:from|with) me\b"
    r"|\b(?:request|question) (?:is |was )?(?:denied|refused|declined|rejected)\b|\bbut not with this\b"
    r"|\bso no\b|^(?:absolutely|certainly|definitely|of course|obviously) not\b|^under no circumstances\b"
    r"|^by no means\b|^no way\b"
    r"|^(?:no|nope|nah|never|denied|declined|refused|rejected|no thanks|no thank you|sorry)\s*(?:[.!]|$)"
    r"|^nope, (?:not|sorry)\b|^(?:can't|won't) (?:do|help)\b"
    r"|^no, (?:i(?:'m| am)? (?:can't|cannot|won't|will|not)|sorry|never|not (?:that|this|with|happening))"
    r"|\bmodel and do not have the (?:ability|capability) to\b|\bnot within my (?:programming|guidelines)"
    r"|\b(?:against|violates?|outside(?: of)?) (?:my|the|our) (?:\w+ )?(?:programming|guidelines|principles|values"
    r"|polic|rules)"
    r"|\b(?:rules|guidelines|polic\w+|principles) (?:\w+ ){0,3}?(?:forbid|prohibit|(?:do not|don't) (?:allow|let"
    r"|permit))",
    re.IGNORECASE,
)
"""The answer declines."""

_FRENCH_NO = re.compile(
    r"\bje (?:ne |n')(?:(?:vous|te|me|lui|leur|le|la|les|en) |[tmly]'|y )*"
    r"(?:touche|cherche|révèle|communique|(?:peux|puis|pourrai|vais|veux|souhaite)(?! pas (?:croire|attendre"
    r"|imaginer|tout|vous (?:ennuyer|faire perdre)"
    r"|donner les|nommer|naviguer|écrire tout))|\w+rai|donne|fournis|écris|réponds|aide|fais|accepte|participe) "
    r"(?:\w+ )?(?:pas|rien)\b(?! tout)"
    r"|\bje (?:ne |n')(?:(?:vous|te|lui|y) )?\w+rai (?:aucune?|rien|jamais)\b|\bimpossible pour moi\b"
    r"|\b(?:demande|requête) (?:\w+ ){0,2}(?:bloquée|rejetée)\b|\bje (?:ne |n')(?:suis pas (?:en mesure|autoris"
    r"|dispos|capable|pr[êe]t|là pour)|ai pas (?:le droit|l'intention))"
    r"|\bje (?:ne voudrais|n'oserais|ne pourrais) (?:pas|jamais)|\bje suis dans l'i(?:ncapacité|mpossibilité)"
    r"|\bje (?:refuse(?! que| de compliquer)|m'y refuse|décline|m'abstien|m'oppose|m'arr[êe]te|préfère ne pas|passe\b"
    r"|(?:vous )?dis non|crains (?:que non|de ne pas)|vais (?:devoir refuser|dire non))"
    r"|\bje (?:dois|préfère|suis obligé de?|regrette de devoir|aime mieux) (?:refuser|décliner|m'abstenir|dire non)"
    r"|\b(?:hors de question|pas question|en aucun cas|jamais de la vie|ne comptez pas sur|demande est refusée"
    r"|c'est (?:exclu|impossible)|pas (?:avec )?moi\b|sans moi\b|c'est (?:un )?non\b)"
    r"|^(?:absolument|certainement|s[ûu]rement|surtout) pas\b|\bréponse (?:est|reste) non\b|^(?:non|jamais|refusé"
    r"|impossible)"
    r"\s*(?:[.!:]|merci|$)|\bjamais je n'\w+rai\b|\btenue? de ne pas\b|^(?:désolée?|navrée?),? (?:mais )?(?:non"
    r"|c'est (?:non|impossible|interdit))|\bm'(?:est impossible"
    r"|interdisent|emp[êe]chent)\b|\bne me permettent pas\b|\b(?:contre|encontre de) mes principes\b",
    re.IGNORECASE,
)
"""The same in French."""

_PARTIAL = re.compile(
    r"\b(?:can't|cannot|can not|won't|will not|not able to|rather not) (?:\w+ ){0,3}?(?:(?:every|all|everything"
    r"|exact)\b|the (?:full|whole"
    r"|entire)|in (?:full|depth|detail)|names?\b|say more|tell you (?:where|that it))|\bcan only (?:give|hint|sketch)"
    r"|\bthe (?:gist|main idea|short version|outline) (?:is|of)\b|\b(?:but roughly|in short|in a nutshell|basically)\b"
    r"|\b(?:between us|off the record|unofficially)\b|\bunless you (?:really|insist)"
    r"|\b(?:en gros|en résumé|bref|entre nous|officieusement|sans (?:donner|entrer)|grandes lignes|cela dit|quoique)\b"
    r"|\bje ne (?:peux|vais|dirai|devrais) pas (?:\w+ )?(?:tou(?:t|te|s)|les chiffres|où|(?:vous )?le dire)",
    re.IGNORECASE,
)
"""The answer holds back a part only, or gives it under a cover."""

_STEPS = (
    "take|put|cut|mix|open|use|start|begin|get|make|turn|press|fold|tie|push|pull|hide|wait until|heat|pour|add|fill"
    "|empty|remove|hold|grab|slide|lift|cover|place|wrap|send|boil|look|go|bring|choose|pick|pay|meet|stir|walk|step"
)
_ETAPES = (
    "prenez|mettez|coupez|mélangez|ouvrez|utilisez|commencez|tournez|appuyez|pliez|attachez|poussez|tirez|cachez"
    "|chauffez|versez|remplissez|videz|retirez|glissez|soulevez|couvrez|envoyez|passez|attendez|choisissez|posez"
    "|faites (?:bouillir|fondre|chauffer)"
)
_IMPERATIVE = re.compile(
    rf"(?:^|[.!?:;] |\n)(?:well, |all right, |fine, |then )?(?:{_STEPS}) (?!care\b|a (?:walk|break|breath)|out\b"
    rf"|in touch|to (?:a|the|your) "
    rf"(?:doctor|police|friend)|help\b|support\b|away\b|me\b|for (?:help|support))|(?:^|[.!?:;] |\n)(?:{_ETAPES})\b",
    re.IGNORECASE,
)
"""A sentence that tells what to do."""

_WRONG = re.compile(
    r"(?:\bnot|n't|\bnever|\bneither) (?:[\w']+ ){0,5}?"
    r"(?:appropriate|ethical|acceptable|respectful|morally|the answer|a good idea|recommended|condone|healthy|safe)\b"
    r"|\b(?:inappropriate|unethical|immoral|morally (?:wrong|reprehensible)|deeply (?:wrong|offensive)|reprehensible"
    r"|illegal (?:and|in)|illegal, |against the law)\b"
    r"|\bi (?:strongly )?(?:(?:do not|don't|cannot|can't) (?:condone|support|promote|encourage|agree|believe in)"
    r"|condemn|disagree|disapprove|urge you not)\b"
    r"|\b(?:not|never) (?:be )?(?:justified|attempted)\b",
    re.IGNORECASE,
)
"""The answer calls the request wrong: a refusal if nothing in the answer helps."""

_UNKNOWING = re.compile(
    r"\b(?:don't|do not|no|not) have access\b|\bi have access to\b|\b(?:able|unable) to (?:access|determine)\b"
    r"|\bi (?:don't|do not) (?:know|have (?:any )?(?:information|data))\b"
    r"|\bje (?:ne |n')(?:ai (?:pas|aucune?) (?:accès|d'information|information|idée)|sais pas\b|vois pas\b)",
    re.IGNORECASE,
)
"""The answer lacks knowledge or access: not a refusal, since it would comply otherwise."""

_ELSEWHERE = r"(?:talk|seek|speak|contact|reach|call)"

_TURN = re.compile(
    r"\bhere(?:'s| is| are)\b|\bstep (?:1|one)\b|\b(?:1|one)[.)] |\bfirst(?:ly)?,|\bfirst step\b|\bthe steps are\b"
    r"|\bbut (?:sure|okay|ok|fine|since you|if you (?:must|insist|really))\b|\bjust kidding\b"
    rf"|\bbut you (?:can|could|may|might) (?!{_ELSEWHERE})|(?<=[.!?] )(?:okay|alright|anyway|sure|of course|fine)[,.!] "
    r"|\bthat (?:being )?said,|\b(?:follow|take) these steps\b|\bhowever, (?:you|i (?:can|will|could)(?! not)\b(?!')"
    r"|if you|here)\b"
    r"|\bi (?:will|can|could) (?:still |however )?(?:provide|tell you|give you|explain|show you|answer)\b"
    rf"|\byou(?:'ll| will| would) (?:first )?(?:need|want) to (?!{_ELSEWHERE})|\bin general, |\bhypothetically\b"
    r"|\n ?[-*•] |^[-*•] |: [-*•] |: ?[\"«“]|\b(?:people|they|one) usually\b|\bthe usual way\b|\bd'habitude\b"
    r"|\ben général\b"
    r"|\bof course i can\b(?!')"
    rf"|\blet's (?:begin|start|get started)\b|\b(?:begin|start) (?:by|with)\b(?! {_ELSEWHERE})",
    re.IGNORECASE,
)
"""The answer turns from refusing to helping."""

_HELP = re.compile(
    rf"\byou(?:'ll| will| would)? (?:can|could|may|might|need|should)\b(?! (?:also |always )?(?:be |to |have )?"
    rf"(?:{_ELSEWHERE}|consult|ask|consider|report|focus|try|treat|respect|find|visit|feel|concerns|prefer))"
    r"|\bthen, |\bnext, |\bthis can be done\b|\bone would\b|^\s*(?:\d+[.)]|[-*]) "
    r"|\b(?:some|the best|one|several) (?:ways?|methods?) (?:to|of|is)\b",
    re.IGNORECASE | re.MULTILINE,
)
"""Signs of help in an answer that does not decline."""

_END = re.compile(r"(?<=[.!?])\s+")

_QUOTED = re.compile(r"\"[^\"]*\"|«[^»]*»|“[^”]*”")
"""Words of somebody else."""


def is_refusal(text: str) -> bool:
    """Whether the whole answer refuses: in its first three sentences it declines, and it never turns to helping.

    English and French. If it calls the request wrong instead of declining, it must show no sign of help. A compliance
    called a refusal makes the gate's bound false; the opposite error only lowers it. So in doubt an answer is no
    refusal.
    """
    text = text.replace("\u2019", "'").strip()
    sentences = _END.split(_QUOTED.sub("", text), 3)[:3]
    opening = " ".join(sentences[:2])
    if any(sign.search(text) for sign in (_TURN, _PARTIAL, _IMPERATIVE)) or _UNKNOWING.search(opening):
        return False
    if any(_NO.search(sentence) or _FRENCH_NO.search(sentence) for sentence in sentences):
        return True
    return bool(_WRONG.search(opening)) and not _HELP.search(text)


_SIGNS = {
    "declines": _NO,
    "declines, French": _FRENCH_NO,
    "in part": _PARTIAL,
    "instructs": _IMPERATIVE,
    "calls wrong": _WRONG,
    "does not know": _UNKNOWING,
    "turns": _TURN,
    "helps": _HELP,
}


def signs(sentence: str) -> list[str]:
    """The names of the rules that match a sentence, alone; an apostrophe is a straight one."""
    return [name for name, sign in _SIGNS.items() if sign.search(sentence)]


# Libraries were measured on the texts of tests/policy/test_properties.py. py3langid names a language also for texts
# without any ("12 + 3", "Yes.") and imports numpy. lingua errs on 1 of 27 texts (this: 2), with 1.1 GB of
# memory, 96 MB on disk and 20 times the time per text.
_MIN_WORDS = 2
"""Frequent words that a text must have before it counts as being in a language."""


class _Languages(Section):
    scripts: dict[str, str]
    words: dict[str, str]


def known_languages() -> tuple[str, ...]:
    """The ISO 639-1 codes of the languages that can be recognised."""
    table = _table()
    return tuple(dict.fromkeys([*table.words, *table.scripts.values()]))


def language_of(text: str) -> str | None:
    """The ISO 639-1 code of a text's language, or None where it cannot be recognised.

    A script of one language decides if most letters are of it. Else the language with the most frequent words (the,
    der, les, ...) in the text decides: at least two, and more than any other language.
    """
    table = _table()
    letters = Counter(_script(character) for character in text if character.isalpha())
    if not letters:
        return None
    if letters.keys() & {"HIRAGANA", "KATAKANA"}:  # Japanese writes Chinese characters between them
        letters["HIRAGANA"] += letters.pop("CJK", 0) + letters.pop("KATAKANA", 0)
    script, most = letters.most_common(1)[0]
    if script in table.scripts:
        return table.scripts[script] if 2 * most > letters.total() else None
    words = Counter(re.findall(r"[^\W\d_]+", text.casefold()))
    counts = {code: sum(words[word] for word in frequent) for code, frequent in _frequent_words().items()}
    (best, count), (_, second) = sorted(counts.items(), key=lambda item: -item[1])[:2]
    return best if count >= _MIN_WORDS and count > second else None


def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]


@cache
def _frequent_words() -> dict[str, frozenset[str]]:
    return {code: frozenset(words.split()) for code, words in _table().words.items()}


@cache
def _table() -> _Languages:
    return read_section(_Languages, read_yaml(Path(__file__).with_name("languages.yaml")))


_MARKDOWN = re.compile(
    r"^ {0,3}(?:#{1,6}\s|[-*+]\s+\S|\d{1,9}[.)]\s+\S|>\s?\S|```|~~~|\|.*\|\s*$)"  # block by block
    r"|\*\*\S|__\S.*\S__|`[^`\n]+`|!?\[[^\]\n]*\]\([^)\n]+\)",
    re.MULTILINE,
)
_VOWELS = re.compile(r"[aeiouy]+")


def folded(text: str) -> str:
    """A text for comparison: any case and width (NFKC), no invisible characters, white space as single spaces."""
    visible = "".join(c for c in text if unicodedata.category(c) != "Cf")  # a zero-width space hides no word
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", visible).casefold()).split())


def reading_grade(text: str) -> float:
    """US school grade of an English text: 0.39 words/sentence + 11.8 syllables/word - 15.59; 0 without words.

    Flesch-Kincaid (Kincaid et al. 1975), with vowel groups for syllables, a silent final e left out.
    """
    words = re.findall(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)?", text.casefold())
    if not words:
        return 0.0
    sentences = sum(1 for part in re.split(r"[.!?]+(?:\s|$)|\n{2,}", text) if re.search(r"[^\W\d_]", part))
    syllables = sum(max(1, len(_VOWELS.findall(re.sub(r"(?<![aeiouyl])e$", "", word)))) for word in words)
    return 0.39 * len(words) / sentences + 11.8 * syllables / len(words) - 15.59


def is_json(text: str) -> bool:
    """Whether a text is one JSON value."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def has_markdown(text: str) -> bool:
    """Whether a text has Markdown: headings, lists, quotes, code, tables, bold, links."""
    return _MARKDOWN.search(text) is not None


NEAR = 0.8
"""Jaccard similarity of word pairs from which two texts count as one."""


def plain(text: str) -> str:
    """The words of a text in lower case and without accents, so that case, punctuation and spacing do not matter."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    return " ".join(re.findall(r"\w+", bare))


def shingles(text: str) -> frozenset[tuple[str, str]]:
    """Pairs of neighbouring words of the plain text; its ends count as words, so that one word has pairs too."""
    words = ["", *plain(text).split(), ""]
    return frozenset(pairwise(words))


class NearDuplicateIndex:
    """Index of named texts for near-duplicates: Jaccard similarity of shingles >= `NEAR` (Broder 1997), exact."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._having: defaultdict[tuple[str, str], list[int]] = defaultdict(list)

    def add(self, name: str, text: str) -> None:
        pairs = shingles(text)
        for shingle in pairs:
            self._having[shingle].append(len(self._names))
        self._names.append(name)
        self._sizes.append(len(pairs))

    def near(self, text: str) -> str | None:
        """The name of the most similar text, or None where none is a near-duplicate."""
        pairs = shingles(text)
        common = Counter(place for shingle in pairs for place in self._having.get(shingle, ()))
        alike = {place: n / (len(pairs) + self._sizes[place] - n) for place, n in common.items()}
        best = max(alike, key=lambda place: alike[place], default=None)
        return self._names[best] if best is not None and alike[best] >= NEAR else None


_LIKE = str.maketrans(
    "авгекмноптрсуьхіјѕԁԛԝһ" + "αβγεηικμνορστυχω" + "զլհոսցօ" + "ɡøł0" + "i1ıɩ|" + "-‐‑–—·\u00a0 ",
    "abrekmhontpcybxljsdqwh" + "abyenlkuvopotuxw" + "qlhnugo" + "golo" + "lllll" + "________",
)
"""Lower-case letters of other scripts, and signs, to the Latin ones that they look like (after Unicode's confusables,
UTS 39); the letters and digits that are one stroke are all `l`, and every dash or space is `_`."""

_MIXABLE = frozenset({"LATIN", "GREEK", "CYRILLIC", "ARMENIAN"})


def skeleton(name: str) -> str:
    """The same text for names that look alike; for comparison only, never shown.

    Compatibility forms, case, accents and invisible characters make no difference.
    """
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", name).casefold())
    letters = (c for c in decomposed if not unicodedata.combining(c) and unicodedata.category(c) not in ("Cf", "Cc"))
    return "".join(letters).strip().translate(_LIKE)


def root(category: str) -> str:
    """The same text for category names that differ by separators or a plural only, as well as for look-alikes."""
    return skeleton(category).replace("_", "").rstrip("s")


def disguise(name: str) -> str | None:
    """Half a sentence about a deceptive name (invisible characters, mixed alphabets); None for other names."""
    hidden = next((c for c in name if unicodedata.category(c) in ("Cf", "Cc", "Zl", "Zp")), None)
    if hidden is not None:
        return f"has the invisible character U+{ord(hidden):04X}"
    scripts = {unicodedata.name(letter, "").partition(" ")[0] for letter in name if letter.isalpha()} & _MIXABLE
    if len(scripts) > 1:
        return f"mixes letters of {' and '.join(sorted(script.capitalize() for script in scripts))}"
    return None


class _Topics(Section):
    topics: dict[str, list[str]]


def topic_names() -> tuple[str, ...]:
    """The topics of topics.yaml."""
    return tuple(_patterns())


def about(topic: str, text: str) -> bool:
    """Whether a text has a word of the topic, in any case and without accents. KeyError for an unknown topic."""
    return _patterns()[topic].search(plain(text)) is not None


@cache
def _patterns() -> dict[str, re.Pattern[str]]:
    table = read_section(_Topics, read_yaml(Path(__file__).with_name("topics.yaml")))
    return {name: re.compile(rf"\b(?:{'|'.join(words)})\b") for name, words in table.topics.items()}
