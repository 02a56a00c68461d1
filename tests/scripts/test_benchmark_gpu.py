"""The benchmark of GPUs, run on a CPU with a toy model: its figures mean nothing there, but nothing in it may break."""

import pytest
import torch
from transformers import LlamaConfig

from persona_rlhf.benchmarks.fleet_vs_trl import ALONE, CONSTRAINED, FLEET, PADDED, PLAIN, UPPER
from tests.scripts.loading import load_script

LEFT_OUT = [ALONE, PADDED, PLAIN, CONSTRAINED, *UPPER.values(), "TRL, precomputed reference"]


@pytest.fixture
def script():
    return load_script("benchmark_gpu")


@pytest.mark.slow
def test_a_shape_is_measured_whole(script):
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    task = script.Task("toy", 2, 8, 2, (9, 9), (7, 7))
    work = script.work_of(config, task, torch.device("cpu"))
    lengths = {(len(row.chosen.prompt), len(row.rejected.completion)) for user in work.users for row in user.train}
    assert lengths == {(9, 8)}, "an end token on top"
    found = script.measure(config, task, 3, LEFT_OUT, torch.device("cpu"), minutes=0)
    assert found["rounds"] == 1, "no time for a second one"
    assert f"| toy | 1 | {found['ratio']:.2f} |" in script.table([found])
    assert {row["contender"] for row in found["rows"]} == {
        FLEET, "TRL, reference in every step", "TRL, shared reference columns"
    }  # fmt: skip
    assert found["ratio"] > 0
    assert found["users"] == 2
    assert 0 < found["share_of_dense"] < 1.5
    assert all(row["adapter_distance"] < 1e-4 for row in found["rows"])
    # Forward and back take four operations a frozen weight and token and six an adapter's; a pair has 9 + 2 x 7 tokens
    # in the layers and 16 at the head.
    layers = [m.weight for name, m in work.base.model.named_modules() if "proj" in name]
    frozen, adapter = sum(w.numel() for w in layers), work.lora.rank * sum(sum(w.shape) for w in layers)
    step = found["step_teraflops"] * found["step_seconds"] * 1e12
    assert step == pytest.approx(8 * (23 * (4 * frozen + 6 * adapter) + 16 * 4 * 64 * 128), rel=0.1)


def test_every_task_names_a_shape_that_is_shipped(script):
    shapes = script.json.loads(script.find("data/shapes.json").read_text())
    assert {task.shape for task in script.TASKS.values()} <= set(shapes)


def test_without_a_gpu_it_says_so(script, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmark_gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main() == 2
    assert "no GPU" in capsys.readouterr().err


def test_shapes_that_are_measured_are_not_measured_again(script, capsys, monkeypatch, tmp_path):
    names, out = [], tmp_path / "gpu.jsonl"
    row = {"rows": [{"contender": FLEET, "seconds_per_user": 1.0}], "ratio": 2.0, "rounds": 5, "share_of_dense": 0.4}

    def measured(_, task, *__):
        names.append(task.shape)
        return row | {"shape": task.shape, "minutes_of_1000_users": 16.7, "peak_gib": 3.0}

    monkeypatch.setattr(script, "measure", measured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for shapes in (["smollm2-135m"], ["smollm2-135m", "qwen3-0.6b"]):
        monkeypatch.setattr("sys.argv", ["benchmark_gpu.py", "--out", str(out), "--shapes", *shapes])
        assert script.main() == 0
    assert names == [script.TASKS["smollm2-135m"].shape, script.TASKS["qwen3-0.6b"].shape]
    assert len(out.read_text().splitlines()) == 2
    assert capsys.readouterr().err.count("| 2.00 |") == 1 + 2
