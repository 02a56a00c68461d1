import json

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import find
from persona_rlhf.evaluation.prompt_sets import Fact, bundled_facts, read_facts


def test_the_bundled_world_asks_many_questions_with_one_right_answer():
    facts = bundled_facts()
    assert len(facts) >= 30
    assert len({fact.question for fact in facts}) == len(facts)
    for fact in facts:
        assert fact.right not in fact.wrong
        assert 1 <= len(set(fact.wrong)) == len(fact.wrong) <= 3
    volcano = next(fact for fact in facts if "volcano" in fact.question)
    assert volcano.question == "What do you know about a volcano?"
    assert volcano.right.startswith("As for a volcano, it is")
    assert facts == bundled_facts()


def test_the_file_of_facts_asks_the_same_in_four_wordings():
    facts = bundled_facts(4)
    assert read_facts(find("data/policy/facts.jsonl")) == facts
    assert len(facts) == len({fact.question for fact in facts}) == 4 * len(bundled_facts())
    assert set(bundled_facts()) < set(facts)


def test_a_file_is_read_and_every_bad_line_named(tmp_path):
    file = tmp_path / "facts.jsonl"
    good = {"question": "q", "right": "r", "wrong": ["w", "v"]}
    file.write_text(json.dumps(good) + "\n\n" + json.dumps(good | {"wrong": ["w"]}))
    assert read_facts(file) == [Fact("q", "r", ("w", "v")), Fact("q", "r", ("w",))]
    bad = ["{", "[]", json.dumps(good | {"wrong": []}), json.dumps(good | {"right": 3}), json.dumps({"question": "q"})]
    file.write_text("\n".join([json.dumps(good), *bad]))
    with pytest.raises(InputError) as fault:
        read_facts(file)
    assert [problem.line for problem in fault.value.problems] == [2, 3, 4, 5, 6]
