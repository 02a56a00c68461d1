"""`data export` to Label Studio and Argilla, and `data import` of what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from persona_rlhf.cli.app import app
from persona_rlhf.common.errors import InputError
from persona_rlhf.data.importers import import_file
from persona_rlhf.data.pairs import read_pairs
from persona_rlhf.data.preference_export import EXPORTS, export_file

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)
MESSAGES = st.tuples(TEXT, TEXT, TEXT).map(
    lambda texts: [
        {"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), texts, strict=True)
    ]
)
PAIR = st.fixed_dictionaries(
    {
        "user_id": st.sampled_from(["ana", "7", "../x", "ü" * 128]),
        "prompt": st.one_of(TEXT, MESSAGES),
        "chosen": TEXT,
        "rejected": TEXT,
    },
    optional={
        "created_at": st.just("2026-11-01T12:30:00Z"),
        "split": st.sampled_from(["train", "heldout"]),
        "source": st.just("page"),
    },
).filter(lambda pair: pair["chosen"] != pair["rejected"])


@pytest.mark.parametrize("name", EXPORTS)
@settings(max_examples=40)
@given(rows=st.lists(PAIR, min_size=1, max_size=6))
def test_what_is_exported_is_imported_as_the_same_pairs(
    tmp_path_factory: pytest.TempPathFactory, name: str, rows: list[dict[str, object]]
) -> None:
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = export_file(name, folder / "pairs.jsonl", folder / "tool.json")
    assert (summary.pairs, summary.users) == (len(rows), len({row["user_id"] for row in rows}))
    import_file(name, folder / "tool.json", folder / "back.jsonl")
    before, after = (
        [(p.user_id, p.prompt, p.chosen, p.rejected, p.id, p.created_at, p.split) for p in read_pairs(file, 0.25)]
        for file in (folder / "pairs.jsonl", folder / "back.jsonl")
    )
    assert before == after


def test_the_place_of_the_chosen_answer_tells_nothing_and_stays(tmp_path: Path) -> None:
    rows = [{"user_id": "u", "prompt": f"p{n}", "chosen": "yes", "rejected": "no"} for n in range(200)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for out in ("a.json", "b.json"):
        export_file("label-studio", tmp_path / "pairs.jsonl", tmp_path / out)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    tasks = json.loads((tmp_path / "a.json").read_text())
    left = sum(task["annotations"][0]["result"][0]["value"]["selected"] == "left" for task in tasks)
    assert 70 < left < 130  # 99.99% of fair draws
    assert all(task["data"][task["annotations"][0]["result"][0]["value"]["selected"]] == "yes" for task in tasks)


def test_a_place_comes_back(tmp_path: Path) -> None:
    rows = [
        {"user_id": "u", "prompt": f"p{n}", "chosen": "yes", "rejected": "no", "place": f"{1 + n % 2}/2"}
        for n in range(20)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    export_file("label-studio", tmp_path / "pairs.jsonl", tmp_path / "tasks.json")
    import_file("label-studio", tmp_path / "tasks.json", tmp_path / "back.jsonl")
    before, after = (read_pairs(tmp_path / name, 0.25) for name in ("pairs.jsonl", "back.jsonl"))
    assert [pair.place for pair in before] == [pair.place for pair in after]


def test_a_record_is_one_of_argilla(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"user_id": "u", "prompt": "p", "chosen": "yes", "rejected": "no"}\n')
    call = ["data", "export", "argilla", str(tmp_path / "pairs.jsonl"), str(tmp_path / "records.json"), "--json"]
    outcome = CliRunner().invoke(app, call)
    assert outcome.exit_code == 0
    assert json.loads(outcome.stdout)["pairs"] == 1
    [record] = json.loads((tmp_path / "records.json").read_text())
    assert record.keys() == {"id", "fields", "metadata", "suggestions", "responses", "vectors"}
    [response] = record["responses"]["ranking"]
    assert record["fields"][response["value"][0]] == "yes"
    assert UUID(response["user_id"])


@pytest.mark.parametrize(
    ("name", "out", "sentence"),
    [
        ("labelstudio", "out.json", r"did you mean `label-studio`\?"),
        ("argilla", "out.jsonl", "name it"),
        ("argilla", "there.json", "a new file"),
        ("argilla", "out.json", "pairs.jsonl:2: rejected: the column is missing"),
    ],
)
def test_exports_that_do_not_go_write_nothing(tmp_path: Path, name: str, out: str, sentence: str) -> None:
    good = '{"user_id": "u", "prompt": "p", "chosen": "yes", "rejected": "no"}\n'
    (tmp_path / "pairs.jsonl").write_text(good + '{"user_id": "u", "prompt": "p", "chosen": "yes"}\n' + good + "{\n")
    (tmp_path / "there.json").write_text("[]")
    with pytest.raises(InputError, match=sentence) as error:
        export_file(name, tmp_path / "pairs.jsonl", tmp_path / out)
    assert len(error.value.problems) == (2 if name == "argilla" and out == "out.json" else 1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pairs.jsonl", "there.json"]
