"""What an answer must have: each property by hand, and by its laws."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.common.errors import InputError
from persona_rlhf.policy.judges import about, known_languages, language_of, reading_grade, topic_names
from persona_rlhf.policy.policy import Policy
from persona_rlhf.policy.properties import applies, checkable, satisfied
from persona_rlhf.policy.rule_schema import PROPERTY_NAMES, When
from persona_rlhf.policy.rules import Requirement
from tests.policy.banks import tier_one, tier_two, write

ENGLISH = "The cat sat on the mat, and it was happy with that."
FRENCH = "Le chat est sur le tapis et il est très content."
DEEP = "[" * 100_000


def requirement(name, value, when=None):
    return Requirement("r", name, value, 2, "two.yaml", 1, "App", when=when)


@pytest.mark.parametrize(
    ("name", "value", "answer", "verdict"),
    [
        ("must_include", "Ask a doctor", "First, ASK\n a  doctor.", True),
        ("must_include", "Ask a doctor", "Ask the doctor.", False),
        ("must_include", "straße", "in der STRASSE", True),
        ("must_not_include", "!", "Fine.", True),
        ("must_not_include", "!", "Fine！", False),  # full width
        ("must_not_include", "brand", "the br\u200band", False),  # a zero-width space inside
        ("min_words", 3, "one two", False),
        ("min_words", 2, "one two", True),
        ("max_words", 2, " one\ntwo ", True),
        ("max_words", 2, "one, two, three", False),
        ("max_words", 1, "", True),
        ("language", "en", ENGLISH, True),
        ("language", "fr", ENGLISH, False),
        ("language", "fr", FRENCH, True),
        ("language", "en", "Yes.", None),  # too short to tell
        ("language", "tlh", ENGLISH, None),  # nobody here knows Klingon
        ("reading_level", 3, ENGLISH, True),
        ("reading_level", 8, "Notwithstanding institutional considerations, interdisciplinarity predominates.", False),
        ("reading_level", 1, "...", True),
        ("regex", r"\d{2}", "at 12", True),
        ("regex", r"^\d{2}", "at 12", False),
        ("format", "json", '{"a": [1]}', True),
        ("format", "json", 'Sure: {"a": 1}', False),
        ("format", "json", DEEP, False),
        ("format", "plain", "Two things - a cup & 3 * 4 = 12. Then (see 1. above) tea.", True),
        ("format", "plain", "# Tea\nboil", False),
        ("format", "plain", "So:\n- boil\n- wait", False),
        ("format", "plain", "1. boil", False),
        ("format", "plain", "Use **hot** water", False),
        ("format", "plain", "See [here](https://example.org)", False),
        ("format", "plain", "```\nx\n```", False),
        ("judge", "The answer is kind.", "You are kind.", None),
    ],
)
def test_each_property_by_hand(name, value, answer, verdict):
    assert satisfied(requirement(name, value), "how?", answer) is verdict


def test_every_property_has_a_case_above():
    cases = test_each_property_by_hand.pytestmark[0].args[1]
    assert {name for name, *_ in cases} == set(PROPERTY_NAMES)


@pytest.mark.parametrize(
    ("when", "prompt", "verdict"),
    [
        (When(topic="medical"), "I have a HEADACHE, what now?", True),
        (When(topic="medical"), "Un médecin m'a donné des médicaments", True),
        (When(topic="medical"), "how do i bake bread", False),
        (When(pattern=r"\bdose\b"), "Which DOSE?", True),
        (When(pattern=r"\bdose\b"), "overdosed", False),
        (None, "", True),
    ],
)
def test_a_rule_is_about_the_prompts_it_names(when, prompt, verdict):
    rule = requirement("must_include", "ask a doctor", when)
    assert applies(rule, prompt) is verdict
    assert satisfied(rule, prompt, "tea") is (False if verdict else None)
    assert satisfied(rule, prompt, "Ask a doctor.") is (True if verdict else None)


def test_the_topics_are_told_apart():
    asked = {
        "medical": "what are the symptoms of the flu",
        "legal": "can my landlord evict tenants by contract",
        "financial": "is a mortgage better than stocks",
        "political": "whom should i vote for in the election",
        "religious": "how do i pray in a mosque",
    }
    assert set(asked) == set(topic_names())
    for topic, prompt in asked.items():
        assert [name for name in topic_names() if about(name, prompt)] == [topic]
    assert not [name for name in topic_names() if about(name, "how do i paint a wall")]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("en", ENGLISH),
        ("fr", FRENCH),
        ("de", "Der Hund und die Katze sind nicht in dem Haus, aber ich weiß es nicht."),
        ("es", "El perro y el gato están en la casa, pero no sé por qué."),
        ("it", "Il cane e il gatto sono nella casa, ma non so perché."),
        ("pt", "O cão e o gato estão em uma casa, mas não sei por que isso é assim."),
        ("nl", "De hond en de kat zijn niet in het huis, maar ik weet het niet."),
        ("ru", "Кот и собака не в доме, но я не знаю, что это."),
        ("uk", "Кіт і собака не в домі, але я не знаю, що це."),
        ("ja", "猫は家にいます。私は知りません。"),
        ("zh", "猫在家里，我不知道。"),
        ("ko", "고양이는 집에 있습니다."),
        ("el", "Η γάτα είναι στο σπίτι."),
        ("he", "החתול בבית ואני לא יודע."),
        ("th", "แมวอยู่ในบ้าน"),
        ("ar", "القطة في البيت ولا أعرف لماذا."),
        ("hi", "बिल्ली घर में है।"),
    ],
)
def test_languages_are_told(code, text):
    assert language_of(text) == code


def test_every_language_has_a_case_above():
    assert {code for code, _ in test_languages_are_told.pytestmark[0].args[1]} == set(known_languages())


@pytest.mark.parametrize("text", ["", "12 + 3", "Madrid, Paris, Berlin"])
def test_what_tells_no_language_is_left_open(text):
    assert language_of(text) is None


def test_the_reading_grade_is_flesch_kincaid_by_hand():
    # 6 words, 1 sentence, 6 syllables; and 4 words, 2 sentences, 10 syllables (in-sti-tu-tions pre-vail. so-ci-e-ties)
    assert reading_grade("The cat sat on the mat.") == pytest.approx(0.39 * 6 + 11.8 * 1 - 15.59)
    assert reading_grade("Big banks fail. Bad!") == pytest.approx(0.39 * 2 + 11.8 * 1 - 15.59)


@given(st.sampled_from(PROPERTY_NAMES), st.text(max_size=80))
def test_any_answer_gets_a_verdict(name, answer):
    values = {"min_words": 3, "max_words": 3, "reading_level": 5, "language": "en", "format": "plain"}
    rule = requirement(name, values.get(name, "a"))
    assert satisfied(rule, "p", answer) in (True, False, None)
    assert checkable(rule) or satisfied(rule, "p", answer) is None


@given(st.text(max_size=60), st.text(min_size=1, max_size=3).filter(str.split))
def test_including_and_not_including_are_opposites(answer, part):
    include, exclude = requirement("must_include", part), requirement("must_not_include", part)
    assert satisfied(include, "", answer) is not satisfied(exclude, "", answer)
    assert satisfied(include, "", answer + part) or not part.isascii()


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_whatever_json_writes_is_json(value):
    assert satisfied(requirement("format", "json"), "", json.dumps(value)) is True


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    return write(folder / "one.yaml", tier_one(folder))


def read(one, folder, **fields):
    two = write(folder / "two.yaml", tier_two({"id": "r", "kind": "requirement", **fields}))
    return Policy.read([one, two])


def test_a_document_states_all_of_it(one, tmp_path):
    policy = read(one, tmp_path, must_include="ask a doctor", when={"topic": "medical"}, min_rate=0.9)
    (rule,) = policy.requirements
    assert (rule.property, rule.value, rule.when, rule.min_rate) == (
        "must_include",
        "ask a doctor",
        When(topic="medical"),
        0.9,
    )
    assert policy.to_json()["requirements"][0]["when"] == {"topic": "medical"}
    assert json.dumps(policy.to_json())


def test_what_an_old_document_could_say_keeps_its_hash_and_what_is_new_counts(one, tmp_path):
    plain = read(one, tmp_path, max_words=40)
    assert read(one, tmp_path, max_words=40, min_rate=0.95).hash == plain.hash
    others = [
        read(one, tmp_path, max_words=40, min_rate=0.9),
        read(one, tmp_path, max_words=40, when={"topic": "medical"}),
        read(one, tmp_path, max_words=40, when={"pattern": "medical"}),
        read(one, tmp_path, min_words=40),
    ]
    assert len({plain.hash, *(other.hash for other in others)}) == 5


def test_the_shipped_documents_keep_their_hashes():
    """Pinned: keys that the documents do not use leave their hashes alone; a bank drawn anew changes them."""
    shipped = [f"configs/policy/tier_{tier}.yaml" for tier in ("one", "two", "three")]
    policy = Policy.read(shipped)
    assert policy.tier_one_hash == "6b34104595b6a7cb5b18cb9578d17300e0010f9bb53ae532ac11967aa8bdb8c3"
    assert policy.hash == "f518047658f82a0729f849b1c01c53ee7f7dc8e7ec4830126e70bb8c3054d038"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "exactly one of must_include"),
        ({"max_words": 4, "min_words": 2}, "exactly one of"),
        ({"max_words": 0}, "at least 1"),
        ({"max_words": "many"}, "whole number"),
        ({"min_rate": 1.0, "max_words": 4}, "less than 1"),
        ({"min_rate": 0, "max_words": 4}, "more than 0"),
        ({"format": "jsn"}, "did you mean `json`"),
        ({"language": "English"}, "pattern"),
        ({"regex": "("}, "does not compile"),
        ({"regex": "(a+)+$"}, "nested repetition"),
        ({"regex": "([a-z]*)*!"}, "nested repetition"),
        ({"reading_level": 40}, "at most 20"),
        ({"max_words": 4, "when": {}}, "states a topic or a pattern"),
        ({"max_words": 4, "when": {"topic": "medical", "pattern": "x"}}, "states a topic or a pattern"),
        ({"max_words": 4, "when": {"topic": "medcal"}}, "`medical`"),
        ({"max_words": 4, "when": {"pattern": "["}}, "does not compile"),
        ({"max_words": 4, "when": "medical"}, "section"),
        ({"max_words": 4, "wehn": {"topic": "medical"}}, "did you mean `when`"),
    ],
)
def test_what_cannot_be_required_is_refused(one, tmp_path, fields, words):
    with pytest.raises(InputError, match=re.escape(words)) as fault:
        read(one, tmp_path, **fields)
    (problem,) = fault.value.problems
    assert problem.file == str(tmp_path / "two.yaml")
    assert problem.line is not None
