from __future__ import annotations

import json

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.serving.access import make_tokens, read_tokens


def test_a_token_opens_its_own_user_and_no_other(tmp_path):
    made = make_tokens(tmp_path / "tokens", ["ann", "bob"])
    tokens = read_tokens(tmp_path / "tokens")
    assert {slug: tokens.holder(token) for slug, token in made.items()} == {"ann": "ann", "bob": "bob"}
    prefix, key, secret = made["ann"].split("_", 2)
    other = made["bob"].split("_", 2)
    for wrong in (
        "",
        "_",
        "__",
        "ann",
        made["ann"][:-1],
        made["ann"] + "x",
        f"{prefix}_{key}_{other[2]}",
        f"{prefix}_{other[1]}_{secret}",
        f"x_{key}_{secret}",
        f"{prefix}__{secret}",
        "\udcff_\udcff_\udcff",
    ):
        assert tokens.holder(wrong) is None


def test_the_file_holds_hashes_only_for_its_owners_eyes(tmp_path):
    made = make_tokens(tmp_path / "tokens", ["ann"])
    text = (tmp_path / "tokens").read_text()
    assert made["ann"] not in text
    assert made["ann"].split("_", 2)[2] not in text
    assert (tmp_path / "tokens").stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [tmp_path / "tokens"]


def test_who_has_a_token_keeps_it(tmp_path):
    first = make_tokens(tmp_path / "tokens", ["ann"])
    second = make_tokens(tmp_path / "tokens", ["ann", "bob"])
    assert set(second) == {"bob"}
    assert read_tokens(tmp_path / "tokens").holder(first["ann"]) == "ann"
    assert read_tokens(tmp_path / "tokens").slugs == {"ann", "bob"}


def test_a_file_of_something_else_is_named_line_by_line(tmp_path):
    make_tokens(tmp_path / "tokens", ["ann"])
    with (tmp_path / "tokens").open("a") as stream:
        stream.write(json.dumps({"slug": "bob"}) + "\nplain words\n")
    before = (tmp_path / "tokens").read_bytes()
    for use in (read_tokens, lambda file: make_tokens(file, ["cy"])):
        with pytest.raises(InputError) as fault:
            use(tmp_path / "tokens")
        assert [problem.line for problem in fault.value.problems] == [2, 3]
    assert (tmp_path / "tokens").read_bytes() == before
    with pytest.raises(InputError, match="--make-tokens"):
        read_tokens(tmp_path / "nowhere")
