from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.data.check import check
from persona_rlhf.data.importers import FORMATS, import_cragc25

REAL = Path(__file__).parents[3] / "shared" / "data" / "cragc25"  # beside the checkout, where there is one


def judgement(**change: Any) -> dict[str, Any]:
    row = {"user": "w1", "query_id": "q1", "query": "why?", "a_id": "A1", "b_id": "B1", "a": "text a", "b": "text b"}
    row |= {"a_kind": "llm", "sex": "Female", "age": "60", "country": "Nowhere", "choice": {"quality_overall": "B"}}
    return {**row, **change}


def source(folder: Path, *rows: Any) -> Path:
    path = folder / "annotations.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def test_a_judgement_becomes_a_pair_without_the_persons_data(tmp_path: Path) -> None:
    source(tmp_path, judgement(), judgement(user="w2", choice={"quality_overall": "A"}))
    summary = import_cragc25(tmp_path, tmp_path / "new" / "out.jsonl")
    assert (summary.rows, summary.pairs, summary.users, summary.left_out) == (2, 2, 2, {})
    pairs = [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text().splitlines()]
    assert pairs == [
        {"user_id": "w1", "prompt": "why?", "chosen": "text b", "rejected": "text a", "id": "q1/B1/A1/w1",
         "source": "cragc25"},
        {"user_id": "w2", "prompt": "why?", "chosen": "text a", "rejected": "text b", "id": "q1/A1/B1/w2",
         "source": "cragc25"},
    ]  # fmt: skip
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["out.jsonl"]


def test_a_row_without_a_choice_is_counted(tmp_path: Path) -> None:
    path = source(tmp_path, judgement(), judgement(choice={"quality_overall": "N"}))
    summary = FORMATS["cragc25"](path, tmp_path / "out.jsonl")
    assert (summary.rows, summary.pairs, summary.left_out) == (2, 1, {"no choice in overall quality": 1})


def test_a_file_without_any_choice_writes_nothing(tmp_path: Path) -> None:
    source(tmp_path, judgement(choice={"quality_overall": "N"}), judgement(choice={}))
    with pytest.raises(InputError, match=r"no pair is left, so nothing is written: no choice in overall quality \(2\)"):
        import_cragc25(tmp_path, tmp_path / "out.jsonl")
    assert [file.name for file in tmp_path.iterdir()] == ["annotations.jsonl.gz"]


def test_another_format_is_told_by_row_and_nothing_is_written(tmp_path: Path) -> None:
    path = source(tmp_path, judgement(), judgement(a=None), judgement(choice={"quality_overall": "C"}), 5)
    out = tmp_path / "out.jsonl"
    out.write_text("what stood there\n")
    with pytest.raises(InputError) as error:
        import_cragc25(path, out)
    assert [problem.line for problem in error.value.problems] == [2, 3, 4]
    assert "column `a` must be a text, not None; is this a CRAGC-25 file?" in str(error.value)
    assert out.read_text() == "what stood there\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["annotations.jsonl.gz", "out.jsonl"]


@pytest.mark.parametrize(
    ("src", "out", "sentence"),
    [
        ("nowhere.jsonl", "out.jsonl", "no such file"),
        (".", "out.csv", "name it"),
        (".", ".", "name it"),
        ("empty", "out.jsonl", "holds no annotations.jsonl.gz"),
        ("same.jsonl", "same.jsonl", "would replace its source"),
    ],
)
def test_paths_that_do_not_go(tmp_path: Path, src: str, out: str, sentence: str) -> None:
    source(tmp_path, judgement())
    (tmp_path / "empty").mkdir()
    (tmp_path / "same.jsonl").write_text(json.dumps(judgement()) + "\n")
    with pytest.raises(InputError, match=sentence):
        import_cragc25(tmp_path / src, tmp_path / out)


@pytest.mark.skipif(not REAL.is_dir(), reason="shared/data/cragc25 is not beside the checkout")
def test_the_real_file_gives_its_published_counts(tmp_path: Path) -> None:
    summary = import_cragc25(REAL, tmp_path / "out.jsonl")
    assert (summary.rows, summary.pairs, summary.users, summary.left_out) == (6920, 6920, 420, {})
    checked = check([summary.path])
    assert checked.chosen_is_longer == pytest.approx(0.586, abs=0.001)
    assert checked.words["chosen"].median == pytest.approx(250, abs=5)
    assert (checked.pairs_per_user.minimum, checked.pairs_per_user.maximum) == (15, 46)
    assert checked.screened_out == {"contradiction": 4, "repetition": 5}
    assert checked.users_without_train == checked.users_without_heldout == 0
