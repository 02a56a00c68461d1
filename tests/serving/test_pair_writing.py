"""Two answers as they are written: which two, in which order, as they were generated, and ends in the middle."""

from __future__ import annotations

from itertools import count

import pytest

from persona_rlhf.serving.comparisons import AnswerPair, SampledAnswer
from persona_rlhf.serving.openai_api import APIError, TextChunk, Usage
from persona_rlhf.serving.pair_writing import OPENING, Candidate, PairWriting

LONG = " ".join(f"w{n}" for n in range(OPENING))


class Stream:
    """An answer in chunks, which counts those that were read, and notes that it was closed."""

    def __init__(self, *texts, finish="stop"):
        self.texts, self.finish, self.taken, self.closed = texts, finish, 0, False

    def chunks(self):
        try:
            for number, text in enumerate(self.texts, 1):
                self.taken = number
                last = number == len(self.texts) and self.finish
                yield TextChunk(text, self.finish if last else None, Usage(1, number) if last else None)
        finally:
            self.closed = True


def writing(*streams, order=1) -> PairWriting:
    empty = SampledAnswer("", "", 0)
    candidates = [Candidate(stream.chunks(), seed) for seed, stream in enumerate(streams)]
    pair = AnswerPair("Ada", "p", empty, empty, "base", finished=False)
    return PairWriting(pair, candidates, lambda last: f"by {last.usage.completion}", order)


@pytest.mark.parametrize("order", [0, 1])
def test_both_are_kept_exactly_as_they_were_generated(order):
    texts = (" One", "\n\n tw", "o <b>", " \u0645", "\u202e "), ("\tone",)
    written = writing(*(Stream(*parts) for parts in texts), order=order)
    written.write(lambda: True)
    expected = [SampledAnswer("".join(parts), f"by {len(parts)}", n) for n, parts in enumerate(texts)]
    assert [written.pair.left, written.pair.right] == (expected if order else expected[::-1])
    assert written.pair.finished


def test_an_empty_answer_is_one():
    written = writing(Stream(""), Stream("a"))
    written.write(lambda: True)
    assert (written.pair.left.text, written.pair.right.text) == ("", "a")


def test_the_two_least_alike_openings_are_written_and_the_others_stop():
    ends = [f" end{n}" for n in range(50)]
    streams = [Stream(LONG, *ends), Stream(LONG + " x", *ends), Stream(LONG.replace("w", "v"), *ends)]
    written = writing(*streams)
    written.write(lambda: True)
    assert written.pair.right.text == LONG.replace("w", "v") + "".join(ends)
    read = sorted(stream.taken for stream in streams)
    assert read == [1, 51, 51]
    assert all(stream.closed for stream in streams)


def test_where_all_openings_are_equal_the_answers_are_read_on():
    streams = [Stream(*(f"{word} " for word in LONG.split()), *(f"{end} {n} " for n in range(40))) for end in "aab"]
    written = writing(*streams)
    written.write(lambda: True)
    assert not written.pair.same
    assert written.pair.right.text.endswith("b 39 ")


def test_they_are_equal_only_where_all_are():
    written = writing(*(Stream("the", " same") for _ in range(4)))
    written.write(lambda: True)
    assert written.pair.same
    assert written.pair.finished


def test_a_viewer_sees_them_grow_and_nothing_before_the_choice_of_two():
    streams = [Stream(*(f"{end}{n} " for n in range(OPENING + 20))) for end in "abc"]
    written, seen = writing(*streams), []

    def wanted():
        seen.append((written.pair.left.text, written.pair.right.text, written.pair.finished))
        return True

    written.write(wanted)
    lengths = [len(left) + len(right) for left, right, _ in seen]
    assert lengths == sorted(lengths)
    assert lengths[:OPENING] == [0] * OPENING
    assert len(set(lengths)) > 15
    assert all(written.pair.left.text.startswith(left) for left, *_ in seen)
    assert not any(finished for *_, finished in seen)


@pytest.mark.parametrize("reads", [1, 3, 20])
def test_a_pair_that_is_no_longer_wanted_is_not_written_on(reads):
    streams = [Stream(*(f"{end}{n} " for n in range(200))) for end in "abc"]
    looks, written = count(), writing(*streams)
    written.write(lambda: next(looks) < reads)
    assert max(stream.taken for stream in streams) <= reads + OPENING
    assert not written.pair.finished
    assert all(stream.closed for stream in streams)


def test_a_fault_in_the_middle_is_raised_and_the_others_stop():
    streams = [Stream("a ", "b ", "c "), Stream("d ", finish=None)]
    written = writing(*streams)
    with pytest.raises(APIError):
        written.write(lambda: True)
    assert not written.pair.finished
    assert all(stream.closed for stream in streams)
