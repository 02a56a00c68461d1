"""Documents that mean harm: each is refused with one sentence, exit code 2, and nothing else.

`hostile/*.yaml` say in their first lines what the sentence holds (`# says:`), and which document they are checked
with (`# beside:`). What is too large or too odd for a file of the repository is made here.
"""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from persona_rlhf.cli import app

HOSTILE = Path(__file__).parent / "hostile"
FILES = sorted(HOSTILE.glob("*.yaml"))
GOOD = 'tier: one\nissuer: {role: model_provider, name: Lab}\nversion: "1"\ncertify: {min_refusal: 0.9, delta: 0.05}\n'


def refused(*paths):
    """The one sentence with which these documents are refused."""
    done = CliRunner().invoke(app.app, ["policy", "check", *map(str, paths)])
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    sentence, count = done.stderr.splitlines()
    assert count == "1 problem found."
    assert len(sentence) < 600
    assert sentence.isprintable()
    return sentence


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_is_refused_with_one_sentence(file, monkeypatch):
    monkeypatch.chdir(HOSTILE.parents[2])
    head = dict(re.findall(r"^# (says|beside): (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE))
    sentence = refused(*([head["beside"]] if "beside" in head else []), file)
    assert head["says"] in sentence
    assert file.stem in sentence or head.get("beside", "\0") in sentence  # the sentence names a document


def test_there_are_at_least_forty():
    assert len(FILES) >= 40


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (GOOD.encode() + b"rules: []\n# " + b"x" * (10 << 20), "larger than 4 MB"),
        (b"\0" * 100, "U+0000"),
        (b"tier: \x07one\n", "U+0007"),
        (b"tier: one\nissuer: \xff\n", "not UTF-8"),
        (GOOD.encode("utf-16"), "not UTF-8"),
        (b"rules: " + b"[" * 500_000, "nested deeper"),
        (b"{a: " * 500_000, "nested deeper"),
        (b"- " * 500_000, "nested deeper"),
        (GOOD.encode() + b'rules: []\n"' + b"k" * 1_000_000 + b'": 1\n', "not valid YAML"),
        (GOOD.encode() + b"rules: []\n? " + b"k" * 1_000_000 + b"\n: 1\n", "unknown key"),
        (b"x: &a [*a, *a]\n", "aliases"),
        (b"%YAML 9.9\n---\na: 1\n", "not valid YAML"),
    ],
    ids=[
        "10-mb",
        "zeros",
        "bell",
        "latin-1",
        "utf-16",
        "deep-list",
        "deep-map",
        "deep-dashes",
        "key-1-mb",
        "plain-key-1-mb",
        "self",
        "yaml-9",
    ],
)
def test_what_is_too_large_or_odd_for_a_file_here(tmp_path, content, words):
    file = tmp_path / "made.yaml"
    file.write_bytes(content)
    assert words in refused(file)


def test_a_line_of_documents_ends(tmp_path):
    for number in range(40):
        text = GOOD + f"extends: {number + 1}.yaml\nrules: []\n"
        (tmp_path / f"{number}.yaml").write_text(text)
    assert "16th in a line" in refused(tmp_path / "0.yaml")
