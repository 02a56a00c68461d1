"""The memory of an import does not grow with the rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

GROWTH = 24  # MB of resident memory; the larger file holds 64 MB of texts, and its pairs as many
CODE = """
import resource, sys
from pathlib import Path
from persona_rlhf.data.importers import import_file

for source in sys.argv[2:]:
    summary = import_file(sys.argv[1], Path(source), Path(source + ".pairs.jsonl"), min_pairs=2)
    print(summary.pairs, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.parametrize("name", ["trl", "ratings"])
def test_forty_thousand_rows_take_no_more_memory_than_four_hundred(tmp_path: Path, name: str) -> None:
    text = "some words of an answer " * 33

    def row(number: int) -> dict[str, object]:
        about = {"user_id": f"u{number % 100}", "prompt": f"p{number // 200}"}
        if name == "trl":
            return {**about, "chosen": f"{text}{number}", "rejected": f"{number}{text}"}
        return {**about, "response": f"{text}{number}{text}", "rating": number // 100 % 2}

    sources = [tmp_path / f"{rows}.jsonl" for rows in (400, 40_000)]
    begin, between, end = ("", "\n", "\n") if name == "trl" else ("[", ", ", "]")  # ratings: a list on one line
    for source, rows in zip(sources, (400, 40_000), strict=True):
        with source.open("w") as file:
            file.writelines((between if number else begin) + json.dumps(row(number)) for number in range(rows))
            file.write(end)
    done = subprocess.run(
        [sys.executable, "-c", CODE, name, *map(str, sources)], capture_output=True, text=True, check=True
    )
    (few, before), (many, after) = (map(float, line.split()) for line in done.stdout.splitlines())
    assert many == 100 * few > 0
    assert after - before < GROWTH, f"{after - before:.1f} MB"
