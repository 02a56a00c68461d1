import json

import pytest
from typer.testing import CliRunner

from persona_rlhf.cli import app
from persona_rlhf.common.files import shipped_root

SAMPLE = str(shipped_root() / "data/samples/preferences.jsonl")


@pytest.fixture
def run():
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app.app, ["data", "check", SAMPLE, *arguments])


def test_one_pair_is_shown_on_demand(run):
    plain = json.loads(run("--json").stdout)
    more = json.loads(run("--render", "--json").stdout)
    pair = more.pop("rendered")
    assert more == plain
    assert pair["base"] == "data/base"
    assert pair["prompt"]["text"].startswith("<|user|>")
    assert pair["chosen"]["text"].endswith("<|end|>")
    assert pair["chosen"]["begins"] == pair["prompt"]["tokens"]
    shown = run("--render")
    assert shown.exit_code == 0
    assert f"from token {pair['prompt']['tokens']} on" in shown.stdout
    assert "Preferences" in shown.stdout


def test_a_base_that_is_not_there_is_the_users_mistake(run, tmp_path):
    for base, words in ((tmp_path, "cannot load it"), (tmp_path / "none", "no such")):
        result = run("--render", "--base", str(base))
        assert result.exit_code == 2
        assert words in result.stderr
        assert str(base) in result.stderr
