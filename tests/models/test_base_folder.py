"""Folders that are no base, each with the sentence that says so; nothing of them is loaded or run."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from persona_rlhf.common.errors import InputError
from persona_rlhf.common.files import shipped_root
from persona_rlhf.config.experiment import GuardSettings
from persona_rlhf.config.training import BaseSettings, LoraSettings
from persona_rlhf.evaluation.request_screens import load_guard
from persona_rlhf.models.base import load_base, select_device, weights_hash
from persona_rlhf.training.base_shape import shape_of

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2587144\n"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return shutil.copytree(shipped_root() / "data/base", tmp_path / "base")


def sentences(folder: Path) -> list[str]:
    with pytest.raises(InputError) as error:
        load_base(BaseSettings(model=str(folder)))
    assert {(problem.file, problem.key) for problem in error.value.problems} == {(str(folder), "base.model")}
    return [problem.sentence for problem in error.value.problems]


def config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen3-0.6B"}')


def only_adapter(folder: Path) -> None:
    adapter(folder)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def lfs(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(LFS) and None


def quantized(method: str) -> Callable[[Path], None]:
    return lambda folder: config(folder, quantization_config={"quant_method": method, "bits": 4})


def shards(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def without_a_layer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in weights.items() if "layers.1.mlp" not in name}, folder / "model.safetensors"
    )


def wrapped(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({f"base_model.model.{name}": tensor for name, tensor in weights.items()}, folder / "model.safetensors")


def checkpoints(folder: Path) -> None:
    (folder / "checkpoint-20").mkdir()
    (folder / "model.safetensors").rename(folder / "checkpoint-20" / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (adapter, "this is an adapter over `Qwen/Qwen3-0.6B`, not a whole model; merge it into its base first"),
        (only_adapter, "this is an adapter over `Qwen/Qwen3-0.6B`, not a whole model"),
        (lfs("model.safetensors"), "model.safetensors: this is a pointer of git-lfs, not the file itself; run `git"),
        (lfs("tokenizer.json"), "tokenizer.json: this is a pointer of git-lfs"),
        (quantized("gptq"), "its weights are stored quantized (gptq), and a base needs its full-precision weights"),
        (quantized("bitsandbytes"), "its weights are stored quantized (bitsandbytes)"),
        (shards, "the folder lacks model-00002-of-00002.safetensors, one of 1 files that"),
        (cut, "a weights file is not whole ("),
        (without_a_layer, "its files lack 3 of the model's weights, such as `model.layers.1.mlp.down_proj.weight`"),
        (wrapped, "of the model's weights, such as"),
        (lambda folder: config(folder, hidden_size=96), "transformers cannot load it ("),
        (lambda folder: config(folder, model_type="unheard_of"), "transformers cannot load it ("),
        (checkpoints, "only safetensors are loaded, never pickles; there are some in checkpoint-20/"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_a_base_is_told_in_one_sentence(
    base: Path, change: Callable[[Path], None], sentence: str
) -> None:
    change(base)
    [said] = sentences(base)
    assert said.startswith(sentence) or sentence in said


def test_every_reason_is_given_at_once(base: Path) -> None:
    adapter(base)
    quantized("awq")(base)
    lfs("model.safetensors")(base)
    assert len(sentences(base)) == 3
    with pytest.raises(InputError) as error:
        weights_hash(BaseSettings(model=str(base)))
    assert len(error.value.problems) == 3


def test_no_code_of_a_model_is_run_whatever_somebody_answers(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = base / "RAN"
    code = "from transformers import LlamaConfig\nclass Own(LlamaConfig): model_type = 'own'\n"
    (base / "configuration_own.py").write_text(f"open({str(ran)!r}, 'w').close()\n{code}")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    config(base, model_type="own", auto_map={"AutoConfig": "configuration_own.Own"})
    [said] = sentences(base)
    assert said.startswith("this model needs Python code of its own, and no code of a model is run")
    with pytest.raises(InputError, match="Python code of its own"):
        shape_of(BaseSettings(model=str(base)), LoraSettings())
    with pytest.raises(InputError, match=r"screening\.classifier\.model: this model needs Python code of its own"):
        load_guard(GuardSettings(model=str(base)), select_device(BaseSettings(model="data/base")))
    config(base, model_type="llama")  # its architecture is in transformers: its code is not needed
    assert load_base(BaseSettings(model=str(base))).weights_hash
    tokenizer = base / "tokenizer_config.json"
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["configuration_own.Own", None]}}
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | own))
    try:
        load_base(BaseSettings(model=str(base)))
    except InputError as fault:
        assert "Python code of its own" in str(fault)
    assert not ran.exists()


def test_a_padding_token_beyond_the_embedding_changes_nothing_and_another_token_does(base: Path) -> None:
    plain = load_base(BaseSettings(model=str(base)))
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(base)
    padded = load_base(BaseSettings(model=str(base)))
    assert padded.tokenizer.pad_token_id == padded.model.get_input_embeddings().weight.shape[0]
    assert padded.pad_id < padded.tokenizer.pad_token_id
    assert padded.eos_ids == plain.eos_ids
    tokenizer.add_tokens(["Zephyrine"])
    tokenizer.save_pretrained(base)
    [said] = sentences(base)
    assert "1 tokens beyond the 2,048 rows of the model's embedding, first `Zephyrine` (id 2,049)" in said


def test_a_turn_token_beyond_the_embedding_is_told_though_it_pads_too(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "<|user turn|>"})
    tokenizer.chat_template = tokenizer.chat_template.replace("message['role']", "message['role'] + ' turn'")
    tokenizer.save_pretrained(base)
    assert "first `<|user turn|>` (id 2,048)" in sentences(base)[0]
