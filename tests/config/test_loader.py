import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.loader import dotted, dump_yaml, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-6", 5e-6),
        ("1e3", 1000.0),
        ("-.5", -0.5),
        ("3", 3),
        ("-3", -3),
        ("0x1F", 31),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("yes", "yes"),
        ("on", "on"),
        ("No", "No"),
        ("2026-11-01", "2026-11-01"),
        ("12:30:45", "12:30:45"),
        ("1_000", "1_000"),
        ("0o17", 15),
        ("017", 17),
        ("'5e-6'", "5e-6"),
        ('"true"', "true"),
        ("<<", "<<"),
        ("=", "="),
        ("1.2.3", "1.2.3"),
        (".inf", float("inf")),
        ("[0.5, 1.0]", [0.5, 1.0]),
        ("{a: 1}", {"a": 1}),
        ("", None),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    document = parse_yaml(text, "here")
    assert document.problems == []
    assert document.tree == value
    assert type(document.tree) is type(value)


def test_every_key_and_item_knows_its_line():
    document = parse_yaml("a:\n  b: 1\n  c:\n    - x\n    - y: 2\n", "f.yaml")
    lines = {dotted(path): place.line for path, place in document.places.items()}
    assert lines == {None: 1, "a": 1, "a.b": 2, "a.c": 3, "a.c[0]": 4, "a.c[1]": 5, "a.c[1].y": 5}
    assert document.place(("a", "missing")).line == 1


def test_duplicate_keys_are_all_named():
    document = parse_yaml("a: 1\nb: {c: 1, c: 2}\na: 3\n", "f.yaml")
    assert [(p.line, p.key) for p in document.problems] == [(2, "b.c"), (3, "a")]
    assert "line 1" in document.problems[1].sentence


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: *x\n", 2, "aliases"),
        ("a: &x 1\nb: *x\n", 2, "aliases"),
        ("a: [1\n", 2, "not valid YAML"),
        ("a: 1\n\tb: 2\n", 2, "not valid YAML"),
        ("a: \x07\n", 1, "U+0007"),
        ('a: 1\nb: "\\U00110000"\n', 2, "highest is \\U0010FFFF"),
        ('a: 1\nb: "\\UFFFFFFFF"\n', 2, "highest is \\U0010FFFF"),
        ("a: 1\n---\nb: 2\n", 2, "single document"),
        ("[" * 50 + "]" * 50, 1, "nested deeper"),
        ("[" * 100_000, 1, "nested deeper"),
    ],
)
def test_broken_texts_name_their_line(text, line, words):
    with pytest.raises(InputError) as fault:
        parse_yaml(text, "f.yaml")
    (problem,) = fault.value.problems
    assert problem.line == line
    assert words in problem.sentence


@pytest.mark.parametrize(
    "text", ["a: !!python/name:os.system x", "a: !!timestamp 2026-01-01", "a: !own {}", "!!set {a}"]
)
def test_tags_are_refused(text):
    assert len(parse_yaml(text, "f.yaml").problems) == 1


def test_keys_that_are_no_texts_are_refused():
    problems = parse_yaml("1: a\ntrue: b\n? [x]\n: c\n", "f.yaml").problems
    assert [problem.line for problem in problems] == [1, 2, 3]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"# only a comment\n", "empty"),
        (b"- a\n", "key: value"),
        (b"a: \xff\n", "UTF-8"),
        (b"\xef\xbb\xbfa: 1\n", None),
        (b"a: 1\r\nb: 2\r\n", None),
    ],
)
def test_files(tmp_path, content, words):
    file = tmp_path / "f.yaml"
    file.write_bytes(content)
    if words is None:
        assert isinstance(read_yaml(file).tree, dict)
        return
    with pytest.raises(InputError, match=words):
        read_yaml(file)


def test_a_folder_and_a_missing_file_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "nope.yaml"):
        with pytest.raises(InputError, match=str(path)):
            read_yaml(path)


_texts = st.text(string.printable + "é\x85\u2028\u2029\ufeff\xa0", max_size=12)
_trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _texts,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(string.ascii_letters, min_size=1), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["alpha", "beta", "gamma"]), _trees, min_size=1))
@example({"alpha": "08"})  # PyYAML alone leaves these plain: to YAML 1.1 they are texts
@example({"alpha": ["8e3", "0o7", "-09"]})
@example({"alpha": "\x85", "beta": "a\x85b", "gamma": {"\x85": "\u2028"}})  # PyYAML alone reads back a space
def test_what_is_written_is_read_as_it_was(tree):
    document = parse_yaml(dump_yaml(tree), "here")
    assert document.problems == []
    assert document.tree == tree


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_as_input(text):
    try:
        parse_yaml(text, "here")
    except InputError as fault:
        assert fault.problems
