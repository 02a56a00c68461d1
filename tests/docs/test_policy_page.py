"""The worked example of docs/explanation/policy.md: documents are written, commands run, output is checked."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from persona_rlhf.cli import app
from persona_rlhf.policy.enforcement import TABLE

ROOT = Path(__file__).parents[2]
PAGE_NAME = "explanation/policy.md"
PAGE = (ROOT / "docs" / PAGE_NAME).read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def squeezed(text):
    """A text without its boxes and line breaks."""
    return " ".join(re.sub(r"[│┃┏┓┗┛┡┩└┘┌┐━─╇┴┬]", " ", text).split())


def ran(line):
    """What a command printed; it ends with the exit code that its comment names."""
    command, _, comment = line.partition(" # ")
    code = int(comment.removeprefix("exit code ") or 0)
    words = shlex.split(command)
    done = CliRunner().invoke(app.app, words[1:])
    assert done.exit_code == code, (line, done.output)
    return done.output


def test_the_worked_example_runs_as_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    printed, checked = "", 0
    for language, text in BLOCKS:
        if language == "yaml":
            name = text.splitlines()[0].removeprefix("# ")
            Path(name).write_text(text, encoding="utf-8")
        elif language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, PAGE_NAME, "exec"), {})
            printed = out.getvalue()
        elif language == "bash" and "init demo" in text:
            ran("persona-rlhf init demo")
            monkeypatch.chdir(tmp_path / "demo")
        elif language == "bash" and "train" not in text:
            printed = "".join(ran(line) for line in text.splitlines())
        elif language == "text":
            for line in text.splitlines():
                assert squeezed(line) in squeezed(printed), (line, printed)
                checked += 1
    assert checked >= 15


def test_the_table_of_enforcement_is_the_codes():
    rows = [line for line in PAGE.splitlines() if re.match(r"\| (restriction|requirement|preference): ", line)]
    for (kind, states), held in TABLE.items():
        (own,) = [line for line in rows if line.startswith(f"| {kind}: ") and f"`{states}`" in line.split("|")[1]]
        assert [cell.strip() for cell in own.strip("|").split("|")][1:] == [stage or "-" for stage in held]


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:tests|configs|data)/[\w./-]+)`", PAGE))))
def test_every_file_that_the_page_names_is_there(path):
    assert (ROOT / path).exists()
