"""The pages are written in short sentences, and call nobody "he"."""

import re

import pytest

from tests.docs.pages import PAGES, ROOT, page_name
from tests.docs.prose import MOST_WORDS, length, sentences, words

MEAN_WORDS = 20
LONG_SHARE = 0.05
"""The share of a page's sentences that may be longer than `MOST_WORDS`."""

WRITTEN = [*PAGES, ROOT / "CONTRIBUTING.md"]
SHORT = [page for page in WRITTEN if page_name(page) != "LOG.md"]
PRONOUN = re.compile(r"\b(he|his|him|himself)\b", re.IGNORECASE)


@pytest.mark.parametrize("page", SHORT, ids=page_name)
def test_sentences_are_short(page):
    found = length(page.read_text(encoding="utf-8"))
    assert found.mean <= MEAN_WORDS, f"{found.mean:.1f} words a sentence; {MEAN_WORDS} at most"
    assert len(found.long) <= LONG_SHARE * found.sentences, [f"{words(text)} words: {text}" for text in found.long]


@pytest.mark.parametrize("page", WRITTEN, ids=page_name)
def test_nobody_is_called_he(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [f"line {n}: {line}" for n, line in enumerate(lines, 1) if PRONOUN.search(line)]


def test_one_paragraph_is_split_at_the_ends_of_its_sentences():
    text = 'One is here. `b.c` follows! Is "this" three? (Four stands in brackets.) Five'
    assert sentences(text) == [
        "One is here.",
        "Code follows!",
        'Is "this" three?',
        "(Four stands in brackets.)",
        "Five",
    ]


def test_a_point_inside_a_sentence_does_not_end_it():
    for text in (
        "The bound is 0.97 at best.",
        "It reads files, e.g. YAML, i.e. text.",
        "Kirk et al. (2023) and J. Doe wrote config.yaml rules.",
        "A list ... goes on.",
        "`One. Two. Three.` is one word.",
        "A colon: it goes on; a semicolon as well.",
        "Two lines\nare one sentence.",
    ):
        assert len(sentences(text)) == 1, text


def test_blank_lines_list_items_headings_and_blocks_end_a_sentence():
    page = "# Title\nfirst\n\nsecond\n- third\n  goes on\n* fourth\n1. fifth\n```\ncode\n```\nsixth\n| a | b |\nseventh"
    assert sentences(page) == ["first", "second", "third goes on", "fourth", "fifth", "sixth", "seventh"]


def test_only_prose_is_read():
    page = """---
title: front matter
---
<!-- a comment
of two lines -->
# A heading. With a point.
Under
=====

| table | cell. cell |
|---|---|

```python
code = "a. b."
```

~~~
```
still code
~~~

    indented code

!!! note
    A note is prose.

> A quotation is prose.

- An item.

    Its second paragraph.

[link]: https://example.org
![picture](x.svg)

***
"""
    assert sentences(page) == ["A note is prose.", "A quotation is prose.", "An item.", "Its second paragraph."]


def test_markup_is_no_word():
    (text,) = sentences("**Bold** and _slanted_ [text of a link](https://a.b/c.d) - / `a b c` snake_case.")
    assert text == "Bold and slanted text of a link - / Code snake_case."
    assert words(text) == 9


def test_a_page_of_long_sentences_would_be_noticed():
    long = " ".join(["word"] * (MOST_WORDS + 1)) + "."
    found = length(f"{long}\n\nA short one is here. Label.")
    assert found.sentences == 2  # the label is none
    assert found.mean == (MOST_WORDS + 1 + 5) / 2
    assert found.long == [long]
    assert length("- " + "\n- ".join(["one two three four"] * 3)).long == []


def test_a_pronoun_would_be_noticed():
    assert PRONOUN.search("It is his adapter.")
    assert PRONOUN.search("He stays.")
    assert not PRONOUN.search("The history of this adapter is here.")
