from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_rlhf.common.errors import InputError
from persona_rlhf.data import columns
from persona_rlhf.data.pairs import Message, PreferencePair, parse_row, read, read_pairs

ROW: dict[str, Any] = {"user_id": "u", "prompt": "p", "chosen": "c", "rejected": "r"}
TURNS = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "q"}, {"role": "user", "content": "s"}]


def turn(content: str, role: str = "assistant") -> dict[str, str]:
    return {"role": role, "content": content}


def write(path: Path, *rows: Any) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def faults(row: Any) -> str:
    parsed = parse_row(row, "f.jsonl", 3)
    assert isinstance(parsed, list), parsed
    return "\n".join(map(str, parsed))


def good(row: dict[str, Any]) -> PreferencePair:
    parsed = parse_row(row, "f.jsonl", 3)
    assert isinstance(parsed, PreferencePair), parsed
    return parsed


@pytest.mark.parametrize("prompt", ["s", [turn("s", "user")]])
@pytest.mark.parametrize("chosen", ["c", [turn("c")], [turn("s", "user"), turn("c")]])
def test_every_way_of_writing_a_pair_is_one_pair(prompt: Any, chosen: Any) -> None:
    plain = good({**ROW, "prompt": "s"})
    assert good({**ROW, "prompt": prompt, "chosen": chosen}) == plain


def test_the_implicit_prompt_of_trl() -> None:
    pair = good({"user_id": "u", "chosen": [*TURNS, turn("c")], "rejected": [*TURNS, turn("r")]})
    assert pair == good({**ROW, "prompt": TURNS})
    assert pair.prompt == (Message("user", "p"), Message("assistant", "q"), Message("user", "s"))
    assert "same conversation" in faults({"user_id": "u", "chosen": [*TURNS, turn("c")], "rejected": [turn("r")]})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"user_id": ""}, "f.jsonl:3: user_id: has 0 characters; an id has 1 to 128"),
        ({"user_id": "x" * 129}, "has 129 characters"),
        ({"user_id": 7}, 'not the number 7: write "7"'),
        ({"user_id": "\ud800"}, "lone surrogate"),
        ({"prompt": []}, "prompt: holds no message"),
        ({"prompt": TURNS[:2]}, "must end with the user's message"),
        ({"prompt": [turn("x", "tool"), *TURNS]}, "prompt[0].role: is 'tool'"),
        ({"prompt": [*TURNS, turn("x", "system")]}, "must be the first"),
        ({"prompt": [{"role": "user"}]}, "prompt[0]: must be"),
        ({"chosen": 5}, "chosen: must be a text or one assistant message, not 5"),
        ({"chosen": [turn("a"), turn("b")]}, "holds 2 messages, but a preference is about one answer: keep the last"),
        ({"rejected": [turn("x", "user")]}, "rejected: must be an assistant message"),
        ({"rejected": [{"role": "assistant", "content": ["x"]}]}, "rejected[0].content: must be a text"),
        ({"weight": float("nan")}, "weight: is nan; a weight is a finite number above 0"),
        ({"weight": -1}, "weight: is -1"),
        ({"weight": 0}, "weight: is 0"),
        ({"weight": True}, "weight: must be a number"),
        ({"created_at": "yesterday"}, "write ISO 8601"),
        ({"split": "test"}, "did you mean `heldout`?"),
        ({"clean_choice": 1}, "must be true or false, not 1"),
        ({"id": ["x"]}, "id: must be a text"),
        ({"source": 4}, "source: must be a text"),
    ],
)
def test_a_bad_value_is_named_with_its_place_and_remedy(change: dict[str, Any], sentence: str) -> None:
    assert sentence in faults({**ROW, **change})


def test_a_column_by_another_name_gets_a_hint() -> None:
    sentences = faults({"user": "u", "query": "p", "accepted": "c", "regected": "r"})
    for ours, theirs in {"user_id": "user", "prompt": "query", "chosen": "accepted", "rejected": "regected"}.items():
        assert f"f.jsonl:3: {ours}: the column is missing, but there is `{theirs}`: rename it to `{ours}`" in sentences
    assert "the column is missing; a row needs `user_id`, `prompt`" in faults({**ROW, "chosen": None})


def test_optional_columns_are_kept() -> None:
    pair = good(
        {**ROW, "id": 4, "created_at": "2026-11-01T10:00:00Z", "source": "s", "weight": 2, "clean_choice": True}
    )
    assert (pair.id, pair.created_at, pair.source, pair.weight, pair.clean_choice) == (
        "4", "2026-11-01T10:00:00Z", "s", 2.0, True,
    )  # fmt: skip
    assert (pair.file, pair.line) == ("f.jsonl", 3)
    assert good(ROW).id == good({**ROW, "weight": 3}).id != good({**ROW, "chosen": "d"}).id


def test_all_bad_rows_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl", ROW, "{oops", {**ROW, "chosen": 1, "weight": -1}, "", "3", '{"id": "a", "id": "b"}'
    )
    with pytest.raises(InputError) as error:
        read_pairs(path, 0.25)
    lines = str(error.value).splitlines()
    assert [line.removeprefix(f"{path}:").split(":")[0] for line in lines] == ["2", "3", "3", "5", "6"]
    assert "not JSON" in lines[0]
    assert "the key `id` occurs twice" in lines[4]


def test_a_file_of_bad_rows_is_told_in_a_screenful(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", *[{"user_id": 1}] * 1000)
    with pytest.raises(InputError, match=r"and 3,950 more problems") as error:
        read_pairs(path, 0.25)
    assert len(error.value.problems) == 51


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("p.jsonl", b"", "the file is empty"),
        ("p.jsonl", b"\n \n", "the file is empty"),
        ("p.jsonl", b"\xff\xfe{}", ":1: the line is not UTF-8"),
        ("p.json", b"[\n{}\n]", ":2: user_id: the column is missing"),
        ("p.json", b"[\n{},\n {oops]", ":3: the JSON cannot be read from here on"),
        ("p.json", b"[\n{}\n]\n{}", ":4: the JSON cannot be read from here on"),
        ("p.json", b"[\n{}\n", ":3: the JSON cannot be read from here on"),
        ("p.json", b"[]", "the file is empty"),
        ("p.jsonl", b"[" * 100_000, "JSON"),
        ("p.jsonl.gz", b"no", "cannot be read from here on"),
        ("p.jsonl.gz", gzip.compress(json.dumps(ROW).encode(), mtime=0)[:-20], "cannot be read from here on"),
        ("p.csv", b"user_id,prompt,chosen,rejected\na,b,c,d\na,b,c,d,e\n", ":3: there are more cells"),
        (
            "p.csv",
            b"user_id,prompt,accepted,rejected\na,b,c,d\n",
            ":2: chosen: the column is missing, but there is `acc",
        ),
        ("p.parquet", b"no", "not Parquet"),
        ("p.txt", b"", "`.txt` cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        read_pairs(tmp_path / name, 0.25)
    assert sentence in str(error.value)


def test_a_path_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pairs.jsonl", ROW)
    with pytest.raises(InputError, match=r"did you mean `pairs\.jsonl`"):
        read_pairs("pears.jsonl", 0.25)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no preferences"):
        read_pairs("empty", 0.25)


def test_a_hub_data_set_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    with pytest.raises(InputError) as error:
        read_pairs("nobody/nothing", 0.25)
    assert len(error.value.problems) == 1
    assert "`nobody/nothing` cannot be read (ConnectionError: no network); check the id and the network" in str(
        error.value
    )


def test_every_format_says_the_same(tmp_path: Path) -> None:
    import datasets

    rows = [
        {**ROW, "user_id": "007", "prompt": f"p{i}\nsecond line", "weight": 1.5, "split": "train", "clean_choice": True}
        for i in range(4)
    ]
    write(tmp_path / "a.jsonl", *rows)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    with (tmp_path / "c.csv").open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    folder = tmp_path / "[odd] *name"
    folder.mkdir()
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(folder / "d.parquet")
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "saved_dict")

    def contents(path: Path) -> list[tuple[object, ...]]:
        return [
            (p.user_id, p.prompt, p.chosen, p.weight, p.split, p.clean_choice, p.id) for p in read_pairs(path, 0.25)
        ]

    expected = contents(tmp_path / "a.jsonl")
    assert len(expected) == 4
    for place in ("b.jsonl.gz", "c.csv", "[odd] *name/d.parquet", "[odd] *name", "saved", "saved_dict"):
        assert contents(tmp_path / place) == expected, place
    assert [pair.line for pair in read_pairs(tmp_path / "c.csv", 0.25)] == [2, 4, 6, 8]


def test_a_folder_is_read_file_by_file_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", {**ROW, "prompt": "2"})
    write(tmp_path / "a.jsonl", {**ROW, "prompt": "1", "note": "x"}, {**ROW, "prompt": "1b", "note": None})
    write(tmp_path / "README.md", "not pairs")
    reading = read(tmp_path, 0.25)
    assert [pair.prompt[0].content for pair in reading.pairs] == ["1", "1b", "2"]
    assert reading.unknown == {"note": 2}


def test_plain_files_need_neither_torch_nor_datasets(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", ROW)
    code = f"""
import sys
from persona_rlhf.data.pairs import read_pairs
import persona_rlhf.data.tokenize, persona_rlhf.data.check
read_pairs({str(path)!r}, 0.25)
print([name for name in ("torch", "datasets", "transformers", "pyarrow") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters(), max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.lists(
            st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", 1]), "content": inner}), max_size=3
        )
    ),
    max_leaves=6,
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(columns.KNOWN, ANYTHING)) | ANYTHING)
def test_no_row_breaks_the_reader(row: Any) -> None:
    parsed = parse_row(row, "f.jsonl", 1)
    if isinstance(parsed, list):
        assert parsed
        assert all(problem.line == 1 for problem in parsed)
    else:
        assert isinstance(parsed.chosen, str)
