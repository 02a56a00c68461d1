from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from persona_rlhf.models.base import load_tokenizer
from persona_rlhf.serving.local_engine import StreamDecoder

BUNDLED = load_tokenizer("data/base")
IDS = st.lists(st.integers(0, 2047), max_size=30)


def decoded(ids, stop=(), tokenizer=BUNDLED):
    """Every piece in order, up to the stop."""
    decoder, pieces = StreamDecoder(tokenizer, stop), []
    for token in ids:
        pieces.append(decoder.add(token))
        if decoder.stopped:
            break
    return [*pieces, decoder.end()]


def ids_of(text):
    return BUNDLED(text, add_special_tokens=False)["input_ids"]


@given(IDS)
@example(ids_of("naïve \N{GRINNING FACE} façade \N{SNOWMAN}"))
def test_the_pieces_are_the_whole_text(ids):
    assert "".join(decoded(ids)) == BUNDLED.decode(ids, skip_special_tokens=True)


@given(st.text(alphabet="aé\N{GRINNING FACE}\N{SNOWMAN} b", max_size=12))
def test_no_half_character_is_told(text):
    pieces = decoded(ids_of(text))
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text


@given(st.text(alphabet="abc ", max_size=24), st.lists(st.text(alphabet="abc ", min_size=1, max_size=4), max_size=4))
@example("abcabd", ["abd"])
@example("ab c", ["b c", "ab"])
def test_the_text_ends_before_the_stop_that_is_complete_first(text, stops):
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    pieces = decoded(ids_of(text), stops)
    assert "".join(pieces) == expected
    so_far = ""
    for piece in pieces:  # nothing is told that would have to be taken back
        so_far += piece
        assert expected.startswith(so_far)


def byte_fallback_tokenizer():
    """As Llama 2's: characters without a token of their own are written as bytes."""
    vocabulary = {"<unk>": 0, "</s>": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}}
    for piece in ("▁", "▁a", "a", "▁the", "☃"):
        vocabulary[piece] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


BYTES = byte_fallback_tokenizer()


@given(st.lists(st.sampled_from(["▁", "▁a", "a", "▁the", "☃", "é", "\N{GRINNING FACE}", "b"]), max_size=12))
def test_characters_written_as_bytes_are_told_whole(words):
    ids = []
    for word in words:
        piece = BYTES.convert_tokens_to_ids(word)
        ids += [piece] if piece else [byte + 2 for byte in word.encode()]
    pieces = decoded(ids, tokenizer=BYTES)
    assert "".join(pieces) == BYTES.decode(ids, skip_special_tokens=True)
    assert "\ufffd" not in "".join(pieces)


@given(st.lists(st.integers(2, 262), max_size=16))
def test_bytes_that_are_no_text_do_not_end_an_answer(ids):
    assert isinstance("".join(decoded(ids, tokenizer=BYTES)), str)


def test_the_library_raises_for_bytes_that_are_no_text():
    """The reason why `StreamDecoder` is not `DecodeStream`: when this fails, it can be."""
    stream = DecodeStream(skip_special_tokens=True)
    for token in (ord("k") + 2, 0xD5 + 2):
        stream.step(BYTES.backend_tokenizer, token)
    with pytest.raises(Exception, match="Invalid prefix"):
        stream.step(BYTES.backend_tokenizer, BYTES.convert_tokens_to_ids("▁"))
