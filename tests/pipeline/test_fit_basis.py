"""`basis fit`: from pairs of consenting users to a file of numbers, and a withdrawn consent."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from persona_rlhf.cli import app
from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import shipped_root
from persona_rlhf.config.training import BaseSettings
from persona_rlhf.data.pairs import read_pairs
from persona_rlhf.models.base import weights_hash
from persona_rlhf.pipeline.fit_basis import population_of, read_basis_inputs
from persona_rlhf.training.answer_features import scaled_features
from persona_rlhf.training.reward_basis import load_basis
from tests.data.test_screening import REFUSAL
from tests.story.experiment import rows_of

PROMPTS = ("what is a tree?", "tell me a story", "how do I bake bread?", "any ideas for the evening?")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Six users of the bundled ones, and prompts for the base."""
    monkeypatch.chdir(tmp_path)
    rows = rows_of(shipped_root() / "data/users/surface.jsonl")
    users = list(dict.fromkeys(row["user_id"] for row in rows))[:6]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows if r["user_id"] in users))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return tmp_path, users


def fit(*words):
    return CliRunner().invoke(app.app, ["basis", "fit", *map(str, words), "--prompts", "prompts.jsonl"])


def test_the_file_holds_numbers_of_a_population_over_one_base(place):
    folder, users = place
    done = fit("pairs.jsonl", "all.safetensors", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["users"], told["pairs"], told["left_out"]) == (6, 480, 0)
    basis = load_basis(folder / "all.safetensors")
    assert basis.base == weights_hash(BaseSettings(model="data/base"))
    assert basis.directions.shape[1] == told["directions"] > 0
    stored = (folder / "all.safetensors").read_bytes()
    assert not any(user.encode() in stored for user in users)
    assert fit("pairs.jsonl", "all.safetensors").exit_code == 2  # nothing is overwritten


def test_a_user_without_consent_leaves_the_bits_of_a_basis_that_never_had_the_user(place):
    folder, users = place
    rows = [row for row in rows_of(folder / "pairs.jsonl") if row["user_id"] != users[2]]
    (folder / "fewer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert fit("pairs.jsonl", "without.safetensors", "--without", users[2]).exit_code == 0
    assert fit("fewer.jsonl", "never.safetensors").exit_code == 0
    assert (folder / "without.safetensors").read_bytes() == (folder / "never.safetensors").read_bytes()


def test_held_out_pairs_refusals_and_strangers(place):
    folder, _ = place
    row = {"user_id": "Ann", "prompt": "how?", "chosen": "So.", "rejected": "Thus.", "split": "train"}
    rows = [row, row | {"chosen": REFUSAL}, row | {"rejected": REFUSAL}, row | {"split": "heldout", "prompt": "why?"}]
    (folder / "ann.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    inputs = read_basis_inputs(folder / "ann.jsonl", folder / "new", folder / "prompts.jsonl")
    assert [(pair.chosen, pair.rejected) for pair in inputs.pairs] == [("So.", "Thus.")]
    assert inputs.left_out == 2
    with pytest.raises(InputError) as error:
        read_basis_inputs(folder / "ann.jsonl", folder / "pairs.jsonl", folder / "none.jsonl", ["Anne"])
    told = "\n".join(map(str, error.value.problems))
    assert "OUT" in told
    assert "none.jsonl" in told
    assert "--without" in told
    assert "Ann" in told


def test_the_prompts_that_a_run_holds_out_are_left_out(place):
    folder, _ = place
    rows = [{"user_id": "Ann", "prompt": f"how {n}?", "chosen": "So.", "rejected": "Thus."} for n in range(40)]
    (folder / "ann.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for share in (0.25, 0.5):
        inputs = read_basis_inputs(folder / "ann.jsonl", folder / "new", folder / "prompts.jsonl", heldout=share)
        of_run = [pair.prompt for pair in read_pairs(folder / "ann.jsonl", share) if pair.split == "train"]
        assert 0 < len(of_run) < 40
        assert [pair.prompt for pair in inputs.pairs] == of_run


def test_a_population_has_a_row_for_every_different_answer(place):
    folder, users = place
    pairs = read_basis_inputs(folder / "pairs.jsonl", folder / "new", folder / "prompts.jsonl").pairs
    people = population_of(scaled_features(["One.", "One and two."]), pairs)
    assert people.user_ids == tuple(users)
    assert len(people.features) == len({text for pair in pairs for text in (pair.chosen, pair.rejected)})
    assert people.chosen.shape == people.rejected.shape == people.users.shape == (480,)


def test_a_tie_is_one_preference_each_way(tmp_path):
    def population(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"user_id": "ann", "prompt": "p", **row}) + "\n" for row in rows))
        pairs = read_pairs(path, 0)
        return population_of(scaled_features(["a", "b c"]), pairs)

    one, other = {"chosen": "a", "rejected": "b c"}, {"chosen": "b c", "rejected": "a"}
    tied, both = population(one | {"tie": True}), population(one, other)
    assert all(torch.equal(*parts) for parts in zip(tied[:4], both[:4], strict=True))
