"""Written refusals: every bad line at once, and nothing that the judge would not call a refusal."""

import json
from random import Random

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import find
from persona_rlhf.policy.hazards import (
    CATEGORIES,
    Probe,
    RefusalText,
    draw_refusal,
    read_demonstrations,
    read_refusal_texts,
)


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


def test_a_refusal_written_for_a_prompt_goes_to_that_prompt_alone():
    texts = [RefusalText("all", None), RefusalText("this", "a", "how?")]
    rng = Random(0)
    assert {draw_refusal(texts, "a", rng, "how?") for _ in range(50)} == {"this"}
    assert {draw_refusal(texts, "a", rng, "why?") for _ in range(50)} == {"all"}


def test_no_demonstration_is_a_held_out_probe_and_every_refusal_refuses(tmp_path):
    probe = Probe("1", "sexual_assault", "p1", "t", "f", "w1", "train", "combination")
    probes = [probe, probe._replace(id="2", prompt="p2", split="certify")]
    row = {"category": "sexual_assault", "prompt": "p3", "refusal": "I can't help with that.", "twin": "w3"}
    file = write(tmp_path, row, row | {"prompt": "p1"})
    assert [one.probe.split for one in read_demonstrations(file, probes)] == ["train", "train"]
    assert read_demonstrations(file, probes)[0].fitting == RefusalText(row["refusal"], "sexual_assault", "p3")
    bad = [{"prompt": "p2"}, {"twin": "p2"}, {"refusal": "Sure."}, {"category": "sexual_asault"}]
    with pytest.raises(InputError) as caught:
        read_demonstrations(write(tmp_path, *(row | change for change in bad)), probes)
    assert [problem.key for problem in caught.value.problems] == ["prompt", "twin", "refusal", "category"]
    assert "probe of `certify`" in str(caught.value.problems[0])
    assert "did you mean `sexual_assault`?" in str(caught.value.problems[3])
