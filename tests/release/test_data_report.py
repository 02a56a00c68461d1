"""The page of `data check --report`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.data.check import check
from persona_rlhf.release.data_report import write_data_report


def _pairs(tmp_path: Path) -> Path:
    rows = [
        {"user_id": "<b>ana</b>", "prompt": f"secret {n}", "chosen": "long " * (n + 2), "rejected": "short"}
        for n in range(40)
    ]
    rows.append({"user_id": "bo", "prompt": "secret", "chosen": "Write to bo@mail.org", "rejected": "a", "<i>x</i>": 1})
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_page_has_counts_and_charts_and_no_text_of_the_pairs(tmp_path: Path) -> None:
    source, page = _pairs(tmp_path), tmp_path / "report.html"
    write_data_report(check([source]), [source], page)
    html = page.read_text(encoding="utf-8")
    assert '<dd class="big">41</dd>' in html
    assert "pairs with personal data, email" in html
    assert html.count("<svg") == 5
    assert "secret" not in html
    assert "bo@mail.org" not in html
    assert "chose the longer answer in 40 of 40 cases" in html
    assert "&lt;b&gt;ana" in html
    assert "<i>x" not in html
    assert "://" not in html  # nothing is loaded
    labels = [line for line in html.splitlines() if "users by the share of their pairs" in line]
    assert len(labels) == 1


@pytest.mark.parametrize("name", ["pairs.jsonl", "missing/report.html", "."])
def test_a_file_that_cannot_take_the_page_is_an_error_and_stays(tmp_path: Path, name: str) -> None:
    source = _pairs(tmp_path)
    before = source.read_bytes()
    with pytest.raises(InputError, match="--report"):
        write_data_report(check([source]), [source], tmp_path / name)
    assert source.read_bytes() == before
