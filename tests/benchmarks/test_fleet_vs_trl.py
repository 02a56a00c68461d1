import io
import json

import pytest
import torch
from rich.console import Console

from persona_rlhf.benchmarks.fleet_vs_trl import ALONE, FLEET, OTHER_MATHS, PADDED, PLAIN, _turned, bench, render
from persona_rlhf.common.errors import InputError


def test_an_unknown_shape_is_told():
    with pytest.raises(InputError, match="192x4"):
        bench("192x5")


def test_every_contender_begins_a_round():
    names = ["a", "b", "c"]
    assert {_turned(names, turn)[0] for turn in range(3)} == set(names)
    assert all(sorted(_turned(names, turn)) == names for turn in range(4))


@pytest.mark.slow
def test_contenders_do_the_same_work():
    """A short run on the smallest fixed shape: times are not judged here, but who does the same ends at the same."""
    threads = torch.get_num_threads()
    lines = []
    result = bench("192x4", users=2, pairs=6, epochs=2, rounds=2, log=lines.append)
    assert torch.get_num_threads() == threads
    assert json.loads(json.dumps(result)) == result
    assert {"shape", "ratio", "rows", "best_trl"} <= set(result)
    rows = {row["contender"]: row for row in result["rows"]}
    assert len(rows) == 10
    assert sorted(lines) == sorted(f"round {n} of 2: {name}" for n in (1, 2) for name in rows)
    assert {ALONE, FLEET, PADDED, PLAIN} | OTHER_MATHS < set(rows)
    assert rows[FLEET]["adapter_distance"] == 0
    for name, row in rows.items():
        if name in OTHER_MATHS:
            assert row["adapter_distance"] is None
        else:
            assert row["adapter_distance"] < 1e-4
            assert row["final_loss"] == pytest.approx(rows[FLEET]["final_loss"], abs=1e-4)
        assert row["final_loss"] < 0.69
        assert len(row["rounds"]) == 2
        assert min(row["rounds"]) > 0
    trl = [row["seconds_per_user"] for name, row in rows.items() if name.startswith("TRL")]
    assert result["ratio"] == pytest.approx(min(trl) / rows[FLEET]["seconds_per_user"])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render(result))
    shown = console.export_text()
    assert all(name in shown for name in rows)
