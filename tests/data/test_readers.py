from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.data.pairs import PreferencePair, read, read_pairs
from persona_rlhf.data.readers import parts_by_name

HEADER = "user_id,prompt,chosen,rejected"
ROW = {"user_id": "ana", "prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "A stone."}


def pairs(path: Path, content: str) -> list[PreferencePair]:
    path.write_text(content, encoding="utf-8", newline="")
    return read_pairs(path, 0.25)


def faults(path: Path, content: str) -> list[str]:
    path.write_text(content, encoding="utf-8", newline="")
    with pytest.raises(InputError) as error:
        read_pairs(path, 0.25)
    return [str(problem).removeprefix(str(path)) for problem in error.value.problems]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", "user_id;prompt;chosen;rejected\r\nana;Name a fruit.;An apple.;A stone.\r\n"),
        ("p.csv", "user_id\tprompt\tchosen\trejected\nana\tName a fruit.\tAn apple.\tA stone.\n"),
        ("p.csv", "user_id|prompt|chosen|rejected\nana|Name a fruit.|An apple.|A stone.\n"),
        ("p.tsv", "user_id\tprompt\tchosen\trejected\nana\tName a fruit.\tAn apple.\tA stone.\n"),
        ("p.csv", "sep=;\nuser_id;prompt;chosen;rejected\nana;Name a fruit.;An apple.;A stone.\n"),
        ("p.csv", f",{HEADER}\n0,ana,Name a fruit.,An apple.,A stone.\n"),  # pandas' index
        ("p.csv", f"{HEADER},\nana,Name a fruit.,An apple.,A stone.,\n"),
        ("p.csv", f"{HEADER}\nana,Name a fruit.,An apple.,A stone.,,\n\n"),
        ("p.csv", "user_id, prompt, chosen, rejected\nana,Name a fruit.,An apple.,A stone.\n"),
        ("p.json", json.dumps([ROW])),
        ("p.json", json.dumps([ROW], indent=2) + "\n"),
        ("p.json", "\ufeff" + json.dumps(ROW, indent=2)),
    ],
)
def test_files_of_spreadsheets_and_of_other_trainers_are_read(tmp_path: Path, name: str, content: str) -> None:
    [pair] = pairs(tmp_path / name, content)
    plain = (pair.user_id, pair.prompt[0].content, pair.chosen, pair.rejected)
    assert plain == ("ana", "Name a fruit.", "An apple.", "A stone.")


@pytest.mark.parametrize(
    ("content", "sentences"),
    [
        (f",{HEADER}\nx,ana,a,b,c\n", [":2: column 1 has no name, but holds text; name it in the first line"]),
        (f"{HEADER},\nana,a,b,c,d\n", [":2: column 5 has no name, but holds text"]),
        (f"{HEADER},chosen\nana,a,b,c,d\n", [":1: chosen: two columns have this name"]),
        (f'{HEADER}\nana,a,b,c\nana,"never closed,b,c\nana,a,b,c\n', [":3: the row is not CSV (a quotation mark"]),
        ("a;b|c\nana;a|b\n", [":2: user_id: the column is missing"]),
    ],
)  # fmt: skip
def test_a_table_that_is_not_clear_names_line_and_remedy(tmp_path: Path, content: str, sentences: list[str]) -> None:
    for fault, sentence in zip(faults(tmp_path / "p.csv", content), sentences, strict=False):
        assert fault.startswith(sentence)


def test_an_ignored_index_is_counted(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(f",{HEADER}\n0,ana,a,b,c\n1,ana,d,e,f\n")
    assert read(tmp_path / "p.csv", 0.25).unknown == {"": 2}


def test_a_cell_is_as_long_as_a_text_of_json_lines(tmp_path: Path) -> None:
    with (tmp_path / "p.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ROW)
        table.writeheader()
        table.writerow({**ROW, "chosen": "hen " * 50_000})
    assert read_pairs(tmp_path / "p.csv", 0.25)[0].chosen == "hen " * 50_000


def test_rows_of_a_json_list_have_their_lines_and_keep_each_others_problems_apart(tmp_path: Path) -> None:
    text = json.dumps([ROW, {**ROW, "chosen": 1}], indent=1)
    assert faults(tmp_path / "p.json", text)[0].startswith(":8: chosen: must be a text")
    twice = f'[{{"user_id": "a", "user_id": "b"}},\n{json.dumps({**ROW, "weight": 0})}]'
    assert [fault[:3] for fault in faults(tmp_path / "p.json", twice)] == [":1:", ":2:"]


def test_a_pointer_of_git_lfs_is_told(tmp_path: Path) -> None:
    for name in ("p.jsonl", "p.parquet"):
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2587144\n"
        assert faults(tmp_path / name, pointer) == [
            ": this is a pointer of git-lfs, not the file itself; run `git lfs pull` where it was cloned"
        ]


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("train.jsonl", "test.jsonl"), ["train", "heldout"]),
        (("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"), ["train", "heldout"]),
        (("train_prefs", "test_prefs", "train_sft"), ["train", "heldout", "train"]),
        (("my_TRAIN.csv", "dev.csv", "ana.csv"), ["train", "heldout", None]),
        (("train",), [None]),
        (("test.jsonl",), [None]),
        (("ana.jsonl", "bob.jsonl"), [None, None]),
        (("ana.jsonl", "test.jsonl"), [None, "unclear"]),
        (("contest.jsonl", "trainee.jsonl"), [None, None]),
        (("train_test.jsonl", "ana.jsonl"), [None, None]),
    ],
)
def test_names_state_a_split_only_together(names: tuple[str, ...], parts: list[str | None]) -> None:
    assert parts_by_name(names) == parts


def test_rows_of_a_test_file_or_split_are_held_out(tmp_path: Path) -> None:
    import datasets

    rows = {"train": "Practice", "test": "Exam"}
    texts = {name: [{**ROW, "prompt": f"{word} {i}?"} for i in range(8)] for name, word in rows.items()}
    (tmp_path / "files").mkdir()
    for name, of_part in texts.items():
        content = "".join(json.dumps(row) + "\n" for row in of_part)
        (tmp_path / "files" / f"{name}.jsonl").write_text(content)
    parts = {name: datasets.Dataset.from_list(of_part) for name, of_part in texts.items()}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    for place in ("files", "saved"):
        splits = Counter((pair.prompt[0].content.split()[0], pair.split) for pair in read_pairs(tmp_path / place, 0.25))
        assert splits == {("Practice", "train"): 8, ("Exam", "heldout"): 8}
    _as_own_choice(tmp_path / "files", texts["test"][0])


def _as_own_choice(folder: Path, row: dict[str, Any]) -> None:
    """A column `split` outweighs the name, and a name alone that cannot decide is a problem."""
    (folder / "test.jsonl").write_text(json.dumps({**row, "split": "train"}) + "\n")
    assert {pair.split for pair in read_pairs(folder, 0.25)} == {"train"}
    (folder / "test.jsonl").write_text((json.dumps(row) + "\n") * 2)
    (folder / "train.jsonl").rename(folder / "ana.jsonl")
    with pytest.raises(InputError) as error:
        read_pairs(folder, 0.25)
    [problem] = error.value.problems
    assert (problem.line, problem.key) == (1, "split")
    assert "no other file is named train; write `split` in the rows" in problem.sentence
