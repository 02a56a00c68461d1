"""Where a base is computed, and in what: each rule, on made-up machines."""

import pytest
import torch

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.training import BaseSettings
from persona_rlhf.models.base import load_base, select_device, select_dtype


def settings(**changes):
    return BaseSettings(model="data/base", **changes)


@pytest.fixture
def gpus(monkeypatch):
    """A machine with three GPUs."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_it_is_the_cpu(no_gpu):
    assert select_device(settings()) == select_device(settings(device="cpu")) == torch.device("cpu")


def test_a_gpu_that_is_asked_for_and_not_there_is_said(no_gpu):
    with pytest.raises(InputError, match=r"base\.device: torch finds no CUDA device here"):
        load_base(settings(device="cuda"))


@pytest.mark.parametrize(("rank", "number"), [(None, 0), ("1", 1), ("4", 1)])
def test_each_process_takes_its_own_gpu(gpus, monkeypatch, rank, number):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert select_device(settings()) == select_device(settings(device="cuda")) == torch.device("cuda", number)
    assert gpus == [torch.device("cuda", number)] * 2


def test_the_cpu_is_taken_where_it_is_asked_for(gpus):
    assert select_device(settings(device="cpu")) == torch.device("cpu")
    assert gpus == []


@pytest.mark.parametrize(
    ("setting", "device", "capability", "dtype", "products"),
    [
        ("auto", "cuda", (9, 0), torch.bfloat16, "high"),
        ("auto", "cuda", (8, 0), torch.bfloat16, "high"),
        ("auto", "cuda", (7, 5), torch.float32, "highest"),  # it would emulate bfloat16
        ("bfloat16", "cuda", (7, 5), torch.bfloat16, "high"),
        ("float32", "cuda", (9, 0), torch.float32, "highest"),
        ("auto", "cpu", None, torch.float32, None),
        ("bfloat16", "cpu", None, torch.bfloat16, None),
    ],
)
def test_types_and_products_by_device(monkeypatch, setting, device, capability, dtype, products):
    precisions = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", precisions.append)
    assert select_dtype(settings(dtype=setting), torch.device(device)) == dtype
    assert precisions == ([] if products is None else [products])


def test_the_head_reads_last_tokens_in_one_block():
    """A cut through the hidden states makes torch copy the head's weights for every row on a CPU."""
    model = load_base(settings(device="cpu")).model
    blocks = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: blocks.append(inputs[0].is_contiguous()))
    ids = torch.arange(8).reshape(2, 4)
    with torch.no_grad():
        last = model(input_ids=ids, logits_to_keep=1).logits
        assert blocks == [True]
        assert torch.allclose(last[:, 0], model(input_ids=ids).logits[:, -1], atol=1e-5)
