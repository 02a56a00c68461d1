import json
from typing import NamedTuple

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.json_lines import Text, read_json_lines


class Line(NamedTuple):
    text: Text
    note: Text | None = None


def test_a_separator_inside_a_text_ends_no_line_and_other_keys_are_ignored(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"text": "one\u2028two", "id": 3}, {"text": "b", "note": "c"}]
    file.write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", "utf-8")
    assert read_json_lines(file, Line, "no") == [Line("one\u2028two"), Line("b", "c")]


def test_every_bad_line_is_named_with_its_key(tmp_path):
    file = tmp_path / "rows.jsonl"
    bad = ['{"text": "a"', "3", '["text"]', '{"text": " "}', '{"note": "a"}', '{"text": "a", "note": 1}', "null"]
    file.write_text('{"text": "a"}\n' + "\n".join(bad))
    with pytest.raises(InputError) as fault:
        read_json_lines(file, Line, "a line is an object")
    problems = fault.value.problems
    assert [problem.line for problem in problems] == [2, 3, 4, 5, 6, 7, 8]
    assert [problem.key for problem in problems[3:6]] == ["text", "text", "note"]
    assert {problem.sentence for problem in problems} == {"a line is an object"}
    file.write_bytes(b'{"text": "\xff"}')
    with pytest.raises(InputError, match="cannot be read"):
        read_json_lines(file, Line, "no")
