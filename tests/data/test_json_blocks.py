"""JSON read block by block, against `json.loads` of the whole text."""

from __future__ import annotations

import io
import json
from math import inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_rlhf.data.json_blocks import JsonBlocks

VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=12)),
    lambda values: st.one_of(st.lists(values, max_size=3), st.dictionaries(st.text(max_size=5), values, max_size=3)),
    max_leaves=8,
)


def read(content: bytes, block: int) -> list[tuple[int, object]]:
    return list(JsonBlocks(io.BytesIO(content), block).values(json.JSONDecoder()))


@settings(max_examples=150)
@given(
    values=st.lists(VALUES, max_size=5),
    block=st.integers(1, 12),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    bom=st.sampled_from(["", "\ufeff"]),
)
def test_a_list_is_read_as_a_whole_one(
    values: list[object], block: int, indent: int | None, ascii_only: bool, bom: str
) -> None:
    content = (bom + json.dumps(values, indent=indent, ensure_ascii=ascii_only)).encode()
    assert [value for _, value in read(content, block)] == json.loads(content.decode("utf-8-sig"))


@settings(max_examples=100)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), min_size=1, max_size=5),
    block=st.integers(1, 12),
)
def test_objects_over_several_lines_have_the_line_of_their_first(rows: list[dict[str, Any]], block: int) -> None:
    texts = [json.dumps(row, indent=1) for row in rows]
    lines = [1 + sum(text.count("\n") + 1 for text in texts[:n]) for n in range(len(texts))]
    assert read("\n".join(texts).encode(), block) == list(zip(lines, rows, strict=True))


@pytest.mark.parametrize("block", range(1, 13))
def test_the_longest_name_may_be_cut_anywhere(block: int) -> None:
    assert read(b'[{"a": -Infinity}, {"b": -Infinity}]', block) == [(1, {"a": -inf}), (1, {"b": -inf})]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize(
    ("content", "line", "before"),
    [
        (b"[\n{},\n {oops]", 3, 1),
        (b"[\n{}\n]\n{}", 4, 1),
        (b"[\n{}\n", 3, 1),
        (b"[\n{},\n", 3, 1),
        (b"[\n", 2, 0),
        (b'[{"a": "' + b"x" * 50, 1, 0),
        (b'[\n1,\n2,\n{"a": \xff}]', 4, 2),
        (b'[\n"a\\q"]', 2, 0),
        (b"[1,\ntru]", 2, 1),
        (b'[1 2, "' + b"long " * 40 + b'"]', 1, 1),
    ],
)
def test_a_fault_has_its_line_and_the_values_before_it_are_read(
    content: bytes, line: int, before: int, block: int
) -> None:
    blocks = JsonBlocks(io.BytesIO(content), block)
    values = []
    with pytest.raises(ValueError) as fault:  # noqa: PT011  # JSONDecodeError or UnicodeDecodeError
        values += blocks.values(json.JSONDecoder())
    assert blocks.line_of(fault.value) == line
    if not isinstance(fault.value, UnicodeDecodeError):  # a wrong byte ends the text that is read ahead
        assert len(values) == before


def test_only_a_few_blocks_are_in_memory_at_once() -> None:
    class Counting(io.BytesIO):
        asked = 0

        def read(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            self.asked = max(self.asked, size)
            return super().read(size)

    content = json.dumps([{"text": "x" * 90, "n": n} for n in range(2000)]).encode()
    stream = Counting(content)
    blocks = JsonBlocks(stream, 1000)
    for _ in blocks.values(json.JSONDecoder()):
        assert len(blocks._text) < 4000
    assert stream.asked < 4000
