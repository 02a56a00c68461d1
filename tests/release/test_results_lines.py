"""Lines of results.jsonl: the same bytes after reading and writing, and the place of every mistake."""

import json
from pathlib import Path

import pytest

from persona_rlhf.common.errors import InputError
from persona_rlhf.evaluation.records import Measures
from persona_rlhf.release.results import KEYS, RESULTS, Result, line_of, read_results

RUN_0_1 = Path(__file__).parent.parent / "story" / "run_0_1" / "run"


@pytest.mark.parametrize("place", ["this version", "version 0.1"])
def test_a_line_is_written_as_it_was_read(run, place):
    folder = run.path if place == "this version" else RUN_0_1
    results = read_results(folder)
    assert any(result.measures.test is not None and result.measures.tax is not None for result in results)
    written = "".join(map(line_of, results))
    if place == "this version":
        assert written == (folder / RESULTS).read_text(encoding="utf-8")
    else:  # keys of later versions are added
        assert [Result.from_json(json.loads(line)) for line in written.splitlines()] == results


def test_every_field_has_its_key():
    fields = {*Result.__dataclass_fields__, *Measures._fields} - {"measures"}
    assert fields == set(KEYS)
    assert len(KEYS) == len(fields)


def test_a_mistake_in_a_measure_is_named_by_its_key(run):
    file = run.path / RESULTS
    file.write_text(file.read_text().replace('"n": 60', '"n": "many"', 1) + "[]\n")
    with pytest.raises(InputError) as raised:
        read_results(run.path)
    assert [(problem.line, problem.key) for problem in raised.value.problems] == [(1, "heldout_accuracy.n"), (7, None)]
