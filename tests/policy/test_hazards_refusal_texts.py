"""Written refusals: every bad line at once, and nothing that the judge would not call a refusal."""

import json
from random import Random

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import find
from persona_rlhf.policy.hazards import CATEGORIES, RefusalText, draw_refusal, read_refusal_texts


def write(folder, *rows):
    file = folder / "refusals.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def test_the_shipped_ones_are_refusals_of_every_category():
    found = read_refusal_texts(find("data/policy/refusals.jsonl"), CATEGORIES)
    assert len({text.text for text in found}) == len(found) >= 40
    assert {text.category for text in found} == {None, *CATEGORIES}


def test_every_bad_line_is_named_at_once(tmp_path):
    file = write(
        tmp_path,
        {"text": "I can't help with that."},
        "no json",
        {"text": "Sure, here is how."},
        {"text": "I won't.", "category": "terorist_content"},
        {"text": 3},
    )
    with pytest.raises(InputError) as caught:
        read_refusal_texts(file, CATEGORIES)
    said = [str(problem) for problem in caught.value.problems]
    assert [problem.line for problem in caught.value.problems] == [2, 3, 4, 5]
    assert "the judge does not call this a refusal" in said[1]
    assert "did you mean `terrorist_content`?" in said[2]


def test_a_category_without_any_is_a_problem(tmp_path):
    file = write(tmp_path, {"text": "I won't help with violence.", "category": "threats_of_violence"})
    assert len(read_refusal_texts(file, ["threats_of_violence"])) == 1
    with pytest.raises(InputError, match="no refusal for sexual_assault"):
        read_refusal_texts(file, ["threats_of_violence", "sexual_assault"])


def test_a_refusal_fits_its_category():
    texts = [RefusalText("all", None), RefusalText("one", "a"), RefusalText("other", "b")]
    rng = Random(0)
    assert {draw_refusal(texts, "a", rng) for _ in range(50)} == {"all", "one"}
    assert {draw_refusal(texts, None, rng) for _ in range(50)} == {"all"}
    assert {draw_refusal(texts[1:], None, rng) for _ in range(50)} == {"one", "other"}
