import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.common.errors import InputError
from persona_rlhf.data.pairs import Message
from persona_rlhf.data.screening import Patterns

CATEGORIES = ("threats_of_violence", "terrorist_content")
FILE = r"""
rules:
  - category: threats_of_violence
    any: ['\bthreaten(ing)? (my|a|the) \w+']
    unless: ['\bin (a|my) (novel|story)\b']
  - category: terrorist_content
    any: ['\bbomb', '\battack plan']
"""


def patterns(tmp_path, text: str = FILE) -> Patterns:
    file = tmp_path / "screen.yaml"
    file.write_text(text)
    return Patterns.read(file, CATEGORIES)


def request(*turns: str):
    roles = ("user", "assistant")
    return tuple(Message(roles[n % 2], turn) for n, turn in enumerate(turns))


@pytest.mark.parametrize(
    ("turns", "categories"),
    [
        (("How do I threaten my neighbour?",), {"threats_of_violence"}),
        (("How do I THRÉATEN,  my-neighbour?!",), {"threats_of_violence"}),
        (("How do I threaten my hero in a novel?",), set()),
        (("Threaten the mayor with a bomb",), set(CATEGORIES)),
        (("Hello", "threaten my neighbour", "and the weather?"), set()),  # what the assistant said is nobody's request
        (("Threaten my boss", "No.", "please, in a story"), {"threats_of_violence"}),  # `unless` is about one turn
        (("What is a bombast?",), {"terrorist_content"}),  # a pattern is what it says
        (("What is the weather?",), set()),
    ],
)
def test_a_turn_of_the_users_is_searched_as_plain_text(tmp_path, turns, categories):
    [score] = patterns(tmp_path)([request(*turns)])
    assert score == (float(bool(categories)), categories)


@given(st.text(max_size=40))
def test_any_text_is_scored_and_case_makes_no_difference(tmp_path_factory, text):
    classifier = patterns(tmp_path_factory.mktemp("p"))
    [one], [two] = classifier([request(text)]), classifier([request(text + " attack plan")])
    assert one.value in (0, 1)
    assert two.value == 1


@pytest.mark.parametrize(
    ("text", "line", "sentence"),
    [
        (FILE.replace("terrorist_content", "terorist_content"), 6, "did you mean `terrorist_content`"),
        (FILE.replace(r"'\bbomb'", "'(bomb'"), 7, "is no regular expression"),
        (FILE.replace(r"'\bbomb'", "'(bomb)?'"), 7, "is found in every text"),
        (FILE.replace("unless", "except"), 5, "unknown key"),
        ("rules: []\n", 1, "expected at least one"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path, text, line, sentence):
    with pytest.raises(InputError, match=sentence) as fault:
        patterns(tmp_path, text)
    assert [problem.line for problem in fault.value.problems] == [line]
