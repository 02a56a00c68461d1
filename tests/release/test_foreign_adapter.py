"""Folders of other trainers' adapters: everything that speaks against one, at once, and no pickle is opened."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from persona_rlhf.common.errors import InputError
from persona_rlhf.release.foreign_adapter import read_foreign

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "org/base",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
}


def adapter(folder, tensors=None, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    made = {f"{LAYER}.lora_A.weight": np.zeros((4, 6), "f4"), f"{LAYER}.lora_B.weight": np.ones((5, 4), "f4")}
    save_file(made if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def problems(folder, rank=4):
    with pytest.raises(InputError) as refused:
        read_foreign(folder, rank)
    return [str(problem) for problem in refused.value.problems]


def test_rank_scale_layers_and_base_are_read(tmp_path):
    read = read_foreign(adapter(tmp_path, use_rslora=True), 8)
    assert (read.rank, read.scale, read.base, read.base_sha256) == (4, 4.0, "org/base", None)
    assert read.layers == {"model.layers.0.self_attn.q_proj": (6, 5)}


@pytest.mark.parametrize(
    ("stated", "sentence"),
    [
        ({"peft_type": "IA3"}, "only LORA adapters can be trained on"),
        ({"task_type": "SEQ_CLS"}, "the adapter of a chat model is CAUSAL_LM"),
        ({"use_dora": True}, "it is a DoRA adapter"),
        ({"modules_to_save": ["lm_head"]}, "it trained whole layers"),
        ({"trainable_token_indices": [3]}, "it trained embeddings of tokens"),
        ({"bias": "lora_only"}, "it trained biases"),
        ({"lora_bias": True}, "it is no plain LoRA"),
        ({"rank_pattern": {"q_proj": 2}}, "its layers have different ranks"),
        ({"alpha_pattern": {"q_proj": 2}}, "its layers have different scales"),
        ({"init_lora_weights": "pissa"}, "which changes the base"),
        ({"base_model_name_or_path": 5}, "it must be a name or a folder"),
        ({"lora_alpha": 0}, "it must be a number above 0"),
        ({"lora_alpha": 10**400}, "is 100000000000000000...0000000000000000000; it must be a number above 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_anything_but_plain_lora_is_refused_by_its_key(tmp_path, stated, sentence):
    [problem] = problems(adapter(tmp_path, **stated))
    assert f"adapter_config.json: {next(iter(stated))}: " in problem
    assert sentence in problem


def test_a_higher_rank_is_refused_with_the_remedy(tmp_path):
    [problem] = problems(adapter(tmp_path), rank=2)
    assert "r: is 4, and lora.rank is 2: a lower rank would change the adapter; set lora.rank to 4" in problem


def test_all_mistakes_of_config_and_weights_come_at_once(tmp_path):
    tensors = {
        f"{LAYER}.lora_A.weight": np.zeros((3, 6), "f4"),
        f"{LAYER}.lora_B.weight": np.zeros((5, 4), "f4"),
        f"{LAYER}.lora_magnitude_vector": np.zeros(5, "f4"),
        "base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((4, 9), "f4"),
        "base_model.model.model.k.lora_A.weight": np.zeros((4, 6), "i4"),
        "base_model.model.model.v.lora_A.weight": np.zeros((4, 6), "f4"),
    }
    listed = "\n".join(problems(adapter(tmp_path, tensors, use_dora=True)))
    assert listed.count("\n") == 5
    assert "lora_embedding_A`, which is neither" in listed
    assert "lora_magnitude_vector`, which is neither" in listed
    assert "is of type I32" in listed
    assert "`model.v` has one of lora_A and lora_B" in listed
    assert "has lora_A [3, 6] and lora_B [5, 4], which are not of rank 4" in listed


def test_a_pickle_is_never_opened(tmp_path):
    (adapter(tmp_path) / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    [problem] = problems(tmp_path)
    assert "adapter_model.bin is a pickle, which can run code; save with safe_serialization=True" in problem


def test_of_a_folder_of_checkpoints_the_newest_is_named(tmp_path):
    for step in (20, 100, 9):
        adapter(tmp_path / f"checkpoint-{step}")
    [problem] = problems(tmp_path)
    assert f"name one of them, such as the newest, {tmp_path / 'checkpoint-100'}" in problem
    assert read_foreign(tmp_path / "checkpoint-100", 4).rank == 4
    adapter(tmp_path)  # the trainer saved the last one beside its checkpoints
    assert read_foreign(tmp_path, 4).folder == tmp_path


@pytest.mark.parametrize("content", ["[]", "{", "\xff"])
def test_a_damaged_folder_is_refused(tmp_path, content):
    (adapter(tmp_path) / "adapter_config.json").write_text(content, encoding="latin-1")
    assert len(problems(tmp_path)) == 1
    (adapter(tmp_path) / "adapter_model.safetensors").write_bytes(b"\x10\0\0")
    assert "cannot be read" in problems(tmp_path)[0]


def test_other_weights_or_another_scale_are_another_start(tmp_path):
    def digest(folder):
        return read_foreign(folder, 4).digest

    first = digest(adapter(tmp_path))
    assert digest(adapter(tmp_path, target_modules="q_proj")) == first
    assert digest(adapter(tmp_path, lora_alpha=4)) != first
    more = {f"{LAYER}.lora_A.weight": np.ones((4, 6), "f4"), f"{LAYER}.lora_B.weight": np.ones((5, 4), "f4")}
    assert digest(adapter(tmp_path, more)) != first
