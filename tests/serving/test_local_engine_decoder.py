from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from persona_rlhf.models.base import load_tokenizer
from persona_rlhf.serving.local_engine import StreamDecoder

BUNDLED = load_tokenizer("data/base")
IDS = st.lists(st.integers(0, 2047), max_size=30)


def told(ids, stop=()):
    """Every piece that was told, in order, up to the stop."""
    text, pieces = StreamDecoder(BUNDLED, stop), []
    for token in ids:
        pieces.append(text.add(token))
        if text.stopped:
            break
    return [*pieces, text.end()]


def ids_of(text):
    return BUNDLED(text, add_special_tokens=False)["input_ids"]


@given(IDS)
@example(ids_of("naïve \N{GRINNING FACE} façade \N{SNOWMAN}"))
def test_the_pieces_are_the_whole_text(ids):
    assert "".join(told(ids)) == BUNDLED.decode(ids, skip_special_tokens=True)


@given(st.text(alphabet="aé\N{GRINNING FACE}\N{SNOWMAN} b", max_size=12))
def test_no_half_character_is_told(text):
    pieces = told(ids_of(text))
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text


@given(st.text(alphabet="abc ", max_size=24), st.lists(st.text(alphabet="abc ", min_size=1, max_size=4), max_size=4))
@example("abcabd", ["abd"])
@example("ab c", ["b c", "ab"])
def test_the_text_ends_before_the_stop_that_is_complete_first(text, stops):
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    pieces = told(ids_of(text), stops)
    assert "".join(pieces) == expected
    so_far = ""
    for piece in pieces:  # nothing is told that would have to be taken back
        so_far += piece
        assert expected.startswith(so_far)
