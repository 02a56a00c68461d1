"""A toy build ends in a folder that transformers loads, the same for the same seed."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from persona_rlhf.simulation import tiny_base

TOY = tiny_base.TinyBaseShape(hidden=32, layers=1, heads=2, kv_heads=1, feed_forward=48)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base.build_base(tmp_path_factory.mktemp("toy") / "base", 3, 12_000, TOY, tokenizer_rows=2000)


def test_the_folder_loads_and_answers(toy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy)
    model = AutoModelForCausalLM.from_pretrained(toy)
    assert model.config.model_type == "llama"
    assert model.config.max_position_embeddings == 1024
    assert model.config.tie_word_embeddings
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**inputs, max_new_tokens=4).shape[1] > inputs["input_ids"].shape[1]


def test_the_generation_prompt_is_a_token_prefix_of_the_whole_conversation(toy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy)
    turns = [
        {"role": "system", "content": "Be kind. "},
        {"role": "user", "content": " how do I\nbake bread? é"},
        {"role": "assistant", "content": "Knead it well."},
    ]
    prompt = tokenizer.apply_chat_template(turns[:2], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    assert whole[: len(prompt)] == prompt
    assert whole[-1] == tokenizer.eos_token_id


def test_the_encoder_agrees_with_the_chat_template(toy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy)
    row = tiny_base.CorpusRow("How?", "Oh,", "I can't do that.", "hazard")
    example = tiny_base.Encoder(tokenizer, 1).encode(row)
    turns = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "Oh, I can't do that."}]
    assert example.ids[
        -len(tokenizer.apply_chat_template(turns, return_dict=False)) :
    ] == tokenizer.apply_chat_template(turns, return_dict=False)
    assert len(example.ids) == len(example.weights)
    shown = example.ids.index(tokenizer.convert_tokens_to_ids("<|assistant|>")) + 1
    assert example.weights[shown] == 0.0  # the false start is not learned


def test_the_same_seed_gives_the_same_weights(toy: Path, tmp_path: Path) -> None:
    again = tiny_base.build_base(tmp_path / "again", 3, 12_000, TOY, tokenizer_rows=2000)
    one, two = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (toy, again))
    assert all(torch.equal(one[name], two[name]) for name in one)
