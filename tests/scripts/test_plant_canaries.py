"""The file of a test user reads as preference pairs, and a second one has other codes."""

import json

from tests.scripts.loading import load_script

script = load_script("plant_canaries")


def test_the_file_has_pairs_with_codes_that_nobody_chose(tmp_path):
    files = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for file in files:
        script.main([str(file), "--number", "3"])
    one, two = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert [row["split"] for row in one] == ["train"] * 3
    assert [row["chosen"] for row in one] != [row["chosen"] for row in two]
